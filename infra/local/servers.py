"""Configuration, command lines and readiness checks of the servers.

All of them listen on loopback only. None of them syncs each write to disk: a killed process loses nothing, but a power
failure may lose the last second. This is suitable for development, not for production.
"""

import base64
import os
import pwd
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

import httpx
import redis.asyncio
import redis.exceptions
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import KafkaError

from infra.local.access import check_reachable
from infra.local.ports import HOST
from infra.local.state import AppProcess, Home, Plan, StackState

PROBE_TIMEOUT_S: Final = 2.0
UNPRIVILEGED_USER: Final = "nobody"


@dataclass(frozen=True, slots=True)
class Command:
    """How to start a process.

    Attributes:
        argv: command line.
        env: its whole environment.
        user: name of the user to run as; None for the current one.
        first: command line that must succeed before, such as formatting a data directory.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    user: str | None = None
    first: tuple[str, ...] | None = None


class Supervised(Protocol):
    """A process that the supervisor can run."""

    @property
    def name(self) -> str:
        """Unique name."""
        ...

    @property
    def address(self) -> str | None:
        """Address of the process."""
        ...

    def prepare(self) -> Command:
        """Write the configuration for the next start. Idempotent."""
        ...

    async def missing(self) -> str | None:
        """Reason for which it is not ready; None if it is. Returns within a few seconds."""
        ...


def port_names(nodes: int) -> list[str]:
    """Names of all ports of a stack."""
    brokers = [name for i in range(1, nodes + 1) for name in (f"kafka-{i}", f"kafka-{i}-controller")]
    indexes = [n for i in range(1, nodes + 1) for n in (f"opensearch-{i}", f"opensearch-{i}-transport")]
    return [*brokers, *indexes, "redis"]


def environment(state: StackState, home: Home) -> dict[str, str]:
    """The ``FRESHLINE_`` variables for the use of a stack."""
    nodes, ports = state.nodes, state.ports
    brokers = ",".join(f"{HOST}:{ports[f'kafka-{i}']}" for i in range(1, nodes + 1))
    indexes = ",".join(f"http://{HOST}:{ports[f'opensearch-{i}']}" for i in range(1, _data_nodes(nodes) + 1))
    return {
        "FRESHLINE_KAFKA__BOOTSTRAP_SERVERS": brokers,
        "FRESHLINE_KAFKA__REPLICATION": str(nodes),
        "FRESHLINE_KAFKA__MIN_IN_SYNC_REPLICAS": str(_min_in_sync(nodes)),
        "FRESHLINE_OPENSEARCH__URL": indexes,
        "FRESHLINE_OPENSEARCH__REPLICAS": str(_data_nodes(nodes) - 1),
        "FRESHLINE_REDIS__URL": f"redis://{HOST}:{ports['redis']}/0",
        "FRESHLINE_BLOBS__PATH": str(home.blobs),
        "FRESHLINE_EMBEDDING__MODELS_PATH": str(state.models),
    }


def servers(plan: Plan, home: Home, ports: Mapping[str, int]) -> list[Supervised]:
    """The servers of a stack."""
    nodes = plan.config.nodes
    return [
        *(Kafka(i, plan, home, ports) for i in range(1, nodes + 1)),
        *(OpenSearch(i, plan, home, ports) for i in range(1, nodes + 1)),
        Redis(plan, home, ports),
    ]


def _data_nodes(nodes: int) -> int:
    """Number of OpenSearch nodes with documents. A third node only votes, so that any one node may fail."""
    return min(nodes, 2)


def _min_in_sync(nodes: int) -> int:
    return nodes // 2 + 1


class Kafka:
    """A Kafka broker that is also a controller (KRaft)."""

    def __init__(self, number: int, plan: Plan, home: Home, ports: Mapping[str, int]) -> None:
        self.name = f"kafka-{number}"
        self.address = f"{HOST}:{ports[self.name]}"
        self._number = number
        self._nodes = plan.config.nodes
        self._listeners = plan.config.listeners
        self._programs = plan.programs
        self._home = home
        self._ports = ports
        self._directory = home.path / self.name

    def prepare(self) -> Command:
        """Write ``server.properties``. A new data directory is formatted first."""
        self._directory.mkdir(exist_ok=True, mode=0o700)
        properties = self._directory / "server.properties"
        text = "".join(f"{key}={value}\n" for key, value in self._properties().items())
        properties.write_text(text, encoding="utf-8")
        formatted = (self._directory / "data" / "meta.properties").exists()
        new = ("kafka.tools.StorageTool", "format", f"--cluster-id={self._cluster_id()}", "-c", str(properties))
        return Command(
            argv=self._java("-Xms256m", "-Xmx512m", "kafka.Kafka", str(properties)),
            first=None if formatted else self._java(*new),
        )

    async def missing(self) -> str | None:
        """Ready when its metadata includes it, that is when the controller has unfenced it."""
        client = AIOKafkaClient(bootstrap_servers=self.address, request_timeout_ms=int(PROBE_TIMEOUT_S * 1000))
        try:
            await client.bootstrap()
            known = {broker.nodeId for broker in client.cluster.brokers()}
        except (KafkaError, OSError) as error:
            return f"no metadata from {self.address}: {error}"
        finally:
            await client.close()
        return (
            None
            if self._number in known
            else f"broker {self._number} is not among the live brokers {sorted(known)} yet"
        )

    def _java(self, *arguments: str) -> tuple[str, ...]:
        java = str(self._programs.kafka_java / "bin" / "java")
        # Serial collector and first compiler tier only: least memory and fastest start on a small machine.
        tuning = ("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
        logging = ("-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
        return (java, *tuning, *logging, "-cp", f"{self._programs.kafka_libs}/*", *arguments)

    def _properties(self) -> dict[str, object]:
        controller = f"{HOST}:{self._ports[f'{self.name}-controller']}"
        numbers = range(1, self._nodes + 1)
        additional = [(one.name, one.ports[self.name], one.advertised_ports[self.name]) for one in self._listeners]
        return {
            "node.id": self._number,
            "process.roles": "broker,controller",
            # Unlike a dynamic voter list, a static one is not stored in the log, so ports may change between runs.
            "controller.quorum.voters": ",".join(f"{i}@{HOST}:{self._ports[f'kafka-{i}-controller']}" for i in numbers),
            "controller.listener.names": "CONTROLLER",
            "listeners": ",".join(
                (
                    f"PLAINTEXT://{self.address}",
                    f"CONTROLLER://{controller}",
                    *(f"{name}://{HOST}:{port}" for name, port, _ in additional),
                )
            ),
            "advertised.listeners": ",".join(
                (
                    f"PLAINTEXT://{self.address}",
                    *(f"{name}://{HOST}:{advertised}" for name, _, advertised in additional),
                )
            ),
            "listener.security.protocol.map": ",".join(
                f"{name}:PLAINTEXT" for name in ("PLAINTEXT", "CONTROLLER", *(name for name, *_ in additional))
            ),
            "log.dirs": self._directory / "data",
            "auto.create.topics.enable": "false",
            "default.replication.factor": self._nodes,
            "min.insync.replicas": _min_in_sync(self._nodes),
            "offsets.topic.replication.factor": self._nodes,
            "offsets.topic.num.partitions": 8,
            "transaction.state.log.replication.factor": self._nodes,
            "transaction.state.log.min.isr": _min_in_sync(self._nodes),
            "share.coordinator.state.topic.replication.factor": self._nodes,
            "share.coordinator.state.topic.min.isr": _min_in_sync(self._nodes),
            # No rebalance delay, and sessions short enough for tests of a failed worker.
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 1000,
        }

    def _cluster_id(self) -> str:
        """Cluster id of all brokers of the data directory, created on first use."""
        file = self._home.path / "kafka-cluster-id"
        if not file.exists():
            file.write_text(base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode(), encoding="ascii")
        return file.read_text(encoding="ascii")


class OpenSearch:
    """An OpenSearch node with the k-NN plugin. A third node is a cluster manager without documents."""

    def __init__(self, number: int, plan: Plan, home: Home, ports: Mapping[str, int]) -> None:
        self.name = f"opensearch-{number}"
        self.address = f"http://{HOST}:{ports[self.name]}"
        self._number = number
        self._nodes = plan.config.nodes
        self._holds_data = number <= _data_nodes(plan.config.nodes)
        self._programs = plan.programs
        self._ports = ports
        self._directory = home.path / self.name
        self._config = self._directory / "config"
        self._data = self._directory / "data"
        self._scratch = self._directory / "tmp"

    def prepare(self) -> Command:
        """Write the configuration directory of the node, owned by the user that OpenSearch runs as."""
        for directory in (self._directory, self._config, self._data, self._scratch):
            directory.mkdir(exist_ok=True, mode=0o700)
        shutil.copy(self._programs.opensearch_home / "config" / "jvm.options", self._config)
        settings = "".join(f"{key}: {value}\n" for key, value in self._settings().items())
        (self._config / "opensearch.yml").write_text(settings, encoding="utf-8")
        (self._config / "jvm.options").write_text(self._jvm_options(), encoding="utf-8")
        (self._config / "log4j2.properties").write_text(_LOG_TO_CONSOLE, encoding="utf-8")
        user = UNPRIVILEGED_USER if os.geteuid() == 0 else None  # OpenSearch does not run as root
        if user is not None:
            self._change_owner(user)
        env = {name: value for name, value in os.environ.items() if not name.startswith(("OPENSEARCH_", "JAVA_"))}
        env |= {
            "OPENSEARCH_JAVA_HOME": str(self._programs.opensearch_java),
            "OPENSEARCH_PATH_CONF": str(self._config),
            "OPENSEARCH_TMPDIR": str(self._scratch),
        }
        return Command(argv=(str(self._programs.opensearch_home / "bin" / "opensearch"),), env=env, user=user)

    async def missing(self) -> str | None:
        """Ready when the cluster has a manager, all primary shards are active and the k-NN plugin is loaded."""
        try:
            async with httpx.AsyncClient(base_url=self.address, timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
                health = (await client.get("/_cluster/health")).raise_for_status().json()
                plugins = (await client.get("/_nodes/_local/plugins")).raise_for_status().json()
        except httpx.HTTPError as error:
            return f"no health from {self.address}: {error!r}"
        if health["status"] == "red":
            return f"{health['unassigned_shards']} shards are not active yet"
        loaded = [plugin["name"] for node in plugins["nodes"].values() for plugin in node["plugins"]]
        return None if "opensearch-knn" in loaded else f"the k-NN plugin is not among the loaded plugins {loaded}"

    def _settings(self) -> dict[str, object]:
        numbers = range(1, self._nodes + 1)
        transports = [f"{HOST}:{self._ports[f'opensearch-{i}-transport']}" for i in numbers]
        settings: dict[str, object] = {
            "cluster.name": "freshline-local",
            "node.name": self.name,
            "path.data": self._data,
            "path.logs": self._scratch,
            "network.host": HOST,
            "http.port": self._ports[self.name],
            "transport.port": self._ports[f"{self.name}-transport"],
            # A misspelt index name must not create an index with dynamic mappings.
            "action.auto_create_index": '"false"',
            # The disk of a developer is often nearly full, which must not prevent shard allocation.
            "cluster.routing.allocation.disk.threshold_enabled": "false",
        }
        if self._nodes == 1:
            return settings | {"discovery.type": "single-node"}
        return settings | {
            "discovery.seed_hosts": f"[{', '.join(transports)}]",
            "cluster.initial_cluster_manager_nodes": f"[{', '.join(f'opensearch-{i}' for i in numbers)}]",
            "node.roles": "[cluster_manager, data, ingest]" if self._holds_data else "[cluster_manager]",
        }

    def _jvm_options(self) -> str:
        """The options of the distribution, without those that write to its directory or require a missing module."""
        unwanted = ["-Xms", "-Xmx", "-Xlog:gc", "HeapDump", "-XX:ErrorFile"]
        if not self._programs.vector_module:
            unwanted.append("jdk.incubator.vector")
        shipped = (self._programs.opensearch_home / "config" / "jvm.options").read_text(encoding="utf-8").splitlines()
        kept = [line for line in shipped if not any(word in line for word in unwanted)]
        heap = "1g" if self._nodes == 1 else "640m" if self._holds_data else "256m"
        own = [f"-Xms{heap}", f"-Xmx{heap}", f"-XX:ErrorFile={self._scratch / 'hs_err_pid%p.log'}"]
        return "\n".join([*kept, *own, ""])

    def _change_owner(self, user: str) -> None:
        for needed in (self._directory, self._programs.opensearch_home, self._programs.opensearch_java / "bin"):
            check_reachable(needed, user)
        account = pwd.getpwnam(user)
        written = [self._directory, *self._directory.iterdir(), *self._config.rglob("*")]
        for path in written:
            os.chown(path, account.pw_uid, account.pw_gid)


class Redis:
    """A Redis server."""

    name = "redis"

    def __init__(self, plan: Plan, home: Home, ports: Mapping[str, int]) -> None:
        self.address = f"redis://{HOST}:{ports['redis']}/0"
        self._port = ports["redis"]
        self._program = plan.programs.redis_server
        self._directory = home.path / "redis"

    def prepare(self) -> Command:
        """Create the data directory. All options are on the command line."""
        self._directory.mkdir(exist_ok=True, mode=0o700)
        options = {
            "bind": HOST,
            "port": str(self._port),
            "protected-mode": "yes",
            "dir": str(self._directory),
            # Commands are appended to the file before their replies, so a killed Redis restores everything that it has
            # acknowledged. A snapshot would restore positions older than those that clients have read.
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
        }
        arguments = [word for key, value in options.items() for word in (f"--{key}", value)]
        return Command(argv=(str(self._program), *arguments))

    async def missing(self) -> str | None:
        """Ready when it responds to PING, after it has loaded its file."""
        client = redis.asyncio.Redis.from_url(self.address, socket_timeout=PROBE_TIMEOUT_S)
        try:
            await client.ping()
        except (redis.exceptions.RedisError, OSError) as error:
            return f"no PONG from {self.address}: {error}"
        finally:
            await client.aclose()
        return None


class App:
    """A process of the application."""

    def __init__(self, process: AppProcess, stack_environment: Mapping[str, str]) -> None:
        self.name = process.name
        self.address = process.ready_url
        self._process = process
        self._environment = stack_environment

    def prepare(self) -> Command:
        """Return the command with the environment of the stack. Nothing is written."""
        return Command(argv=self._process.argv, env={**os.environ, **self._environment, **self._process.env})

    async def missing(self) -> str | None:
        """Ready when its URL responds with 200."""
        if self._process.ready_url is None:
            return None
        try:
            async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
                status = (await client.get(self._process.ready_url)).status_code
        except httpx.HTTPError as error:
            return f"no response from {self._process.ready_url}: {error!r}"
        return None if status == httpx.codes.OK else f"{self._process.ready_url} responds with {status}"


_LOG_TO_CONSOLE: Final = """\
status = error
appender.console.type = Console
appender.console.name = console
appender.console.layout.type = PatternLayout
appender.console.layout.pattern = [%d{ISO8601}][%-5p][%c{1.}] %m%n
rootLogger.level = warn
rootLogger.appenderRef.console.ref = console
"""
