"""Small inputs of reported kinds, from upload to search and answer.

Each row of a table is one document: how it is sent, a question, and conditions for its passages. The documents of
``../shared/corpora/reports`` are sent as their manifest declares; those in ``MADE`` are of the same kinds. All are sent
to one installation; each row is a test.
"""

import asyncio
import base64
import csv
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from bench.installation import BenchInstallation, installed
from freshline.services import Services, connect_services
from infra.local import Stack

pytestmark = pytest.mark.stack

REPORTS = Path(__file__).parents[2].parent / "shared" / "corpora" / "reports"


@dataclass(frozen=True)
class Expected:
    """Conditions for a processed document.

    Attributes:
        question: a question that finds the document.
        texts: texts that its passages contain.
        titles: allowed titles; empty allows any.
        absent: texts that neither its passages nor its title contain.
        metadata: a filter by each value finds the document, by another value does not.
        passages: number of passages, or None for any.
        reason: text in the reason of its dead letter; empty if it must not become one.
    """

    question: str = ""
    texts: tuple[str, ...] = ()
    titles: tuple[str | None, ...] = ()
    absent: tuple[str, ...] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    passages: int | None = None
    reason: str = ""


@dataclass(frozen=True)
class Made:
    """An input of one of those kinds, and how it is sent: raw, as a form, or as a line of a batch."""

    content: bytes
    send_as: str
    expected: Expected
    way: str = "raw"
    headers: Mapping[str, str] = field(default_factory=dict)


YAML = ("---", "title:", "tags:", "description:", "Title:", ">-")
LEAVE = Expected(
    "How long is parental leave?",
    ("Employees may take sixteen weeks of parental leave.",),
    ("Parental leave policy",),
    YAML,
    {"tags": "family"},
)
REPORTED = {
    "cp1252.txt": Expected("Was ist der Preis?", ("Der Preis beträgt 5 € – „günstig“ für Müller & Söhne.",)),  # noqa: RUF001 - as written
    "latin1_short.txt": Expected("Wie groß ist die Tür?", ("Die Größe der Tür beträgt zwei Meter.",)),
    "sjis.txt": Expected("休暇の申請", ("休暇の申請は二週間前までに行ってください。",)),
    "utf16_bom.txt": Expected("Wie groß ist der Urlaub?", ("Urlaub: Größe zwei.",)),
    "meta1252.html": Expected(
        "Wann öffnet die Kantine?", ("öffnet um acht. Käse gibt es täglich.",), ("Öffnungszeiten",)
    ),
    "fm_lf.md": LEAVE,
    "fm_crlf.md": LEAVE,
    "fm_bom_crlf.md": LEAVE,
    "fm_blank.md": Expected("After blank line", ("Body.",), ("After blank line",), YAML),
    "fm_cap.md": Expected("Capital", ("x",), ("Capital",), YAML),
    "fm_desc.md": Expected(
        "When does the bilby cafe open?", ("The bilby cafe opens at nine.", "Body."), ("T",), YAML, {"tags": "lunch"}
    ),
    "fm_folded.md": Expected(
        "When are claims paid?", ("Claims are paid on Fridays.",), ("Expense claims in 2026",), YAML
    ),
    "rule_first.md": Expected(
        "What is the quoll allowance?", ("The quoll allowance is 40 euros a day.", "Other text."), ("Rest",)
    ),
    "img_heading.md": Expected("What is the real title?", ("more",), ("Real title", "logo")),
    "html_heading.md": Expected("Project Numbat", ("Body.",), ("Project Numbat",)),
    "empty.md": Expected(passages=0),
    "blank.md": Expected(passages=0),
}
"""File of the collection → conditions. The other files of its manifest are added once their conditions hold."""

