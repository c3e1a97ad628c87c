import os
import socket
import stat
from pathlib import Path

import pytest

from freshline.installation import NotRunning, find, plan, save
from infra.local import Phase, StackError
from infra.local.state import Home, ProcessIdentity, StackState

PORTS = {"kafka-1": 19, "kafka-1-controller": 20, "opensearch-1": 21, "opensearch-1-transport": 22, "redis": 23}


@pytest.fixture(autouse=True)
def _no_settings_in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FRESHLINE_"):
            monkeypatch.delenv(name)


def running(home: Path, **options: object) -> None:
    """What a running installation leaves for commands to find; its supervisor is this process."""
    _, installation = plan(home, **options)
    save(home, installation)
    state = StackState(
        nodes=1, supervisor=ProcessIdentity.own(), phase=Phase.READY, ports=PORTS, models=home / "models"
    )
    Home(home).write(state)


def test_the_running_installation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path)
    monkeypatch.setenv("FRESHLINE_HOME", str(tmp_path))
    settings = find()
    assert settings.kafka.bootstrap_servers == "127.0.0.1:19"
    assert settings.blobs.path == tmp_path / "blobs"
    assert settings.tenant.api_key is not None
    assert settings == find(tmp_path)


def test_environment_wins_over_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path)
    monkeypatch.setenv("FRESHLINE_HOME", str(tmp_path))
    monkeypatch.setenv("FRESHLINE_QUERY__PORT", "4000")
    assert find().query.port == 4000
    assert find().kafka.bootstrap_servers == "127.0.0.1:19"


def test_servers_of_the_environment_are_taken_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path)
    monkeypatch.setenv("FRESHLINE_HOME", str(tmp_path))
    monkeypatch.setenv("FRESHLINE_REDIS__URL", "redis://elsewhere/0")
    settings = find()
    assert settings.redis.url == "redis://elsewhere/0"
    assert settings.kafka.bootstrap_servers == "127.0.0.1:9092"
    assert settings.tenant.api_key is None


def test_named_directory_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running(tmp_path)
    monkeypatch.setenv("FRESHLINE_KAFKA__BOOTSTRAP_SERVERS", "production:9092")
    monkeypatch.setenv("FRESHLINE_KAFKA__PARTITIONS", "5")
    settings = find(tmp_path)
    assert settings.kafka.bootstrap_servers == "127.0.0.1:19"
    assert settings.kafka.partitions == 5


def test_settings_of_its_start_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHLINE_NAMESPACE", "handbook")
    monkeypatch.setenv("FRESHLINE_CACHE", "/nowhere")
    running(tmp_path)
    monkeypatch.delenv("FRESHLINE_NAMESPACE")
    assert find(tmp_path).namespace == "handbook"


def test_nothing_running_explains_how_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotRunning, match=f"freshline up --data {tmp_path}"):
        find(tmp_path)
    monkeypatch.setenv("FRESHLINE_HOME", str(tmp_path))
    assert find().query.port == 8080


def test_key_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    _, first = plan(tmp_path)
    save(tmp_path, first)
    _, second = plan(tmp_path)
    assert second.api_key == first.api_key
    assert len(first.api_key) >= 32
    assert plan(tmp_path / "other")[1].api_key != first.api_key
    assert stat.S_IMODE((tmp_path / "installation.json").stat().st_mode) == 0o600


def test_key_and_ports_reach_the_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FRESHLINE_TENANT__API_KEY", "chosen")
    config, installation = plan(tmp_path, ports={"redis": 6400})
    assert config.ports == {"redis": 6400}
    assert [app.name for app in config.apps] == ["prepare", "index", "invalidate", "notify", "ingest", "query"]
    for app in config.apps:
        assert app.env["FRESHLINE_TENANT__API_KEY"] == "chosen"
        assert app.env["FRESHLINE_QUERY__PORT"] == str(installation.query_port)
        assert "chosen" not in app.argv
    assert config.apps[-1].ready_url == f"http://127.0.0.1:{installation.query_port}/ready"
    assert plan(tmp_path, servers_only=True)[0].apps == ()


def test_default_ports_that_are_taken_are_ignored_files(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StackError, match=f"port {port} for query is in use"):
            plan(tmp_path, ports={"query": port})
        _, installation = plan(tmp_path)
        save(tmp_path, installation.model_copy(update={"query_port": port}))
        assert plan(tmp_path)[1].query_port != port


def test_ports_of_a_running_installation_stay(tmp_path: Path) -> None:
    running(tmp_path)
    _, installation = plan(tmp_path)
    with pytest.raises(StackError, match="stop it first"):
        plan(tmp_path, ports={"query": installation.query_port + 1})
    assert plan(tmp_path, ports={"query": installation.query_port})[1] == installation
