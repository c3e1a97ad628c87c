"""The local stack's parts that need no server."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from pydantic import ValidationError

from infra.local import fetch, java, ports
from infra.local.access import check_reachable
from infra.local.processes import end_leftover
from infra.local.servers import Kafka
from infra.local.state import (
    AppProcess,
    Home,
    Listener,
    Phase,
    Plan,
    ProcessIdentity,
    ProcessState,
    Programs,
    StackConfig,
    StackError,
    StackState,
)


@pytest.fixture
def listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


class TestPorts:
    def test_remembered_port_is_used_again(self) -> None:
        assert ports.choose(["redis"], {}, {"redis": 7654}) == {"redis": 7654}

    def test_remembered_port_that_is_in_use_is_not(self, listener: int) -> None:
        chosen = ports.choose(["redis"], {}, {"redis": listener})
        assert chosen["redis"] in range(6379, 6379 + ports.SPAN)

    def test_brokers_get_different_ports(self) -> None:
        chosen = ports.choose(["kafka-1", "kafka-2", "kafka-3"], {}, {})
        assert len(set(chosen.values())) == 3

    def test_reported_port_in_use_is_an_error_that_names_it(self, listener: int) -> None:
        with pytest.raises(StackError, match=f"port {listener} for redis is in use"):
            ports.choose(["redis"], {"redis": listener}, {})

    def test_unknown_name_is_an_error(self) -> None:
        with pytest.raises(StackError, match="unknown port name reddis; this stack has redis"):
            ports.choose(["redis"], {"reddis": 1}, {})

    def test_no_server_takes_the_port_reported_for_another(self) -> None:
        chosen = ports.choose(["kafka-1", "kafka-2"], {"kafka-2": 7655}, {"kafka-1": 7655})
        assert chosen["kafka-2"] == 7655
        assert chosen["kafka-1"] != 7655

    def test_free_ports_are_free_and_different(self, listener: int) -> None:
        found = ports.free(5, first=listener)
        assert len(set(found)) == 5
        assert listener not in found
        with pytest.raises(StackError, match=f"of {ports.SPAN + 1} ports"):
            ports.free(ports.SPAN + 1, first=40_000)


def _kafka(home: Path, listeners: tuple[Listener, ...]) -> dict[str, object]:
    here = Path("/")
    programs = Programs(
        kafka_libs=here,
        kafka_java=here,
        opensearch_home=here,
        opensearch_java=here,
        vector_module=True,
        redis_server=here,
        models=here,
    )
    config = StackConfig(data_dir=home, listeners=listeners)
    plan = Plan(config=config, programs=programs, detached=False, fresh=False)
    return Kafka(1, plan, Home(home), {"kafka-1": 9092, "kafka-1-controller": 19092})._properties()


def test_clients_of_a_listener_are_reported_its_own_ports(tmp_path: Path) -> None:
    properties = _kafka(
        tmp_path, (Listener(name="SLOW", ports={"kafka-1": 23001}, advertised_ports={"kafka-1": 23002}),)
    )
    assert properties["listeners"] == "PLAINTEXT://127.0.0.1:9092,CONTROLLER://127.0.0.1:19092,SLOW://127.0.0.1:23001"
    assert properties["advertised.listeners"] == "PLAINTEXT://127.0.0.1:9092,SLOW://127.0.0.1:23002"
    assert properties["listener.security.protocol.map"] == "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SLOW:PLAINTEXT"
    assert _kafka(tmp_path, ())["advertised.listeners"] == "PLAINTEXT://127.0.0.1:9092"


def test_what_faults_need_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHLINE_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(fetch, "FAKETIME_DIRECTORIES", (tmp_path,))
    with pytest.raises(StackError, match=r"Install Go .* or put a toxiproxy-server on the PATH"):
        fetch.toxiproxy()
    with pytest.raises(StackError, match="apt-get install libfaketime"):
        fetch.faketime()


def _jdk(home: Path, version: str, modules: str) -> Path:
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "java").touch()
    (home / "release").write_text(f'IMPLEMENTOR="x"\nJAVA_VERSION="{version}"\nMODULES="{modules}"\n', encoding="utf-8")
    return home


class TestJava:
    @pytest.fixture(autouse=True)
    def nothing_installed(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(java, "SYSTEM_DIRECTORIES", ((tmp_path / "jvm", "*"),))
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("JAVA_HOME", raising=False)
        monkeypatch.delenv("OPENSEARCH_JAVA_HOME", raising=False)

    def test_none_for_kafka_is_an_error_that_explains_how_to_get_one(self) -> None:
        with pytest.raises(StackError, match=r"(?s)Java 17 or newer.*apt-get install"):
            java.for_kafka()

    def test_opensearch_wants_21_with_the_vector_module(self, tmp_path: Path) -> None:
        _jdk(tmp_path / "jvm" / "old", "17.0.1", "java.base jdk.incubator.vector")
        _jdk(tmp_path / "jvm" / "bare", "25.0.3", "java.base")
        assert java.for_opensearch() is None
        right = _jdk(tmp_path / "jvm" / "right", "21", "java.base jdk.incubator.vector")
        assert java.for_opensearch() == java.Java(right, 21, vector_module=True)

    def test_environment_arrives_before_the_systems_newest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _jdk(tmp_path / "jvm" / "newest", "30", "jdk.incubator.vector")
        named = _jdk(tmp_path / "named", "21.0.2", "jdk.incubator.vector")
        monkeypatch.setenv("OPENSEARCH_JAVA_HOME", str(named))
        found = java.for_opensearch()
        assert found is not None
        assert found.home == named

    def test_version_1_8_is_no_match(self, tmp_path: Path) -> None:
        found = java.inspect(_jdk(tmp_path / "eight", "1.8.0_392", ""))
        assert found is not None
        assert found.version < java.KAFKA_JAVA


class TestCache:
    @pytest.fixture(autouse=True)
    def cache(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("FRESHLINE_CACHE", str(tmp_path / "cache"))

    def test_failed_build_leaves_nothing_and_is_tried_again(self, tmp_path: Path) -> None:
        def fail(target: Path) -> None:
            (target / "half").touch()
            raise StackError("the network is down")

        with pytest.raises(StackError, match="network"):
            fetch._once("thing-1", fail)
        assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thing-1.lock"]
        built = fetch._once("thing-1", lambda target: (target / "whole").touch())
        assert [path.name for path in built.iterdir()] == ["whole"]

    def test_killed_build_is_cleared_away(self, tmp_path: Path) -> None:
        script = (
            "import os, signal; from infra.local import fetch\n"
            "def build(target):\n"
            "    (target / 'half').touch()\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "fetch._once('thing-1', build)\n"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
        assert not (tmp_path / "cache" / "thing-1").exists()
        fetch._once("thing-1", lambda target: (target / "whole").touch())
        left = sorted(path.name for path in (tmp_path / "cache").iterdir())
        assert left == ["thing-1", "thing-1.lock"]

    def test_two_at_once_build_once(self) -> None:
        builds: list[Path] = []
        together = threading.Barrier(2, timeout=10)

        def ask() -> None:
            together.wait()
            fetch._once("thing-1", builds.append)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(builds) == 1

    def test_missing_maven_is_an_error_that_explains_how_to_get_it(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(StackError, match=r"(?s)mvn is not on the PATH.*apt-get install maven"):
            fetch.models_dir()

    def test_what_is_not_what_was_pinned_is_refused(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        maven = tmp_path / "mvn"
        maven.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, sys\n"
            "[target] = [arg.partition('=')[2] for arg in sys.argv if arg.startswith('-DoutputDirectory=')]\n"
            "pathlib.Path(target).mkdir()\n"
            "pathlib.Path(target, 'opensearch-knn-3.6.0.0.zip').write_bytes(b'other')\n"
        )
        maven.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(StackError, match=r"opensearch-knn-3\.6\.0\.0\.zip does not match checksums"):
            fetch._maven("opensearch", tmp_path / "fetched", "OpenSearch", fetch.quiet)

    def test_pins_name_the_versions_of_the_pom(self) -> None:
        pinned = fetch.CHECKSUMS.read_text()
        for name, file in {"kafka": "kafka-tools-{}.jar", "opensearch": "opensearch-knn-{}.0.zip"}.items():
            assert f"  {file.format(fetch._version(name))}\n" in pinned
        for suffix, _ in fetch.MODELS.values():
            assert f"  langchain4j-embeddings-{suffix}-{fetch._version('models')}.jar\n" in pinned


class TestReach:
    def test_closed_directory_is_named(self) -> None:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as made:  # pytest's own directory is closed to others
            closed = Path(made)
            with pytest.raises(StackError, match=f"{closed} has mode drwx------"):
                check_reachable(closed / "data", "nobody")
            closed.chmod(0o711)
            check_reachable(closed / "data", "nobody")


class TestIdentity:
    def test_finds_a_running_process_and_no_other(self) -> None:
        own = ProcessIdentity.own()
        assert own.find() == psutil.Process()
        assert ProcessIdentity(pid=own.pid, created_s=own.created_s - 1).find() is None

    def test_zombie_is_not_running(self) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            identity = ProcessIdentity.of(child.pid)
            assert identity is not None
            assert identity.find() is not None
            child.kill()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and is not collected
            assert identity.find() is None

    def test_leftover_is_killed_and_a_stranger_with_its_number_is_not(self) -> None:
        command = [sys.executable, "-c", "input()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as child:
            identity = ProcessIdentity.of(child.pid)
            assert identity is not None
            end_leftover(ProcessIdentity(pid=child.pid, created_s=identity.created_s - 1))
            assert child.poll() is None
            end_leftover(identity)
            assert child.wait() == -signal.SIGKILL


class TestHome:
    def test_wipe_takes_the_stacks_own_and_leaves_the_rest(self, tmp_path: Path) -> None:
        home = Home(tmp_path)
        home.create()
        (tmp_path / "thesis.odt").touch()
        (tmp_path / "kafka-1").mkdir()
        state = StackState(nodes=1, supervisor=ProcessIdentity.own(), models=tmp_path)
        state.processes.append(ProcessState(name="redis", log=tmp_path / "x.log", address=None, phase=Phase.READY))
        home.write(state)
        assert home.read() == state
        home.wipe()
        assert home.read() is None
        assert (tmp_path / "thesis.odt").exists()
        assert not (tmp_path / "kafka-1").exists()

    def test_damaged_state_counts_as_none(self, tmp_path: Path) -> None:
        home = Home(tmp_path)
        home.create()
        home.state_file.write_text('{"nodes": 1, "superv', encoding="utf-8")
        assert home.read() is None


def test_process_name_cannot_leave_the_log_directory() -> None:
    with pytest.raises(ValidationError, match="name"):
        AppProcess(name="../../etc/passwd", argv=("true",))
