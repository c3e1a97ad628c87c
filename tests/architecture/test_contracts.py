"""Generated contracts are current, valid, and match what the code produces."""

import asyncio
import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from freshline import contracts
from freshline.contracts import CLOUD_EVENT_HEADERS, MODELS, main
from infra.kafka.codec import encode_change, encode_event, encode_plan
from infra.kafka.memory import MemoryStreams
from infra.settings import Settings
from schemas.dead_letters import DEAD_LETTER_HEADERS
from schemas.documents import Outcome
from schemas.events import BlobRef, Change, ChunkPlan, DocumentEvent, IndexChange, StageTimes
from schemas.topics import DEAD_LETTERS
from streams.runner import Delivery, Runner
from streams.steps.prepare import Prepare

DOCS = Path(__file__).parents[2] / "docs"
GENERATED = DOCS / "contracts"
EVENT = DocumentEvent(
    event_id="e1",
    tenant="acme",
    document_id="guides/travel.md",
    version=7,
    change=Change.UPSERTED,
    accepted_ms=1.0,
    content=BlobRef(sha256="0" * 64, size_bytes=3),
)
PLAN = ChunkPlan(event=EVENT, position="documents.v1-3:42", profile="p", chunked_ms=2.0)
CHANGE = IndexChange(
    event_id="e1",
    tenant="acme",
    document_id="guides/travel.md",
    version=7,
    position="documents.v1-3:42",
    generation="g1",
    outcome=Outcome.DONE,
    times=StageTimes(accepted_ms=1.0),
)
RECORDS = {
    "DocumentEvent": encode_event(EVENT, "00-trace"),
    "ChunkPlan": encode_plan(PLAN, 3, "00-trace"),
    "IndexChange": encode_change(CHANGE, 3, "00-trace"),
}


def read(name: str) -> dict:
    return json.loads((GENERATED / name).read_text(encoding="utf-8"))


def test_generated_files_do_not_depend_on_the_environment(monkeypatch, capsys):
    monkeypatch.setenv("FRESHLINE_NAMESPACE", "elsewhere")
    monkeypatch.setenv("FRESHLINE_KAFKA__PARTITIONS", "3")
    monkeypatch.setenv("FRESHLINE_TENANT__API_KEY", "secret")
    assert main(["--check"]) == 0, capsys.readouterr().err


def test_missing_changed_and_obsolete_files_are_reported_and_repaired(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(contracts, "_ROOT", tmp_path)
    assert main(["--check"]) == 1
    assert not any(tmp_path.iterdir())
    assert main([]) == 0
    assert main(["--check"]) == 0
    schema = tmp_path / "contracts/schemas/Problem.json"
    schema.write_text("{}")
    leftover = schema.with_name("Gone.json")
    leftover.write_text("{}")
    capsys.readouterr()
    assert main(["--check"]) == 1
    errors = capsys.readouterr().err
    assert "docs/contracts/schemas/Problem.json is outdated" in errors
    assert "docs/contracts/schemas/Gone.json is obsolete" in errors
    assert main([]) == 0
    assert not leftover.exists()
    assert main(["--check"]) == 0


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_json_schemas_are_valid(model):
    Draft202012Validator.check_schema(read(f"schemas/{model.__name__}.json"))


@pytest.mark.parametrize("name", RECORDS)
def test_records_match_their_contracts(name):
    record = RECORDS[name]
    Draft202012Validator(read(f"schemas/{name}.json")).validate(json.loads(record.value))
    message = read("asyncapi.json")["components"]["messages"][name]
    headers = {key: value.decode() for key, value in record.headers}
    assert set(headers) == set(CLOUD_EVENT_HEADERS)
    Draft202012Validator(message["headers"]).validate(headers)


async def test_dead_letters_match_their_contract():
    streams, finished = MemoryStreams(1), asyncio.Event()
    step = Prepare(blobs=None, parsers=None, splitter=None, profile="p", report=None)
    runner = Runner(step, streams, Settings().streams, on_finished=lambda *_: finished.set())
    running = asyncio.create_task(runner.run())
    await runner.take(Delivery(0, 5, b"acme/a.md", b"no JSON", RECORDS["DocumentEvent"].headers, lambda: None))
    async with asyncio.timeout(10):
        await finished.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    [dead_letter] = streams.log[DEAD_LETTERS.name, 0]
    assert (dead_letter.key, dead_letter.value) == (b"acme/a.md", b"no JSON")
    added = dead_letter.headers[len(RECORDS["DocumentEvent"].headers) :]
    assert [name for name, _ in added] == list(DEAD_LETTER_HEADERS)
    message = read("asyncapi.json")["components"]["messages"]["DeadLetter"]
    Draft202012Validator(message["headers"]).validate({name: value.decode() for name, value in dead_letter.headers})


@pytest.mark.parametrize("service", ["ingest", "query"])
def test_openapi_is_valid(service):
    validate(read(f"openapi-{service}.json"))


def test_every_reference_of_asyncapi_resolves():
    whole = read("asyncapi.json")
    references = references_in(whole)
    assert len(references) > 10
    for reference in references:
        file, _, pointer = reference.partition("#")
        target = read(file) if file else whole
        for part in filter(None, pointer.split("/")):
            target = target[part]


def references_in(value: object) -> list[str]:
    match value:
        case {"$ref": str(reference)}:
            return [reference]
        case dict():
            return [reference for part in value.values() for reference in references_in(part)]
        case list():
            return [reference for part in value for reference in references_in(part)]
    return []