KOI8 = "Отпуск длится двадцать восемь дней."
PLAIN_KOI8 = Expected("Сколько длится отпуск?", (KOI8,))
POLISH = Expected("Jak długo trwa urlop?", ("Zażółć gęślą jaźń: urlop trwa dni dwadzieścia.",))
FRONT = (
    'title: "Kiosk: hours" # comment\r\ntags:\r\n- lunch\r\n- cash only\r\nteam: kitchen\r\nfloor: 3\r\nopen: true\r\n'
)
KIOSK = Expected(
    "When does the kiosk open?",
    ("The kiosk opens at ten.",),
    ("Kiosk: hours",),
    (*YAML, "team:"),
    {"tags": "cash only", "team": "kitchen", "floor": 3, "open": True},
)
MADE = {
    "koi8 raw": Made(KOI8.encode("koi8-r"), 'Text/Plain; Charset="KOI8-R"', PLAIN_KOI8),
    "koi8 form": Made(KOI8.encode("koi8-r"), "text/plain; charset=koi8-r", PLAIN_KOI8, "form"),
    "koi8 batch": Made(KOI8.encode("koi8-r"), "text/plain;charset=cskoi8r", PLAIN_KOI8, "batch"),
    "polish": Made(POLISH.texts[0].encode("iso-8859-2"), "text/markdown; charset=latin2", POLISH),
    "table.csv": Made(
        f"name;city\nAda;{KOI8}\n".replace(";", ",").encode("windows-1251"), "text/csv; charset=cp1251", PLAIN_KOI8
    ),
    "feed.xml": Made(
        f"<?xml version='1.0' encoding='koi8-r'?><rss><channel><title>{KOI8}</title></channel></rss>".encode("koi8-r"),
        "application/rss+xml",
        PLAIN_KOI8,
    ),
    "declared over meta": Made(
        f'<meta charset="windows-1252"><p>{KOI8}</p>'.encode("koi8-r"), "text/html; charset=koi8-r", PLAIN_KOI8
    ),
    "text in json": Made(
        f'<meta charset="windows-1252"><p>{KOI8}</p>'.encode(), "text/html; charset=latin1", PLAIN_KOI8, "json"
    ),
    "mark over declared": Made(f"\ufeff{KOI8}".encode("utf-16-be"), "text/plain; charset=latin1", PLAIN_KOI8),
    "undeclared utf8": Made(KOI8.encode(), "text/plain", PLAIN_KOI8),
    "undeclared latin1": Made(
        "El niño comió en España.".encode("latin-1"),
        "text/plain",
        Expected("¿Dónde comió el niño?", ("El niño comió en España.",)),
    ),
    "not as declared": Made("Zürich".encode("latin-1"), "text/plain; charset=utf-8", Expected(reason="not utf-8")),
    "kiosk.md": Made(f"---\r\n{FRONT}---\r\nThe kiosk opens at ten.\r\n".encode("utf-8-sig"), "text/markdown", KIOSK),
    "kiosk dots": Made(f"---\n{FRONT}...\nThe kiosk opens at ten.\n".encode(), "text/markdown", KIOSK),
    "kiosk toml": Made(
        b'+++\ntitle = "Kiosk: hours"\ntags = ["lunch", "cash only"]\nteam = "kitchen"\nfloor = 3\nopen = true\n+++\n'
        b"The kiosk opens at ten.\n",
        "text/markdown",
        KIOSK,
    ),
    "sender wins": Made(
        f"---\n{FRONT}---\nThe kiosk opens at ten.\n".encode(),
        "text/markdown",
        Expected(
            "When does the kiosk open?",
            ("The kiosk opens at ten.",),
            ("Given",),
            YAML,
            {"team": "board", "tags": "lunch", "floor": 3},
        ),
        headers={"Freshline-Title": "Given", "Freshline-Metadata": '{"team": "board"}'},
    ),
    "no mapping": Made(
        b"---\ntitle: a: b\n---\nThe numbat is fed at six.\n",
        "text/markdown",
        Expected("When is the numbat fed?", ("title: a: b", "The numbat is fed at six.")),
    ),
    "far too much": Made(
        b"---\n" + b"".join(b"k%d: %s\n" % (n, b"x" * 990) for n in range(30)) + b"---\nThe bilby is fed at five.\n",
        "text/markdown",
        Expected("When is the bilby fed?", ("The bilby is fed at five.",), (), ("k1:", "k29"), {"k0": "x" * 990}),
    ),
}
"""Name → input. They do not require the collection."""


@dataclass(frozen=True)
class Sent:
    """Outcome of a document and its searchable passages."""

    document_id: str
    ended: Mapping[str, Any]
    state: Mapping[str, Any]


def reported() -> dict[str, Made]:
    if not REPORTS.exists():
        return {}
    with (REPORTS / "manifest.tsv").open(encoding="utf-8") as lines:
        rows = {name: row["send as"] for row in csv.DictReader(lines, delimiter="\t") for name in row["file"].split()}
    return {
        name: Made((REPORTS / name).read_bytes(), "" if rows[name] == "by name" else rows[name], expected)
        for name, expected in REPORTED.items()
    }


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(stack, {"FRESHLINE_KAFKA__PARTITIONS": "4"}) as running:
        yield running


@pytest.fixture
async def services(installation: BenchInstallation) -> AsyncIterator[Services]:
    async with connect_services(installation.settings) as connected:
        yield connected


