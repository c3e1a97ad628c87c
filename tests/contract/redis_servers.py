"""Redis servers that a test starts for itself."""

import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from infra.local import fetch

WAIT_S = 10


def free_port() -> int:
    # A cluster's bus listens at port + 10000.
    for port in range(21_000, 40_000, 7):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


@contextmanager
def redis_server(directory: Path, port: int, *options: str):
    program = str(fetch.redis_server())
    directory.mkdir(exist_ok=True)
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory), *options]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + WAIT_S
            while True:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert time.monotonic() < deadline, "Redis did not start"
            yield process
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


def url(port: int) -> str:
    return f"redis://127.0.0.1:{port}/0"


def join(ports):
    """Form a cluster of the servers, with the slots distributed among them."""
    share = REDIS_CLUSTER_HASH_SLOTS // len(ports) + 1
    with ExitStack() as closing:
        nodes = [closing.enter_context(redis.Redis.from_url(url(port), decode_responses=True)) for port in ports]
        for number, node in enumerate(nodes):
            node.cluster("SET-CONFIG-EPOCH", number + 1)
            node.cluster("ADDSLOTSRANGE", number * share, min(REDIS_CLUSTER_HASH_SLOTS, (number + 1) * share) - 1)
            node.cluster("MEET", "127.0.0.1", ports[0])
        deadline = time.monotonic() + WAIT_S
        while not all(
            info["cluster_state"] == "ok" and info["cluster_known_nodes"] == str(len(ports))
            for info in (node.cluster("INFO") for node in nodes)
        ):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
