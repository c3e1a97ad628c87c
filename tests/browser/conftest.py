"""A real headless Chromium of the system, and pages of it that note everything they do."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Browser, Page, async_playwright, expect

expect.set_options(timeout=15_000)

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def _find() -> str | None:
    return next(filter(None, map(shutil.which, _NAMES)), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's browser; a Debian run by root, such as a build machine, gets one where it has none."""
    if found := _find():
        return found
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"no browser: install one of {', '.join(_NAMES)}")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
        done = subprocess.run(
            ["apt-get", "-qq", *command], env=quiet, capture_output=True, text=True, check=False, timeout=240
        )
        if done.returncode:
            pytest.skip(f"no browser, and apt-get cannot install chromium: {done.stderr.strip()[-300:]}")
    found = _find()
    assert found, "apt-get installed chromium, but no program of that name is on the PATH"
    return found


@pytest.fixture(scope="session")
async def browser(chromium: str) -> AsyncIterator[Browser]:
    # Chromium's sandbox refuses to run as root.
    flags = (*_FLAGS, "--no-sandbox") if os.geteuid() == 0 else _FLAGS
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=chromium, args=list(flags)) as browser,
    ):
        yield browser


@dataclass
class Noted:
    """What a page did.

    Attributes:
        troubles: dialogs, uncaught errors, and errors and warnings of the browser's console, which also lists
            breaches of the content security policy.
        requested: addresses of all requests.
    """

    troubles: list[str] = field(default_factory=list)
    requested: list[str] = field(default_factory=list)


@pytest.fixture
def noted() -> Noted:
    return Noted()


@pytest.fixture
async def page(browser: Browser, noted: Noted) -> AsyncIterator[Page]:
    async with await browser.new_context() as context:
        page = await context.new_page()

        async def refuse(dialog):
            noted.troubles.append(f"dialog: {dialog.message}")
            await dialog.dismiss()

        page.on("dialog", refuse)
        page.on("pageerror", lambda error: noted.troubles.append(f"error: {error}"))
        page.on(
            "console",
            lambda message: (
                noted.troubles.append(f"{message.type}: {message.text}")
                if message.type in {"error", "warning"}
                else None
            ),
        )
        context.on("request", lambda request: noted.requested.append(request.url))
        yield page
