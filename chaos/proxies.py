"""Toxiproxy between workers and stores, controlled over HTTP."""

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
    # Packets are lost in both directions; connections stay open.
    Kind.TIMEOUT: tuple(
        {"type": "timeout", "stream": stream, "attributes": {"timeout": 0}} for stream in ("upstream", "downstream")
    ),
    # Requests arrive and take effect; replies are lost.
    Kind.HALF_OPEN: ({"type": "timeout", "stream": "downstream", "attributes": {"timeout": 0}},),
}
_START_S: Final = 10.0
_POLL_S: Final = 0.02


class Proxies:
    """A running toxiproxy. Created by ``Proxies.start``."""

    def __init__(self, process: asyncio.subprocess.Process, client: httpx.AsyncClient) -> None:
        self._process = process
        self._client = client

    @classmethod
    async def start(cls, program: Path, port: int, links: Mapping[str, tuple[int, int]], home: Path) -> "Proxies":
        """Start toxiproxy. It ends with this process in any case.

        Args:
            program: toxiproxy-server.
            port: port of its HTTP API.
            links: name → (listening port, upstream port).
            home: directory of its configuration and log.
        """
        file = home / "proxies.json"
        configuration = [
            {"name": name, "listen": f"127.0.0.1:{listen}", "upstream": f"127.0.0.1:{upstream}", "enabled": True}
            for name, (listen, upstream) in links.items()
        ]
        await asyncio.to_thread(file.write_bytes, orjson.dumps(configuration))
        command = Command((str(program), "-host", "127.0.0.1", "-port", str(port), "-config", str(file)))
        process = await spawn(command, home / "toxiproxy.log")
        started = cls(process, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=5, trust_env=False))
        try:
            async with asyncio.timeout(_START_S):
                while len(await started._listed()) < len(links):  # noqa: ASYNC110 - no notification
                    await asyncio.sleep(_POLL_S)
        except BaseException:
            await started.close()
            raise
        return started

    async def inject(self, name: str, kind: Kind) -> None:
        """Add the toxics of a fault to all present and future connections of a proxy."""
        for toxic in _TOXICS[kind]:
            (await self._client.post(f"/proxies/{name}/toxics", json=toxic)).raise_for_status()

    async def reset(self) -> None:
        """Remove all toxics."""
        (await self._client.post("/reset")).raise_for_status()

    async def close(self) -> None:
        """Stop toxiproxy."""
        await self._client.aclose()
        await end(self._process, 2)

    async def _listed(self) -> dict[str, Any]:
        try:
            return dict((await self._client.get("/proxies")).json())
        except httpx.TransportError:
            return {}
