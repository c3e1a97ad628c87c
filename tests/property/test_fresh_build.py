"""After any sequence of edits, the stored content equals that of a fresh build of the last version."""

import asyncio
from functools import cache
from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from infra.blobs.memory import MemoryBlobStore
from infra.embedding.hashing import HashingEmbedder
from infra.kafka.codec import decode
from infra.opensearch.memory import MemoryIndex
from schemas.documents import DocumentKey, Outcome
from schemas.events import Change, ChunkPlan, DocumentEvent, IndexChange
from streams.core.chunk_identity import PROVENANCE
from streams.core.splitting import MAX_CONTEXT_CHARS, Splitter
from streams.parsing.parse import ParsedDocument
from streams.progress import NoProgress
from streams.runner import Task
from streams.steps.index import Index
from streams.steps.prepare import Prepare

KEY = DocumentKey("acme", "a.md")
DIMENSION = 16
LONG = "h" * MAX_CONTEXT_CHARS
PROVENANCE_OF_MANIFEST = {"version", "position", "added", "removed", "before", "updated_ms"}

names = st.sampled_from(["A", "B", "A > B", "B > A", f"{LONG}1", f"{LONG}2"])
sections = st.tuples(st.integers(1, 3), names, st.sampled_from(["same", "other", "same"]))
texts = st.lists(sections, max_size=5)
attributes = st.fixed_dictionaries(
    {},
    optional={
        "title": names | st.just(""),
        "source": st.sampled_from(["A", "B"]),
        "groups": st.sampled_from([("hr",), ("hr", "it"), ("it", "hr")]),
        "metadata": st.sampled_from([{"a": 1}, {"a": True}, {"a": 1.0}, {"a": "1"}, {"a": 1, "b": 2}]),
    },
)
versions = st.none() | st.tuples(texts, attributes)


class Parsers:
    async def parse(self, content, _content_type, _file_name):
        return ParsedDocument(content.decode(), None, "text/markdown")


@cache
def splitter() -> Splitter:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Splitter(tokenizer.to_str(), 45)


class Pipeline:
    """The steps ``prepare`` and ``index`` on twins."""

    def __init__(self, profile: str = "p"):
        self.blobs = MemoryBlobStore()
        self.index = MemoryIndex(DIMENSION)
        self.texts = {}
        self.prepare = Prepare(self.blobs, Parsers(), splitter(), profile, NoProgress())
        self.step = Index(self.index, HashingEmbedder(DIMENSION), self.blobs, "g1", 8, NoProgress())

    async def apply(self, number: int, version) -> IndexChange:
        text, fields = version or ("", {})
        self.texts[number] = text
        event = DocumentEvent(
            event_id=f"e{number}",
            tenant=KEY.tenant,
            document_id=KEY.document_id,
            version=number,
            change=Change.DELETED if version is None else Change.UPSERTED,
            accepted_ms=0,
            content=None if version is None else await self.blobs.put(text.encode()),
            **fields,
        )
        plan = await self._emitted(self.prepare, Task(event, 0, number, None), ChunkPlan)
        return await self._emitted(self.step, Task(plan, 0, number, None), IndexChange)

    async def _emitted(self, step, task, message):
        [outcome] = [one async for some in step.run([task]) for one in some]
        [record] = outcome.emit
        return decode(message, record.value, record.headers)

    def everything(self):
        """Chunk id → stored chunk and vector."""
        return {name: (one.chunk, one.vector.tobytes()) for name, one in self.index._searchable.items()}

    def content(self):
        """The same without the provenance fields."""
        return {
            name: (chunk.model_dump_json(exclude=set(PROVENANCE)), vector)
            for name, (chunk, vector) in self.everything().items()
        }

    async def manifest(self):
        return (await self.index.manifests([KEY]))[KEY].model_dump_json(exclude=PROVENANCE_OF_MANIFEST)


def document(parts) -> str:
    return "\n".join(f"{'#' * level} {heading}\n\n{f'{body} ' * 20}\n" for level, heading, body in parts)


async def edited(history) -> None:
    edits = Pipeline()
    before = {}
    for number, version in zip(count(1), history, strict=False):
        change = await edits.apply(number, version)
        fresh = Pipeline()
        await fresh.apply(number, version)
        assert change.outcome is Outcome.DONE
        assert edits.content() == fresh.content()
        assert await edits.manifest() == await fresh.manifest()
        after = edits.everything()
        # The change names exactly the passages that differ from before.
        assert set(change.added) == {name for name, stored in after.items() if before.get(name) != stored}
        assert set(change.removed) == before.keys() - after.keys()
        for chunk, _ in after.values():
            assert edits.texts[chunk.version][chunk.start : chunk.end] == chunk.text, (
                "offsets refer to the text of its version"
            )
        before = after


@given(history=st.lists(versions, min_size=2, max_size=5))
@settings(max_examples=150, deadline=None)
def test_state_after_any_edits_equals_a_fresh_build(history):
    versions_of_document = [None if version is None else (document(version[0]), version[1]) for version in history]
    asyncio.run(edited(versions_of_document))


@given(parts=st.lists(sections, min_size=1, max_size=5), fields=attributes, data=st.data())
@settings(max_examples=150, deadline=None)
def test_state_after_one_heading_was_renamed_equals_a_fresh_build(parts, fields, data):
    at = data.draw(st.integers(0, len(parts) - 1))
    level, _, body = parts[at]
    renamed = [*parts[:at], (level, data.draw(names), body), *parts[at + 1 :]]
    asyncio.run(edited([(document(parts), fields), (document(renamed), fields)]))


@given(
    paths=st.lists(st.lists(st.sampled_from(["A", "B", "A > B"]), max_size=3), min_size=2, max_size=4), data=st.data()
)
@settings(max_examples=100, deadline=None)
def test_state_after_headings_above_the_same_text_changed_equals_a_fresh_build(paths, data):
    """Different heading paths whose embedded text is equal because the title completes it."""
    versions_of_document = []
    for path in paths:
        above = "\n".join(f"{'#' * level} {heading}" for level, heading in enumerate(path, start=1))
        below = "\n".join(f"#### {name}\n\n{f'{name} ' * 20}\n" for name in "xyz")
        versions_of_document.append(
            (f"{above}\n\n{'first ' * 20}\n\n{below}", {"title": data.draw(st.sampled_from(["T", "A"]))})
        )
    asyncio.run(edited(versions_of_document))


def test_an_edit_at_the_top_writes_only_the_changed_passages():
    body = [(2, f"Section {number}", f"word{number}") for number in range(20)]

    async def edit():
        edits = Pipeline()
        await edits.apply(1, (document(body), {}))
        original = edits.everything()
        change = await edits.apply(2, (document([(2, "New", "first"), *body]), {}))
        kept = original.keys() & edits.everything().keys()
        return change, kept, original

    change, kept, original = asyncio.run(edit())
    assert len(change.added) <= 2
    assert len(kept) >= len(original) - 1


def test_vectors_are_shared_where_the_embedded_texts_are_equal():
    async def edit():
        edits = Pipeline()
        await edits.apply(1, (document([(1, f"{LONG}1", "x"), (2, "B", "x"), (2, "B", "y")]), {}))
        vectors = dict(edits.index._vectors)
        change = await edits.apply(2, (document([(1, f"{LONG}2", "x"), (2, "B", "x"), (2, "B", "y")]), {}))
        return change, {name for name in edits.index._vectors if name not in vectors}

    change, embedded = asyncio.run(edit())
    assert len(change.added) == 3
    assert len(embedded) == 1, "only the embedded text of the passage with the heading changes"
