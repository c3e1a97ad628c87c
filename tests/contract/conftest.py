"""Implementations under contract: the index twin and an OpenSearch server, a Redis server and a three-node cluster."""

import pytest
from index_servers import DIMENSION, small
from redis.asyncio import RedisCluster
from redis_servers import free_port, join, redis_server, url

from infra.opensearch.index import OpenSearchIndex
from infra.opensearch.memory import MemoryIndex
from infra.opensearch.provision import create_indices
from infra.settings import Settings


@pytest.fixture(params=["memory", pytest.param("opensearch", marks=pytest.mark.stack)])
def server(request) -> Settings | None:
    """Settings of the server, with short vectors; None for the twin."""
    return None if request.param == "memory" else small(request.getfixturevalue("settings"))


@pytest.fixture
async def index(server):
    """The twin, or the index of the server."""
    if server is None:
        yield MemoryIndex(DIMENSION)
        return
    await create_indices(server)
    index = OpenSearchIndex.open(server)
    yield index
    await index.close()


@pytest.fixture(scope="session")
def redis_port(stack, tmp_path_factory):  # noqa: ARG001 - starting the stack provides the Redis executable
    port = free_port()
    with redis_server(tmp_path_factory.mktemp("redis"), port):
        yield port


@pytest.fixture(scope="session")
def cluster_port(stack, tmp_path_factory):  # noqa: ARG001 - as above
    directory = tmp_path_factory.mktemp("cluster")
    first = free_port()
    with redis_server(directory / "a", first, "--cluster-enabled", "yes"):
        second = free_port()
        with redis_server(directory / "b", second, "--cluster-enabled", "yes"):
            third = free_port()
            with redis_server(directory / "c", third, "--cluster-enabled", "yes"):
                nodes = [first, second, third]
                join(nodes)
                yield first


@pytest.fixture
async def cluster(cluster_port):
    """A client of the cluster, which rejects scripts with keys in several slots."""
    client = RedisCluster.from_url(url(cluster_port))
    await client.initialize()
    await client.flushall()
    yield client
    await client.aclose()
