"""The local stack's own words: what was asked for, where things lie, what is running."""

import os
import shutil
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final, Literal

import platformdirs
import psutil
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

LOG_TAIL_LINES: Final = 15


class StackError(Exception):
    """The stack cannot do what was asked. The message says why and what to do."""


def default_data_dir() -> Path:
    """``FRESHLINE_HOME``, else a per-user directory; for root a place that an unprivileged OpenSearch can enter."""
    if told := os.environ.get("FRESHLINE_HOME"):
        return Path(told)
    return Path("/var/lib/freshline") if os.geteuid() == 0 else Path(platformdirs.user_data_dir("freshline"))


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AppProcess(_Frozen):
    """A process of the application, run beside the servers.

    Attributes:
        name: unique in the stack; names its log too.
        argv: command line.
        env: added to the caller's environment and to ``Stack.environment()``, and wins over both.
        ready_url: ready when a GET answers 200; None means ready once it runs, so that an end right after is a crash.

    Its output goes to ``logs/NAME.log`` in the data directory.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    argv: tuple[str, ...] = Field(min_length=1)
    env: dict[str, str] = {}
    ready_url: str | None = None


class Listener(_Frozen):
    """One more way into the brokers.

    A broker tells its clients where to connect. Whoever is to come through a proxy needs a listener of its own, whose
    clients are told the proxy's ports.

    Attributes:
        name: unique among the listeners.
        ports: broker name (``kafka-1``) → port that it listens on.
        advertised_ports: broker name → port that its clients are told.
    """

    name: str = Field(pattern=r"^[A-Z][A-Z0-9]*$")
    ports: dict[str, int]
    advertised_ports: dict[str, int]


class StackConfig(_Frozen):
    """What to run.

    Attributes:
        nodes: 1 for one server of each kind; 3 for three brokers, two OpenSearch nodes with documents, and one
            that only votes.
        data_dir: everything the stack writes; kept between runs.
        ports: ports that must be used, by name (``kafka-1``, ``kafka-1-controller``, ``opensearch-1``,
            ``opensearch-1-transport``, ``redis``); others are remembered ones, defaults or free ones.
        apps: application processes, started once the servers are ready.
        listeners: more ways into the brokers.
        start_timeout_s: longest wait for one process to become ready.
    """

    nodes: Literal[1, 3] = 1
    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(default_factory=default_data_dir)
    ports: dict[str, int] = {}
    apps: tuple[AppProcess, ...] = ()
    listeners: tuple[Listener, ...] = ()
    start_timeout_s: float = Field(120.0, gt=0)


class Programs(_Frozen):
    """Where the outside programs lie.

    Attributes:
        vector_module: whether ``opensearch_java`` has ``jdk.incubator.vector``.
    """

    kafka_libs: Path
    kafka_java: Path
    opensearch_home: Path
    opensearch_java: Path
    vector_module: bool
    redis_server: Path
    models: Path


class Plan(_Frozen):
    """What the supervisor is told.

    Attributes:
        detached: outlive the caller; otherwise the stack ends with the caller.
        fresh: wipe the data directory first.
    """

    config: StackConfig
    programs: Programs
    detached: bool
    fresh: bool


class ProcessIdentity(_Frozen):
    """A process that cannot be mistaken for a later one with the same number.

    Attributes:
        created_s: its creation time, epoch seconds.
    """

    pid: int
    created_s: float

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """Identity of a running process, None if there is none."""
        try:
            return cls(pid=pid, created_s=psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    @classmethod
    def own(cls) -> "ProcessIdentity":
        """Identity of this process."""
        return cls(pid=os.getpid(), created_s=psutil.Process().create_time())

    def find(self) -> psutil.Process | None:
        """The process, while it runs; a zombie does not."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 0.01  # noqa: PLR2004  clock ticks are 10 ms
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Phase(StrEnum):
    """Where a process, or the whole stack, is in its life."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ProcessState(BaseModel):
    """One process, as the supervisor last saw it.

    Attributes:
        since_s: when ``phase`` began, epoch seconds.
        crashes: unexpected ends since the stack came up.
        error: what happened at the last of them, with the end of its log.
    """

    name: str
    log: Path
    address: str | None
    phase: Phase = Phase.WAITING
    since_s: float = Field(default_factory=time.time)
    identity: ProcessIdentity | None = None
    crashes: int = 0
    error: str | None = None

    def enter(self, phase: Phase) -> None:
        """Note a change of phase and its time."""
        self.phase = phase
        self.since_s = time.time()


class StackState(BaseModel):
    """The state file: written by the supervisor only, read by everyone."""

    nodes: Literal[1, 3]
    supervisor: ProcessIdentity
    phase: Phase = Phase.STARTING
    ports: dict[str, int] = {}
    models: Path
    processes: list[ProcessState] = []
    error: str | None = None


class Home:
    """The layout of a data directory."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.state_file: Final = path / "state.json"
        self.lock_file: Final = path / "supervisor.lock"
        self.logs: Final = path / "logs"
        self.blobs: Final = path / "blobs"
        self.supervisor_log: Final = self.logs / "supervisor.log"
        self.restarts: Final = path / "restart"

    def create(self) -> None:
        """Make the directory; others may enter it, as OpenSearch may run as another user, but not list it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o711)
        for directory in (self.logs, self.blobs, self.restarts):
            directory.mkdir(exist_ok=True, mode=0o700)

    def wipe(self) -> None:
        """Remove what stacks have written there, and nothing else: the directory may be anyone's."""
        for pattern in ("state.json", "kafka-*", "opensearch-*", "redis", "blobs", "restart"):
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def request_restart(self, name: str) -> None:
        """Leave a request for the supervisor, which looks when it gets its signal."""
        (self.restarts / name).touch()

    def read(self) -> StackState | None:
        """The state last written, None if there is none of use."""
        try:
            return StackState.model_validate_json(self.state_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, state: StackState) -> None:
        """Replace the state file in one step, so that a reader never sees half of one."""
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(state.model_dump_json(indent=1), encoding="utf-8")
        partial.replace(self.state_file)


def log_tail(path: Path) -> str:
    """The last lines of a log, for an error message; empty where there are none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-LOG_TAIL_LINES:])
