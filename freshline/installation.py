"""The local installation: servers and application under one supervisor, and how commands find them."""

import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from infra.local import AppProcess, Phase, Stack, StackConfig, default_data_dir
from infra.settings import Settings
from streams.topology import StepName

_FILE: Final = "installation.json"
_PREFERRED_PORTS: Final = {"ingest": 8081, "query": 8080}


class NotRunning(Exception):
    """No installation is to be found; the message says how to start one."""


class Installation(BaseModel):
    """What a command needs to know of the local installation. The file holds its key, so only its owner may read it."""

    model_config = ConfigDict(frozen=True)

    api_key: str
    ingest_port: int
    query_port: int

    def environment(self, data_dir: Path) -> dict[str, str]:
        """The settings of its processes, beside those of the servers."""
        return {
            "FRESHLINE_TENANT__API_KEY": self.api_key,
            "FRESHLINE_INGEST__PORT": str(self.ingest_port),
            "FRESHLINE_QUERY__PORT": str(self.query_port),
            "FRESHLINE_BLOBS__PATH": str(data_dir / "blobs"),
        }


def plan(
    data_dir: Path | None, *, nodes: int, ports: Mapping[str, int], fresh: bool
) -> tuple[StackConfig, Installation]:
    """What to run: the servers, and unless only they are wanted, ingest, query and one worker for each step."""
    home = data_dir or default_data_dir()
    known = None if fresh else _read(home)
    installation = Installation(
        api_key=known.api_key if known else secrets.token_urlsafe(24),
        ingest_port=_port("ingest", ports, known.ingest_port if known else None),
        query_port=_port("query", ports, known.query_port if known else None),
    )
    environment = installation.environment(home)
    serve = {
        name: AppProcess(
            name=name,
            argv=(sys.executable, "-m", "freshline", "serve", name),
            env=environment,
            ready_url=f"http://127.0.0.1:{port}/ready",
        )
        for name, port in (("ingest", installation.ingest_port), ("query", installation.query_port))
    }
    workers = [
        AppProcess(name=str(step), argv=(sys.executable, "-m", "freshline", "worker", str(step)), env=environment)
        for step in StepName
    ]
    server_ports = {name: port for name, port in ports.items() if name not in _PREFERRED_PORTS}
    config = StackConfig(
        nodes=3 if nodes == 3 else 1,  # noqa: PLR2004 - the two layouts there are
        data_dir=home,
        ports=server_ports,
        apps=(*workers, *serve.values()),
    )
    return config, installation


def remember(data_dir: Path, installation: Installation) -> None:
    """Write down how to reach the installation."""
    file = data_dir / _FILE
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(installation.model_dump_json())
    partial.replace(file)


def find(data_dir: Path | None = None) -> Settings:
    """Settings of the installation that commands act on: what the environment says, else the running local one.

    Raises:
        NotRunning: see there.
    """
    if data_dir is None and any(name.startswith("FRESHLINE_") and "__" in name for name in os.environ):
        return Settings()
    home = data_dir or default_data_dir()
    status = Stack.open(StackConfig(data_dir=home)).status()
    known = _read(home)
    if status.state is not Phase.READY or known is None:
        raise NotRunning(
            f"nothing runs in {home}: start it with `freshline up`, or set FRESHLINE_… to reach another one"
        )
    told = dict(status.environment) | known.environment(home)
    before = dict(os.environ)
    try:
        os.environ.update(told)
        return Settings()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _read(home: Path) -> Installation | None:
    try:
        return Installation.model_validate_json((home / _FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _port(name: str, told: Mapping[str, int], remembered: int | None) -> int:
    """The port told, else the one of the last run, else the default, else a free one."""
    if name in told:
        return told[name]
    for candidate in (remembered, _PREFERRED_PORTS[name], 0):
        if candidate is None:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", candidate))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise NotRunning("no free port on 127.0.0.1")
