"""Toxiproxy between workers and stores: a program of its own, told over HTTP what to do to connections."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

from chaos.schedule import Kind
from infra.local.processes import end, spawn
from infra.local.servers import Command

_TOXICS: Final[Mapping[Kind, tuple[dict[str, Any], ...]]] = {
    Kind.LATENCY: ({"type": "latency", "stream": "downstream", "attributes": {"latency": 700, "jitter": 300}},),
    Kind.RESET: ({"type": "reset_peer", "stream": "downstream", "attributes": {"timeout": 50}},),
    # Nothing passes in either direction, and nobody is told.
    Kind.TIMEOUT: tuple(
        {"type": "timeout", "stream": stream, "attributes": {"timeout": 0}} for stream in ("upstream", "downstream")
    ),
    # Requests arrive and take effect; no reply ever comes.
    Kind.HALF_OPEN: ({"type": "timeout", "stream": "downstream", "attributes": {"timeout": 0}},),
}
_START_S: Final = 10.0
_POLL_S: Final = 0.02


class Proxies:
    """A running toxiproxy. Make one with ``Proxies.start``."""

    def __init__(self, process: asyncio.subprocess.Process, client: httpx.AsyncClient) -> None:
        self._process = process
        self._client = client

    @classmethod
    async def start(cls, program: Path, port: int, links: Mapping[str, tuple[int, int]], home: Path) -> "Proxies":
        """Start it; it ends with this process, however that ends.

        Args:
            program: toxiproxy's server.
            port: where it is told what to do.
            links: name → port that it listens on, and port that it passes connections on to.
            home: where its configuration and its log go.
        """
        file = home / "proxies.json"
        told = [
            {"name": name, "listen": f"127.0.0.1:{listen}", "upstream": f"127.0.0.1:{upstream}", "enabled": True}
            for name, (listen, upstream) in links.items()
        ]
        await asyncio.to_thread(file.write_bytes, orjson.dumps(told))
        command = Command((str(program), "-host", "127.0.0.1", "-port", str(port), "-config", str(file)))
        process = await spawn(command, home / "toxiproxy.log")
        started = cls(process, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5, trust_env=False))
        try:
            async with asyncio.timeout(_START_S):
                while len(await started._listed()) < len(links):  # noqa: ASYNC110 - it does not tell
                    await asyncio.sleep(_POLL_S)
        except BaseException:
            await started.close()
            raise
        return started

    async def spoil(self, name: str, kind: Kind) -> None:
        """Do this to all connections of a proxy, those there are and those to come."""
        for toxic in _TOXICS[kind]:
            (await self._client.post(f"/proxies/{name}/toxics", json=toxic)).raise_for_status()

    async def mend(self) -> None:
        """Let everything pass again."""
        (await self._client.post("/reset")).raise_for_status()

    async def close(self) -> None:
        """End it."""
        await self._client.aclose()
        await end(self._process, 2)

    async def _listed(self) -> dict[str, Any]:
        try:
            return dict((await self._client.get("/proxies")).json())
        except httpx.TransportError:
            return {}
