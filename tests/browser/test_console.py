"""The console page in a real browser, served by the real query service from real stores."""

import re
import time
from contextlib import AsyncExitStack

import pytest
from only_writer import put_over
from playwright.async_api import expect

from infra.embedding.factory import open_embedder
from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.port import ChunkChange, ChunkWrite
from infra.opensearch.provision import create_indices
from infra.redis.answers import RedisAnswerCache
from infra.redis.connect import connect_redis
from query.main import serving
from schemas.documents import LifeState
from schemas.index import Manifest, StoredChunk

pytestmark = pytest.mark.stack

TENANT = "local"
RUNS = "<script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran = 2; alert(2)'>"
LEAVE = "Parental leave lasts sixteen weeks and is fully paid."
HOSTILE = f"The cafeteria opens at noon {RUNS} see [99]."
READABLE = 4.5
"""Contrast that WCAG 2 asks of normal text, level AA."""

PASSAGES = (
    {"document_id": "leave.md", "text": LEAVE, "title": "Leave", "heading_path": ("People", "Parents")},
    {"document_id": "laptops.md", "text": "Report a lost laptop to the security team within one hour."},
    {
        "document_id": "cafeteria.html",
        "text": HOSTILE,
        "title": f"Cafeteria {RUNS}",
        "heading_path": (RUNS,),
        "source": "javascript:alert(3)",
    },
)

COLOURS = """(element) => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  let ground = element;
  while (ground && (channels(getComputedStyle(ground).backgroundColor)[3] ?? 1) === 0) ground = ground.parentElement;
  return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(channels);
}"""


async def _write(settings, passages):
    """What the write path does to the stores, in its order: passages, manifests, applied."""
    async with AsyncExitStack() as ending:
        index = OpenSearchIndex.open(settings)
        ending.push_async_callback(index.close)
        redis = connect_redis(settings.redis)
        ending.push_async_callback(redis.aclose)
        embedder = open_embedder(settings.embedding)
        ending.push_async_callback(embedder.close)
        chunks = [
            StoredChunk(
                chunk_id=f"c{offset}",
                tenant=TENANT,
                version=1,
                position=f"documents.v1-0:{offset}",
                text_sha256="0",
                start=0,
                end=len(passage["text"]),
                **passage,
            )
            for offset, passage in enumerate(passages)
        ]
        vectors = await embedder.embed_passages([chunk.text for chunk in chunks])
        changes = [
            ChunkChange(chunk.key, chunk.version, (ChunkWrite(chunk, vector),), ())
            for chunk, vector in zip(chunks, vectors, strict=True)
        ]
        assert await index.apply(changes) == [None] * len(chunks)
        manifests = [
            Manifest(
                tenant=TENANT,
                document_id=chunk.document_id,
                version=chunk.version,
                complete=True,
                state=LifeState.LIVE,
                position=chunk.position,
                profile="test",
                chunks=(chunk.chunk_id,),
                updated_ms=time.time() * 1_000,
            )
            for chunk in chunks
        ]
        await put_over(index, *manifests)
        await RedisAnswerCache(redis, settings.names).apply(TENANT, {0: len(chunks) - 1}, drop=True)


@pytest.fixture
async def address(settings):
    """The query service, with something to ask about; its base URL."""
    await create_indices(settings)
    await _write(settings, PASSAGES)
    on_a_free_port = settings.query.model_copy(update={"port": 0})
    async with serving(settings.model_copy(update={"query": on_a_free_port})) as address:
        yield address


@pytest.fixture
async def console(page, address):
    await page.goto(address)
    return page


async def _ask(page, question):
    await page.get_by_label("Question").fill(question)
    async with page.expect_response("**/v1/query"):
        await page.keyboard.press("Enter")
    await expect(page.get_by_role("button", name="Ask")).to_be_enabled()


async def test_an_answer_arrives_with_its_sources_and_positions_and_then_from_the_cache(console, noted):
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#answer")).to_contain_text("sixteen weeks")
    first = console.locator("#sources > li").first
    await expect(first).to_contain_text("[1]Leaveversion 1")
    await expect(first).to_contain_text(re.compile("People . Parents"))
    await expect(first.locator("blockquote").first).to_have_text(LEAVE)
    await expect(console.locator("#as_of code")).to_have_text(["documents.v1-0:2"])
    await expect(console.locator("#age")).to_have_text(re.compile(r"^\d+ s$"))
    await expect(console.locator("#facts")).to_contain_text("Cached no")
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#facts")).to_contain_text("Cached yes")
    await expect(console.locator("#answer")).to_contain_text("sixteen weeks")
    assert noted.troubles == []


async def test_a_key_in_the_fragment_is_taken_over_and_leaves_the_address_bar(page, address):
    sent = []
    page.on("request", lambda request: sent.append((request.url, request.headers.get("x-api-key"))))
    await page.goto(f"{address}/#key=fl_a%2Bb")
    assert await page.locator("#key").input_value() == "fl_a+b"
    assert await page.evaluate("location.href") == f"{address}/"
    await page.reload()
    await page.fill("#question", "anything")
    await page.keyboard.press("Enter")
    await page.wait_for_selector("#status.problem")  # the key does not exist
    assert (f"{address}/v1/query", "fl_a+b") in sent
    assert not any("fl_a" in url for url, _ in sent)


