"""Rolling restarts of query processes under load: no request fails."""

import asyncio
import itertools
import signal
import socket
import sys
from contextlib import AsyncExitStack

import httpx
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.installation import installed

pytestmark = pytest.mark.stack

CLIENTS = 12
WAIT_S = 60
CHECK_INTERVAL_S = 0.1
DRAIN_S = 4
"""Longer than the health checks of the balancer take on a busy machine."""


class Balancer:
    """Sends each request to a process that was ready at its last health check, as load balancers do."""

    def __init__(self, urls):
        self._urls = urls
        self._ready = dict.fromkeys(urls, False)
        self._next = itertools.count()

    async def check(self):
        async with httpx.AsyncClient(timeout=1) as client, asyncio.TaskGroup() as checks:
            for url in self._urls:
                checks.create_task(self._check_one(url, client))

    async def _check_one(self, url, client):
        while True:
            try:
                self._ready[url] = (await client.get(f"{url}/ready")).is_success
            except httpx.TransportError:
                self._ready[url] = False
            await asyncio.sleep(CHECK_INTERVAL_S)

    def take(self):
        ready = [url for url in self._urls if self._ready[url]]
        return ready[next(self._next) % len(ready)] if ready else None

    async def until(self, url, *, ready):
        async with asyncio.timeout(WAIT_S):
            while self._ready[url] is not ready:  # noqa: ASYNC110 - set by the health checks
                await asyncio.sleep(0.02)


def free_ports(count):
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


async def load(balancer, outcomes, done):
    """New and cached questions over persistent connections, until ``done`` is set."""
    async with httpx.AsyncClient(timeout=30) as client:
        for number in itertools.count():
            if done.is_set():
                return
            url = balancer.take()
            if url is None:
                outcomes.append("nobody is ready")
                return
            try:
                response = await client.post(f"{url}/v1/query", json={"query": f"question {number % 7}"})
                outcomes.append(response.status_code)
            except httpx.TransportError as error:
                outcomes.append(repr(error))


async def test_no_request_fails_while_processes_are_replaced(stack):
    options = {
        "FRESHLINE_OPENSEARCH__SHARDS": "1",
        "FRESHLINE_KAFKA__PARTITIONS": "1",
        "FRESHLINE_QUERY__DRAIN_S": str(DRAIN_S),
    }
    async with installed(stack, options) as installation, AsyncExitStack() as ending:
        # The process of the installation keeps running; two more processes are replaced.
        ports = free_ports(2)
        urls = [f"http://127.0.0.1:{port}" for port in ports]

        async def start(port):
            environment = dict(installation.launcher.environment) | {"FRESHLINE_QUERY__PORT": str(port)}
            command = [sys.executable, "-m", "freshline", "serve", "query"]
            process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)

            async def end():
                if process.returncode is None:
                    process.kill()
                    await process.wait()

            ending.push_async_callback(end)
            return process

        balancer = Balancer(urls)
        checking = asyncio.create_task(balancer.check())
        ending.callback(checking.cancel)
        processes = [await start(port) for port in ports]
        for url in urls:
            await balancer.until(url, ready=True)

        outcomes, done = [], asyncio.Event()
        clients = [asyncio.create_task(load(balancer, outcomes, done)) for _ in range(CLIENTS)]
        for number, port in enumerate(ports):
            processes[number].terminate()
            async with asyncio.timeout(WAIT_S):
                assert await processes[number].wait() == 0
            before = len(outcomes)
            processes[number] = await start(port)
            await balancer.until(urls[number], ready=False)
            await balancer.until(urls[number], ready=True)
            assert len(outcomes) > before  # the other process continued
        done.set()
        await asyncio.gather(*clients)
        assert set(outcomes) == {200}
        assert len(outcomes) > 100
        for process in processes:
            process.terminate()
            assert await process.wait() == 0


class OneAddress:
    """Sends all requests to one address, behind which several processes serve."""

    def __init__(self, url):
        self._url = url

    def take(self):
        return self._url


def children_of(process):
    return {child.pid for child in psutil.Process(process.pid).children()}


async def until(condition):
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - processes send no notification
            await asyncio.sleep(0.02)


async def each_process_reports_metrics_of_all(url, pids, *, questions=8):
    counts = []
    for _ in range(2):
        async with httpx.AsyncClient(timeout=60) as client:  # a new connection, taken by either
            page = (await client.get(f"{url}/metrics")).text
            summary = (await client.get(f"{url}/performance-summary?window=3600")).json()
            samples = [
                sample
                for family in text_string_to_metric_families(page)
                for sample in family.samples
                if sample.name == "freshline_queries_total" and sample.labels["cache_status"] == "filled"
            ]
            assert {int(sample.labels["process"]) for sample in samples} <= pids
            assert summary["processes"] == len(pids)
            counts.append((sum(sample.value for sample in samples), summary["requests"]))
            for number in range(questions):
                (await client.post(f"{url}/v1/query", json={"query": f"another {number}"})).raise_for_status()
    (filled_before, asked_before), (filled_after, asked_after) = counts
    assert filled_after - filled_before == questions
    assert asked_after - asked_before >= questions  # earlier hits are counted with a delay


async def test_no_request_fails_while_processes_of_one_address_are_replaced(stack):
    options = {
        "FRESHLINE_OPENSEARCH__SHARDS": "1",
        "FRESHLINE_KAFKA__PARTITIONS": "1",
        "FRESHLINE_QUERY__DRAIN_S": "1",  # connections are closed with a response
    }
    async with installed(stack, options) as installation:
        [port] = free_ports(1)
        environment = dict(installation.launcher.environment) | {"FRESHLINE_QUERY__PORT": str(port)}
        command = [sys.executable, "-m", "freshline", "serve", "query", "--processes", "2"]
        process = await asyncio.create_subprocess_exec(*command, env=environment, stderr=asyncio.subprocess.DEVNULL)
        try:
            await until(lambda: len(children_of(process)) == 2)
            async with httpx.AsyncClient(timeout=60) as client:
                await client.get(f"http://127.0.0.1:{port}/ready")
            outcomes, done = [], asyncio.Event()
            address = OneAddress(f"http://127.0.0.1:{port}")
            clients = [asyncio.create_task(load(address, outcomes, done)) for _ in range(CLIENTS)]
            before = children_of(process)
            process.send_signal(signal.SIGHUP)
            await until(lambda: len(children_of(process)) == 2 and not children_of(process) & before)
            answered = len(outcomes)
            await until(lambda: len(outcomes) > answered + 20)
            done.set()
            await asyncio.gather(*clients)
            assert set(outcomes) == {200}
            await each_process_reports_metrics_of_all(f"http://127.0.0.1:{port}", children_of(process))

            # A process that exits is restarted; the other continues meanwhile.
            killed = min(children_of(process))
            psutil.Process(killed).kill()
            await until(lambda: len(children_of(process) - {killed}) == 2)
            process.terminate()
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
