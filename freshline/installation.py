"""The local installation: servers and application under one supervisor, and its discovery by commands."""

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
    """No installation was found. The message describes how to start one."""


class Installation(BaseModel):
    """Parameters of the local installation. Its file contains the API key, so only its owner can read it.

    Attributes:
        api_key: generated once per data directory.
        overrides: settings from the environment in which it was started; commands use them too.
    """

    model_config = ConfigDict(frozen=True)

    api_key: str
    ingest_port: int
    query_port: int
    overrides: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """Settings of its processes, without the addresses of the servers."""
        return self.overrides | {
            _KEY: self.api_key,
            # Local webhook receivers are allowed: local users can reach the loopback interface anyway.
            _TARGETS: self.overrides.get(_TARGETS, "local"),
            "FRESHLINE_INGEST__PORT": str(self.ingest_port),
            "FRESHLINE_QUERY__PORT": str(self.query_port),
        }


def plan(
    data_dir: Path | None,
    *,
    nodes: int = 1,
    ports: Mapping[str, int] | None = None,
    servers_only: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> tuple[StackConfig, Installation]:
    """Stack and application to run: the servers, and unless ``servers_only``, ingest, query and one worker per step.

    Args:
        data_dir: data directory; default: the user's.
        nodes: see ``StackConfig``.
        ports: by name, including the services. Others are those of the last run, defaults, or free ones.
        servers_only: without the application.
        overrides: settings of the application that take precedence over the environment.

    Raises:
        StackError: it is already running with a different port.
    """
    home = data_dir or default_data_dir()
    saved = _read(home)
    ports = _ports_from_environment() | dict(ports or {})
    if saved is not None and is_up(Stack.open(StackConfig(data_dir=home))):
        installation = saved
        for name, port in (("ingest", saved.ingest_port), ("query", saved.query_port)):
            if ports.get(name, port) != port:
                raise StackError(f"the installation in {home} runs with {name} on port {port}; stop it first")
    else:
        installation = Installation(
            api_key=os.environ.get(_KEY) or (saved.api_key if saved else secrets.token_urlsafe(24)),
            ingest_port=_port("ingest", ports, saved.ingest_port if saved else None),
            query_port=_port("query", ports, saved.query_port if saved else None),
            overrides={name: value for name, value in os.environ.items() if _is_setting(name)} | dict(overrides or {}),
        )
    config = StackConfig(
        nodes=3 if nodes == 3 else 1,  # noqa: PLR2004 - the two layouts
        data_dir=home,
        ports={name: port for name, port in ports.items() if name not in _PREFERRED_PORTS},
        apps=() if servers_only else _apps(installation),
    )
    return config, installation


def is_up(stack: Stack) -> bool:
    """Whether it is running, starting or stopping."""
    return stack.status().state not in {Phase.STOPPED, Phase.FAILED}


def save(data_dir: Path, installation: Installation) -> None:
    """Save the parameters, readable by the owner only."""
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

    An explicit ``data_dir`` takes precedence, then the environment, then the user's local installation if it is
    running. The latter is ignored if the environment has addresses of servers, as in the processes of an installation
    and in deployments.

    Raises:
        NotRunning: nothing is running in ``data_dir``.
    """
    if data_dir is None and not _SERVERS.isdisjoint(os.environ):
        return Settings()
    home = data_dir or default_data_dir()
    status = Stack.open(StackConfig(data_dir=home)).status()
    saved = _read(home)
    if status.state is Phase.READY and saved is not None:
        environment = saved.environment | dict(status.environment)
        missing = environment.keys() - os.environ.keys()
        return settings_from(environment if data_dir else {name: environment[name] for name in missing})
    if data_dir is not None:
        raise NotRunning(f"nothing is running in {home} ({status.state}): start it with `freshline up --data {home}`")
    return Settings()


async def await_workers(settings: Settings, stack: Stack) -> None:
    """Wait until each step has a worker with partitions, so that the first event does not wait for one.

    Raises:
        StackError: a worker did not start. The message contains the end of its log.
    """
    try:
        async with asyncio.timeout(_JOIN_TIMEOUT_S), StreamAdmin(settings) as admin:
            for step in StepName:
                while not await _is_consumed(admin, settings.names.group(step)):
                    _check_processes(stack)
                    await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise StackError(
            f"a worker did not join its group within {_JOIN_TIMEOUT_S:.0f} s; see the logs in {_logs(stack)}"
        ) from None


async def _is_consumed(admin: StreamAdmin, group: str) -> bool:
    try:
        return await admin.is_consumed(group)
    except KafkaError:  # a newly started broker has no coordinator yet
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
    # Query embedding is latency-sensitive: leave cores to it that passages do not use.
    threads = {_THREADS: installation.overrides.get(_THREADS, str(max(1, (os.cpu_count() or 1) // 2)))}
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
    # -P: do not import from the working directory.
    return (sys.executable, "-P", "-m", "freshline", *arguments)


def _ports_from_environment() -> dict[str, int]:
    ports = {name: os.environ.get(f"{PREFIX}{name.upper()}__PORT", "") for name in _PREFERRED_PORTS}
    return {name: int(port) for name, port in ports.items() if port.isdecimal() and int(port)}


def _is_setting(name: str) -> bool:
    section = name.removeprefix(PREFIX).partition("__")[0].lower()
    return name.startswith(PREFIX) and name not in _SERVERS and section in Settings.model_fields


def settings_from(environment: Mapping[str, str]) -> Settings:
    """Settings of a process with this environment. The current environment provides the rest."""
    nested: dict[str, Any] = {}
    for name, value in environment.items():
        *sections, field = name.removeprefix(PREFIX).lower().split("__")
        section_values = nested
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[field] = value
    return Settings(**nested)


def _read(home: Path) -> Installation | None:
    try:
        return Installation.model_validate_json((home / _FILE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _port(name: str, requested: Mapping[str, int], remembered: int | None) -> int:
    """The requested port, else that of the last run, else the default, else a free one."""
    if name in requested:
        if _bindable(requested[name]) is None:
            raise StackError(f"port {requested[name]} for {name} is in use; free it or choose another")
        return requested[name]
    for candidate in (remembered, _PREFERRED_PORTS[name], 0):
        if candidate is not None and (port := _bindable(candidate)) is not None:
            return port
    raise StackError("no free port on 127.0.0.1")


def _bindable(port: int) -> int | None:
    """The port that a bind returns; None if it is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return None
        return int(probe.getsockname()[1])
