"""Configuration, state and data directory of the local stack."""

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
    """An operation of the stack failed. The message contains the reason and a remedy."""


def default_data_dir() -> Path:
    """``FRESHLINE_HOME``, or a directory of the user; for root one that an unprivileged OpenSearch can enter."""
    if configured := os.environ.get("FRESHLINE_HOME"):
        return Path(configured)
    return Path("/var/lib/freshline") if os.geteuid() == 0 else Path(platformdirs.user_data_dir("freshline"))


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AppProcess(_Frozen):
    """A process of the application. Its output is written to ``logs/NAME.log`` in the data directory.

    Attributes:
        name: unique name in the stack.
        argv: command line.
        env: environment variables; override those of the caller and of ``Stack.environment()``.
        ready_url: URL that responds with 200 once the process is ready; None: ready once it runs.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    argv: tuple[str, ...] = Field(min_length=1)
    env: dict[str, str] = {}
    ready_url: str | None = None


class Listener(_Frozen):
    """An additional listener of the brokers, for clients behind a proxy.

    Attributes:
        name: unique name of the listener.
        ports: broker name (``kafka-1``) → port of the listener.
        advertised_ports: broker name → advertised port, which is that of the proxy.
    """

    name: str = Field(pattern=r"^[A-Z][A-Z0-9]*$")
    ports: dict[str, int]
    advertised_ports: dict[str, int]


class StackConfig(_Frozen):
    """Configuration of a stack.

    Attributes:
        nodes: 1 for one server of each kind; 3 for three brokers, two OpenSearch nodes with documents, and one
            that only votes.
        data_dir: directory of all data; kept between runs.
        ports: required ports by name (``kafka-1``, ``kafka-1-controller``, ``opensearch-1``,
            ``opensearch-1-transport``, ``redis``). Others are those of the previous run, defaults, or free ones.
        apps: application processes, started after the servers are ready.
        listeners: additional listeners of the brokers.
        start_timeout_s: maximum time until a process is ready.
    """

    nodes: Literal[1, 3] = 1
    data_dir: Annotated[Path, AfterValidator(_absolute)] = Field(default_factory=default_data_dir)
    ports: dict[str, int] = {}
    apps: tuple[AppProcess, ...] = ()
    listeners: tuple[Listener, ...] = ()
    start_timeout_s: float = Field(120.0, gt=0)


class Programs(_Frozen):
    """Paths of the external programs and models.

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
    """Input of the supervisor.

    Attributes:
        detached: whether the stack outlives the caller.
        fresh: whether to delete the data directory first.
    """

    config: StackConfig
    programs: Programs
    detached: bool
    fresh: bool


class ProcessIdentity(_Frozen):
    """Process id and creation time, which distinguish a process from later ones with the same id.

    Attributes:
        created_s: creation time, epoch seconds.
    """

    pid: int
    created_s: float

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """Identity of a running process; None if it does not run."""
        try:
            return cls(pid=pid, created_s=psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None

    @classmethod
    def own(cls) -> "ProcessIdentity":
        """Identity of this process."""
        return cls(pid=os.getpid(), created_s=psutil.Process().create_time())

    def find(self) -> psutil.Process | None:
        """The process, if it runs and is not a zombie."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created_s) < 0.01  # noqa: PLR2004  clock ticks are 10 ms
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


class Phase(StrEnum):
    """Phase of a process or of the stack."""

    WAITING = "waiting"
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class ProcessState(BaseModel):
    """State of a process.

    Attributes:
        since_s: start of ``phase``, epoch seconds.
        crashes: unexpected ends since the start of the stack.
        error: description of the last crash, with the end of its log.
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
        """Enter a phase."""
        self.phase = phase
        self.since_s = time.time()


class StackState(BaseModel):
    """Content of the state file. Only the supervisor writes it."""

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
        """Create the directory. Other users may enter it, for OpenSearch, but not list it."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o711)
        for directory in (self.logs, self.blobs, self.restarts):
            directory.mkdir(exist_ok=True, mode=0o700)

    def wipe(self) -> None:
        """Delete files of stacks only: the directory may contain other files."""
        for pattern in ("state.json", "kafka-*", "opensearch-*", "redis", "blobs", "restart"):
            for path in self.path.glob(pattern):
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def request_restart(self, name: str) -> None:
        """Write a restart request, which the supervisor reads when it receives ``RESTART_SIGNAL``."""
        (self.restarts / name).touch()

    def read(self) -> StackState | None:
        """The state file; None if it is missing or unreadable."""
        try:
            return StackState.model_validate_json(self.state_file.read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def write(self, state: StackState) -> None:
        """Replace the state file atomically."""
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(state.model_dump_json(indent=1), encoding="utf-8")
        partial.replace(self.state_file)


def log_tail(path: Path) -> str:
    """The last lines of a log, for an error message; empty without a log."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    return "\n".join(lines[-LOG_TAIL_LINES:])
