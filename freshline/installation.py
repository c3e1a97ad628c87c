"""The local installation: servers and application under one supervisor, and how commands find them."""

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from aiokafka.errors import KafkaError
from pydantic import BaseModel, ConfigDict

from infra.kafka.provision import StreamAdmin
from infra.local import AppProcess, Phase, Stack, StackConfig, StackError, default_data_dir
from infra.settings import Settings
from streams.topology import StepName

PREFIX: Final = "FRESHLINE_"

_FILE: Final = "installation.json"
_PREFERRED_PORTS: Final = {"ingest": 8081, "query": 8080}
_KEY: Final = "FRESHLINE_TENANT__API_KEY"
_TARGETS: Final = "FRESHLINE_WEBHOOKS__TARGETS"
_THREADS: Final = "FRESHLINE_EMBEDDING__THREADS"
_SERVERS: Final = frozenset({"FRESHLINE_KAFKA__BOOTSTRAP_SERVERS", "FRESHLINE_OPENSEARCH__URL", "FRESHLINE_REDIS__URL"})
_JOIN_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.05


class NotRunning(Exception):
    """No installation is to be found; the message says how to start one."""


class Installation(BaseModel):
    """What a command needs to know of the local installation. The file holds its key, so only its owner may read it.

    Attributes:
        api_key: made once for each data directory.
        told: settings that the environment had when it was started, the namespace for example; commands follow them.
    """

    model_config = ConfigDict(frozen=True)

    api_key: str
    ingest_port: int
    query_port: int
    told: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """The settings of its processes, beside those that the servers' addresses give."""
        return self.told | {
            _KEY: self.api_key,
            # On this machine receivers are too, and whoever uses it reaches its loopback anyway.
            _TARGETS: self.told.get(_TARGETS, "local"),
            "FRESHLINE_INGEST__PORT": str(self.ingest_port),
            "FRESHLINE_QUERY__PORT": str(self.query_port),
        }


def plan(
    data_dir: Path | None,
    *,
    nodes: int = 1,
    ports: Mapping[str, int] | None = None,
    servers_only: bool = False,
    told: Mapping[str, str] | None = None,
) -> tuple[StackConfig, Installation]:
    """What to run: the servers, and unless only they are wanted, ingest, query and one worker for each step.

    Args:
        data_dir: where; by default the user's.
        nodes: see ``StackConfig``.
        ports: by name, for the services too; others are remembered ones, defaults or free ones.
        servers_only: without the application.
        told: settings of the application that win over the environment's.

    Raises:
        StackError: it runs already, with another port than told.
    """
    home = data_dir or default_data_dir()
    known = _read(home)
    ports = _told_ports() | dict(ports or {})
    if known is not None and is_up(Stack.open(StackConfig(data_dir=home))):
        installation = known
        for name, port in (("ingest", known.ingest_port), ("query", known.query_port)):
            if ports.get(name, port) != port:
                raise StackError(f"the installation in {home} runs with {name} on port {port}; end it first")
    else:
        installation = Installation(
            api_key=os.environ.get(_KEY) or (known.api_key if known else secrets.token_urlsafe(24)),
            ingest_port=_port("ingest", ports, known.ingest_port if known else None),
            query_port=_port("query", ports, known.query_port if known else None),
            told={name: value for name, value in os.environ.items() if _is_setting(name)} | dict(told or {}),
        )
    config = StackConfig(
        nodes=3 if nodes == 3 else 1,  # noqa: PLR2004 - the two layouts there are
        data_dir=home,
        ports={name: port for name, port in ports.items() if name not in _PREFERRED_PORTS},
        apps=() if servers_only else _apps(installation),
    )
    return config, installation


def is_up(stack: Stack) -> bool:
    """Whether somebody runs it, or is about to."""
    return stack.status().state not in {Phase.STOPPED, Phase.FAILED}


def remember(data_dir: Path, installation: Installation) -> None:
    """Write down how to reach the installation, for its owner alone."""
    data_dir.mkdir(parents=True, exist_ok=True)
    file = data_dir / _FILE
    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(installation.model_dump_json())
    partial.replace(file)


