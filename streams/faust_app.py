"""The only module that imports Faust, which provides group membership, fetching, backpressure and commits.

Faust's own bookkeeping can commit past a record that is still being processed, and treats a failed commit as
successful. ``GuardedConsumer`` replaces it with ``LaneCommits``. Records are consumed as bytes, and the runner
acknowledges them: a stream of typed values would acknowledge a record that it cannot decode, and an exception in an
agent would acknowledge its event.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faust
from faust.transport.drivers.aiokafka import Consumer, Transport
from faust.types import TP
from typing_extensions import override

from infra.kafka.security import client_options
from infra.settings import KafkaSettings, Settings
from streams.core.commit_guard import LaneCommits
from streams.runner import Delivery
from streams.topology import TOPOLOGY, StepName


class GuardedConsumer(Consumer):  # type: ignore[misc]  # Faust is not typed
    """A Faust consumer that commits only contiguously finished offsets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.lanes: dict[TP, LaneCommits] = defaultdict(LaneCommits)

    @override
    def ack(self, message: Any) -> bool:
        """Acknowledge a message; the runner calls this once for each record."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        lane = self.lanes.get(message.tp)
        if lane is not None:
            lane.finish(message.offset)
        return lane is not None

    @override
    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Discard the lanes of revoked partitions. Their new owner reads uncommitted records again."""
        await super().on_partitions_revoked(revoked)
        for tp in revoked:
            self.lanes.pop(tp, None)

    @override
    async def perform_seek(self) -> None:
        """Discard all lanes. Reading restarts at the committed offsets, so records are delivered again."""
        self.lanes.clear()
        await super().perform_seek()

    @override
    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in list(self.lanes) if topics is None or tp in topics or tp.topic in topics)

    @override
    def _new_offset(self, tp: TP) -> int | None:
        return self.lanes[tp].committable() if tp in self.lanes else None

    @override
    def _should_commit(self, tp: TP, offset: int) -> bool:
        return tp in self.lanes and offset is not None

    @override
    async def _commit_offsets(self, offsets: Mapping[TP, int], **_transaction: bool) -> bool:
        assigned = {tp: offset for tp, offset in offsets.items() if tp in self.assignment()}
        if not assigned or not await self._commit(assigned):
            return False
        for tp, offset in assigned.items():
            if tp in self.lanes:
                self.lanes[tp].committed(offset)
        return True


class GuardedTransport(Transport):  # type: ignore[misc]  # Faust is not typed
    """Faust's aiokafka transport with the guarded consumer."""

    Consumer = GuardedConsumer


class FaustWorker:
    """Consumes the topic of a step.

    Args:
        settings: Kafka and stream settings.
        step: step whose topic is consumed.
        take: receives every record; may wait to apply backpressure.
    """

    def __init__(self, settings: Settings, step: StepName, take: Callable[[Delivery], Awaitable[None]]) -> None:
        self._take = take
        # Faust requires a directory for tables; none are used.
        self._tables = TemporaryDirectory(prefix=f"freshline-{step}-")
        self._app = _make_app(settings, step, Path(self._tables.name))
        topic = self._app.topic(
            settings.names.topic(TOPOLOGY[step].reads.name),
            key_type=bytes,
            value_type=bytes,
            key_serializer="raw",
            value_serializer="raw",
        )
        self._app.agent(topic, name=str(step), concurrency=1)(self._consume)

    async def start(self) -> None:
        """Join the consumer group and start reading."""
        self._app.finalize()
        await self._app.start()

    async def stop(self) -> None:
        """Commit finished records and leave the consumer group."""
        await self._app.stop()
        self._tables.cleanup()

    @property
    def assigned(self) -> set[int]:
        """Partitions that are assigned to this worker."""
        return {tp.partition for tp in self._app.consumer.assignment()}

    @property
    def crashed(self) -> BaseException | None:
        """The error that ended the worker, or None while it runs."""
        reason: BaseException | None = self._app.crash_reason
        return reason

    async def _consume(self, stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            # Here, and not when the record is fetched: Faust discards prefetched records when partitions move.
            self._app.consumer.lanes[message.tp].deliver(message.offset)
            await self._take(
                Delivery(
                    partition=message.partition,
                    offset=message.offset,
                    key=message.key,
                    value=message.value,
                    # Headers of other producers may have no value.
                    headers=tuple((name, value or b"") for name, value in message.headers or ()),
                    done=event.ack,
                )
            )


def _make_app(settings: Settings, step: StepName, tables: Path) -> faust.App:
    kafka = settings.kafka
    group = settings.names.group(step)
    app = faust.App(
        group,
        broker=[f"kafka://{address}" for address in kafka.bootstrap_servers.split(",")],
        autodiscover=False,
        datadir=tables,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        consumer_auto_offset_reset="earliest",
        broker_session_timeout=kafka.session_timeout_s,
        broker_heartbeat_interval=kafka.session_timeout_s / 3,
        broker_commit_interval=kafka.commit_interval_ms / 1000,
        # Pending records stay in the broker. A worker prefetches few, which bounds its memory and makes rebalances
        # fast.
        stream_buffer_maxsize=2 * settings.streams.batch_events,
        broker_max_poll_records=2 * settings.streams.batch_events,
        stream_wait_empty=False,
        # A step that waits for a store keeps its partitions for as long as necessary. The watchdog detects a stalled
        # step.
        broker_max_poll_interval=86_400,
        **_security(kafka),
    )
    app.transport = GuardedTransport(app.conf.broker_consumer, app)
    return app


def _security(kafka: KafkaSettings) -> dict[str, Any]:
    if kafka.security == "plaintext":
        return {}
    options = client_options(kafka)
    context = options["ssl_context"]
    if kafka.security == "tls":
        return {"broker_credentials": faust.SSLCredentials(context=context)}
    tokens = options["sasl_oauth_token_provider"]
    # Without an explicit context Faust would connect to MSK in plaintext.
    return {"broker_credentials": faust.OAuthCredentials(oauth_cb=tokens, ssl_context=context)}
