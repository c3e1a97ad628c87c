"""Comparison of stored passages with the contents, which are parsed and split again."""

from collections import defaultdict
from collections.abc import Mapping

from freshline.verify.agreement import Findings, Kind, PassageContent, compare_passages, named_documents
from infra.blobs.port import BlobCorrupt, BlobMissing, BlobStore
from infra.settings import Settings
from schemas.documents import DocumentKey
from schemas.events import DocumentEvent
from schemas.index import Manifest
from streams.core.chunk_identity import stored_chunks
from streams.parsing.sandbox import ParseFailed, ParserPool
from streams.progress import NoProgress
from streams.steps.prepare import Prepare
from streams.worker import profile, splitter


async def compare_with_contents(
    settings: Settings,
    blobs: BlobStore,
    *,
    wanted: Mapping[DocumentKey, DocumentEvent | None],
    manifests: Mapping[DocumentKey, Manifest],
    stored: Mapping[str, PassageContent],
    findings: Findings,
) -> tuple[Mapping[Kind, list[str]], list[str]]:
    """Compare the content of each document with all stored fields of its passages, one document at a time.

    Vectors are not compared: that would take as long as embedding everything.

    Args:
        settings: settings of the workers, with parser, splitter and model.
        blobs: content store.
        wanted: expected event of each document.
        manifests: manifests of all documents.
        stored: passages by chunk id.
        findings: previous findings. For documents with findings, only the content is checked.

    Returns:
        Additional findings, and the documents that could not be compared.
    """
    found: dict[Kind, list[str]] = defaultdict(list)
    not_compared: list[str] = []
    lost, wrong = frozenset(findings.get(Kind.CONTENT_LOST, ())), named_documents(findings)
    parsers = ParserPool(settings.parse)
    await parsers.start()
    try:
        prepare = Prepare(blobs, parsers, splitter(settings), profile(settings), NoProgress())
        for key, event in sorted(wanted.items()):
            if event is None or event.content is None or str(key) in lost:
                continue
            manifest = manifests.get(key)
            try:
                if manifest is None or str(key) in wrong:
                    await blobs.get(event.content)  # content to be rewritten must be readable
                    continue
                if manifest.profile != prepare.profile:
                    await blobs.get(event.content)
                    not_compared.append(str(key))
                    continue
                plan, chunks = await prepare.plan(event, manifest.position)
            except (BlobMissing, BlobCorrupt):
                found[Kind.CONTENT_LOST].append(str(key))
                continue
            except ParseFailed:
                not_compared.append(str(key))
                continue
            for kind, names in compare_passages(manifest, plan, stored_chunks(plan, chunks), stored).items():
                found[kind] += names
    finally:
        await parsers.close()
    return found, not_compared