@pytest.fixture(scope="module")
async def sent(installation: BenchInstallation) -> Mapping[str, Sent]:
    """All documents of both tables, sent and processed."""
    free = asyncio.Semaphore(8)

    async def follow(name: str, made: Made) -> Sent:
        async with free:
            event = await send(client, name, made)
            ended = await services.ended(event)
            return Sent(name, ended, {} if made.expected.reason else await services.document(name))

    everything = reported() | MADE
    async with (
        connect_services(installation.settings) as services,
        httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client,
    ):
        followed = await asyncio.gather(*(follow(name, made) for name, made in everything.items()))
    return dict(zip(everything, followed, strict=True))


async def send(client: httpx.AsyncClient, name: str, made: Made) -> str:
    """Upload the input; returns the id of the event."""
    path, declared = f"/v1/documents/{name}", {"Content-Type": made.send_as} if made.send_as else {}
    match made.way:
        case "form":
            response = await client.put(path, files={"file": (name, made.content, made.send_as)})
        case "json":
            response = await client.put(path, json={"text": made.content.decode(), "content_type": made.send_as})
        case "batch":
            content = base64.b64encode(made.content).decode()
            line = orjson.dumps({"document_id": name, "content_b64": content, "content_type": made.send_as})
            batch = {"Content-Type": "application/x-ndjson"}
            response = await client.post("/v1/documents:batch", content=line, headers=batch)
            return response.json()["outcomes"][0]["accepted"]["event_id"]
        case _:
            response = await client.put(path, content=made.content, headers=declared | dict(made.headers))
            if not made.content:  # an empty document must be declared, which protects against accidental emptying
                assert response.status_code == 422, response.text
                assert "empty=true" in response.text
                response = await client.put(path, params={"empty": "true"}, headers=declared | dict(made.headers))
    assert response.status_code == 202, response.text
    return response.json()["event_id"]


async def found(services: Services, name: str, expected: Expected, **filters: object) -> list[dict[str, Any]]:
    answer = await services.ask(expected.question, filters={"document_id": name, **filters}, top_k=20)
    return answer["results"]


async def assert_holds(services: Services, name: str, expected: Expected, sent: Sent) -> None:
    if expected.reason:
        assert sent.ended["outcome"] == "dead_letter", sent.ended
        assert expected.reason in sent.ended["reason"]
        return
    assert sent.ended["outcome"] == "done", sent.ended
    if expected.passages is not None:
        assert sent.state["chunks"] == sent.ended["passages"] == expected.passages
        assert bool(sent.ended["reason"]) is (expected.passages == 0), "a document without passages has a reason"
    if not expected.question:
        return
    results = await found(services, name, expected)
    text, titles = "\n".join(result["text"] for result in results), {result["title"] for result in results}
    for wanted in expected.texts:
        assert wanted in text
    for unwanted in expected.absent:
        assert unwanted not in text
        assert not any(unwanted in (title or "") for title in titles)
    assert titles
    assert not expected.titles or titles <= set(expected.titles)
    for field_name, value in expected.metadata.items():
        assert len(await found(services, name, expected, **{f"metadata.{field_name}": value})) == len(results)
        assert await found(services, name, expected, **{f"metadata.{field_name}": "another"}) == []


@pytest.mark.parametrize("name", MADE)
async def test_made_input(services: Services, sent: Mapping[str, Sent], name: str):
    await assert_holds(services, name, MADE[name].expected, sent[name])


@pytest.mark.parametrize("name", REPORTED)
async def test_reported_input(services: Services, sent: Mapping[str, Sent], name: str):
    if name not in sent:
        pytest.skip("../shared/corpora/reports is not here")
    await assert_holds(services, name, REPORTED[name], sent[name])


async def test_an_edit_of_front_matter_alone_changes_what_filters_find(
    installation: BenchInstallation, services: Services
):
    """The texts of the passages do not change, their attributes do."""
    async with httpx.AsyncClient(base_url=installation.ingest_url, timeout=60) as client:
        for tag, other in (("draft", "final"), ("final", "draft")):
            made = Made(f"---\ntags: [{tag}]\n---\nThe dingo fence is long.\n".encode(), "text/markdown", Expected())
            ended = await services.ended(await send(client, "dingo.md", made))
            assert ended["outcome"] == "done"
            expected = Expected("How long is the dingo fence?")
            assert len(await found(services, "dingo.md", expected, **{"metadata.tags": tag})) == 1
            assert await found(services, "dingo.md", expected, **{"metadata.tags": other}) == []