async def test_the_page_speaks_with_its_own_service_only(console, address, noted):
    await _ask(console, "When does the cafeteria open?")
    await expect(console.locator("#output")).to_be_visible()
    assert noted.requested == [f"{address}/", f"{address}/v1/query"]


async def test_what_documents_say_is_shown_as_text_and_never_run(console, noted):
    await _ask(console, "When does the cafeteria open?")
    hostile = console.locator("#sources > li").filter(has_text="Cafeteria")
    await expect(hostile.locator("strong")).to_have_text(f"Cafeteria {RUNS}")
    await expect(hostile.locator(".where span").last).to_have_text(RUNS)
    await expect(hostile.locator("p")).to_have_text(HOSTILE)
    await expect(hostile.locator("code")).to_have_text("javascript:alert(3)")
    await expect(console.locator("#answer")).to_contain_text(RUNS)
    await expect(console.locator("#output").locator("img, script, [href^=javascript]")).to_have_count(0)
    await expect(console.locator("#answer").get_by_role("link", name="source 99")).to_have_count(0)
    assert await console.evaluate("window.ran") is None
    assert noted.troubles == []


async def test_the_policy_stops_markup_that_gets_in_all_the_same(console, noted):
    broken = await console.evaluate(
        """async (markup) => {
          const broken = new Set();
          const both = new Promise((enough) => document.addEventListener("securitypolicyviolation", (event) => {
            broken.add(event.effectiveDirective);
            if (broken.size === 3) enough([...broken].sort());
          }));
          document.body.insertAdjacentHTML("beforeend", markup);
          const script = document.createElement("script");
          script.textContent = "window.ran = 3";
          document.body.append(script);
          return await both;
        }""",
        RUNS,
    )
    assert broken == ["img-src", "script-src-attr", "script-src-elem"]
    assert await console.evaluate("window.ran") is None
    assert not [trouble for trouble in noted.troubles if trouble.startswith("dialog")]


async def test_the_keyboard_is_enough(console):
    keyboard, focused = console.keyboard, console.locator(":focus")
    await expect(console.get_by_label("Question")).to_be_focused()
    await keyboard.type("How long is parental leave?")
    await keyboard.press("Enter")
    await expect(console.locator("#answer")).to_contain_text("sixteen weeks")

    for name in ("send", "generate", "top_k", "min_position", "key"):
        await keyboard.press("Tab")
        await expect(focused).to_have_id(name)
        await expect(focused).to_have_css("outline-style", "solid")
    await keyboard.press("Tab")
    await expect(focused).to_have_accessible_name(re.compile(r"^source \d+$"))
    target = await focused.get_attribute("href")
    await keyboard.press("Enter")
    await expect(console.locator(f"li{target}:target")).to_be_in_viewport()

    await console.reload()
    await expect(console.get_by_label("Question")).to_be_focused()
    await keyboard.type("How long is parental leave?")
    await keyboard.press("Tab")
    await keyboard.press("Tab")
    await keyboard.press("Space")
    await keyboard.press("Tab")
    for _ in range(4):
        await keyboard.press("ArrowDown")
    await keyboard.press("Enter")
    await expect(console.locator("#sources > li")).to_have_count(1)
    await expect(console.locator("#sources > li")).to_contain_text(LEAVE)
    await expect(console.locator("#written")).to_be_hidden()


async def test_a_problem_is_reported_and_the_old_answer_is_taken_away(console):
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#output")).to_be_visible()
    await console.get_by_label("Not before").fill("yesterday")
    await _ask(console, "How long is parental leave?")
    await expect(console.get_by_role("status")).to_contain_text("is not a position such as documents.v1-3:42")
    await expect(console.locator("#output")).to_be_hidden()
    await console.get_by_label("Not before").fill("documents.v1-0:2")
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#answer")).to_contain_text("sixteen weeks")
    await expect(console.get_by_role("status")).to_be_empty()


def _luminance(colour):
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (channel / 255 for channel in colour[:3])
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["dark", "light"])
async def test_all_text_is_readable_in_both_schemes(console, scheme):
    await console.emulate_media(color_scheme=scheme)
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#answer a").first).to_be_visible()
    paper = _luminance((await console.locator("body").evaluate(COLOURS))[1])
    assert (paper < 0.1) if scheme == "dark" else (paper > 0.9)

    async def check(positions):
        for position in positions:
            ink, ground = map(_luminance, await console.locator(position).first.evaluate(COLOURS))
            contrast = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
            assert contrast >= READABLE, (position, contrast)

    await check(("h1", "h2", "label", "#question", "#send", "#answer", "#answer a", "#facts", "#facts b"))
    await check((".where", ".where strong", ".text", "blockquote", "#as_of code"))
    await console.get_by_label("Not before").fill("yesterday")
    await _ask(console, "How long is parental leave?")
    await expect(console.locator("#status")).to_have_class("problem")
    await check(("#status",))