def find(data_dir: Path | None = None) -> Settings:
    """Settings of the installation that a command acts on.

    A ``data_dir`` that is named wins; then what the environment says; and for the rest, the user's local installation
    is asked if it runs. It is not where the environment names servers, as it does for the processes of an installation
    and for a deployment elsewhere.

    Raises:
        NotRunning: nothing runs in the ``data_dir`` that was named.
    """
    if data_dir is None and not _SERVERS.isdisjoint(os.environ):
        return Settings()
    home = data_dir or default_data_dir()
    status = Stack.open(StackConfig(data_dir=home)).status()
    known = _read(home)
    if status.state is Phase.READY and known is not None:
        told = known.environment | dict(status.environment)
        return settings_from(told if data_dir else {name: told[name] for name in told.keys() - os.environ.keys()})
    if data_dir is not None:
        raise NotRunning(f"nothing runs in {home} ({status.state}): start it with `freshline up --data {home}`")
    return Settings()


async def await_workers(settings: Settings, stack: Stack) -> None:
    """Wait until each step has a worker with partitions: the first event then does not wait for one.

    Raises:
        StackError: a worker does not come up; the message has the end of its log.
    """
    try:
        async with asyncio.timeout(_JOIN_TIMEOUT_S), StreamAdmin(settings) as admin:
            for step in StepName:
                while not await _is_consumed(admin, settings.names.group(step)):
                    _check_processes(stack)
                    await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise StackError(
            f"a worker has not joined its group after {_JOIN_TIMEOUT_S:.0f} s; see the logs in {_logs(stack)}"
        ) from None


async def _is_consumed(admin: StreamAdmin, group: str) -> bool:
    try:
        return await admin.is_consumed(group)
    except KafkaError:  # a broker that has just started has no coordinator yet
        return False


def _check_processes(stack: Stack) -> None:
    status = stack.status()
    for process in status.processes:
        if process.state is Phase.FAILED:
            raise StackError(process.error or f"{process.name} failed; see the logs in {_logs(stack)}")
    if status.state is not Phase.READY:
        raise StackError(status.error or f"the installation is {status.state}")


def _logs(stack: Stack) -> Path:
    return stack.config.data_dir / "logs"


def _apps(installation: Installation) -> tuple[AppProcess, ...]:
    environment = installation.environment
    # Questions are short, and should not have to share the cores with passages more than they must.
    threads = {_THREADS: installation.told.get(_THREADS, str(max(1, (os.cpu_count() or 1) // 2)))}
    workers = [
        AppProcess(name=str(step), argv=_command("worker", str(step)), env={_THREADS: "0"} | environment)
        for step in StepName
    ]
    services = [
        AppProcess(
            name=name,
            argv=_command("serve", name),
            env=environment | threads,
            ready_url=f"http://127.0.0.1:{port}/ready",
        )
        for name, port in (("ingest", installation.ingest_port), ("query", installation.query_port))
    ]
    return (*workers, *services)


def _command(*arguments: str) -> tuple[str, ...]:
    # -P: the directory that one happens to be in is no place to import from.
    return (sys.executable, "-P", "-m", "freshline", *arguments)


def _told_ports() -> dict[str, int]:
    told = {name: os.environ.get(f"{PREFIX}{name.upper()}__PORT", "") for name in _PREFERRED_PORTS}
    return {name: int(port) for name, port in told.items() if port.isdecimal() and int(port)}


def _is_setting(name: str) -> bool:
    section = name.removeprefix(PREFIX).partition("__")[0].lower()
    return name.startswith(PREFIX) and name not in _SERVERS and section in Settings.model_fields


def settings_from(told: Mapping[str, str]) -> Settings:
    """Settings that a process with these variables has; the present environment fills in the rest."""
    nested: dict[str, Any] = {}
    for name, value in told.items():
        *sections, field = name.removeprefix(PREFIX).lower().split("__")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return Settings(**nested)


def _read(home: Path) -> Installation | None:
    try:
        return Installation.model_validate_json((home / _FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _port(name: str, told: Mapping[str, int], remembered: int | None) -> int:
    """The port told, else the one of the last run, else the default, else a free one."""
    if name in told:
        if _bound(told[name]) is None:
            raise StackError(f"port {told[name]} for {name} is in use; free it or choose another")
        return told[name]
    for candidate in (remembered, _PREFERRED_PORTS[name], 0):
        if candidate is not None and (port := _bound(candidate)) is not None:
            return port
    raise StackError("no free port on 127.0.0.1")


def _bound(port: int) -> int | None:
    """The port that binding gives, None where it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return None
        return int(probe.getsockname()[1])
