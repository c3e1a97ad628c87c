"""The one module that knows Faust: group membership, fetching, backpressure and commits; nothing else is left to it.

Faust's own commit bookkeeping may commit past a record that is still being processed, and takes a failed commit for
done. ``GuardedConsumer`` replaces it by ``LaneCommits``. Records are read as bytes and ended by the runner: a stream of
typed values would acknowledge a record that it cannot decode, and an exception in an agent would acknowledge its event.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import faust
from faust.transport.drivers.aiokafka import Consumer, Transport
from faust.types import TP

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

    def ack(self, message: Any) -> bool:
        """Called once when the runner has finished a record."""
        if message.acked:
            return False
        message.acked = True
        self._unacked_messages.discard(message)
        lane = self.lanes.get(message.tp)
        if lane is not None:
            lane.finish(message.offset)
        return lane is not None

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Forget the lanes that go to another worker: what of them is not committed yet, it reads again."""
        await super().on_partitions_revoked(revoked)
        for tp in revoked:
            self.lanes.pop(tp, None)

    async def perform_seek(self) -> None:
        """Reading starts again at the committed offsets: what is delivered again is open again."""
        self.lanes.clear()
        await super().perform_seek()

    def _filter_tps_with_pending_acks(self, topics: Any = None) -> Iterator[TP]:
        return (tp for tp in list(self.lanes) if topics is None or tp in topics or tp.topic in topics)

    def _new_offset(self, tp: TP) -> int | None:
        return self.lanes[tp].committable() if tp in self.lanes else None

    def _should_commit(self, tp: TP, offset: int) -> bool:
        return tp in self.lanes and offset is not None

    async def _commit_offsets(self, offsets: Mapping[TP, int], **_transaction: bool) -> bool:
        mine = {tp: offset for tp, offset in offsets.items() if tp in self.assignment()}
        if not mine or not await self._commit(mine):
            return False
        for tp, offset in mine.items():
            if tp in self.lanes:
                self.lanes[tp].committed(offset)
        return True


class GuardedTransport(Transport):  # type: ignore[misc]  # Faust is not typed
    """Faust's aiokafka transport with our consumer."""

    Consumer = GuardedConsumer


class FaustWorker:
    """Consumes one step's topic and hands every record to ``take``, which may wait to hold the stream back."""

    def __init__(self, settings: Settings, step: StepName, take: Callable[[Delivery], Awaitable[None]]) -> None:
        self._take = take
        # Faust wants a directory for tables, and has none here.
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
        """Join the group and start reading."""
        self._app.finalize()
        await self._app.start()

    async def stop(self) -> None:
        """Commit what is finished and leave the group."""
        await self._app.stop()
        self._tables.cleanup()

    @property
    def assigned(self) -> set[int]:
        """Partitions that this worker has now."""
        return {tp.partition for tp in self._app.consumer.assignment()}

    @property
    def crashed(self) -> BaseException | None:
        """What ended the worker, or None while it runs."""
        reason: BaseException | None = self._app.crash_reason
        return reason

    async def _consume(self, stream: Any) -> None:
        async for event in stream.noack().events():
            message = event.message
            # Here and not when the record is fetched: Faust drops what it prefetched when partitions move.
            self._app.consumer.lanes[message.tp].deliver(message.offset)
            await self._take(
                Delivery(
                    partition=message.partition,
                    offset=message.offset,
                    key=message.key,
                    value=message.value,
                    # A stranger's header may have no value.
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
        # What waits is in the broker; a worker holds little, so that its memory is bounded and a rebalance is quick.
        stream_buffer_maxsize=2 * settings.streams.batch_events,
        broker_max_poll_records=2 * settings.streams.batch_events,
        stream_wait_empty=False,
        # A step that waits for a store holds its partitions for as long as that takes; whether it is still sound is
        # for the watchdog to say.
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
    # Without the explicit context Faust would speak to MSK in plaintext.
    return {"broker_credentials": faust.OAuthCredentials(oauth_cb=tokens, ssl_context=context)}
