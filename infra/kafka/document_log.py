"""Identity and indexing progress of the document topic."""

import asyncio
import time
from typing import Final

from aiokafka.errors import KafkaError
from typing_extensions import override

from infra.kafka.port import DocumentLog, StreamUnavailable
from infra.kafka.provision import StreamAdmin
from infra.settings import Settings
from schemas.topics import DOCUMENTS, TO_THE_INDEX, Topic

_POLL_S: Final = 0.1


class KafkaDocumentLog(DocumentLog):
    """The document topic. Each call opens its own connections: connectors call once per run."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @override
    async def log_id(self) -> str:
        # Kafka assigns a unique id to each topic that is created.
        async with StreamAdmin(self._settings) as admin:
            return await admin.topic_id(DOCUMENTS)

    @override
    async def is_indexed(self, *, timeout_s: float) -> bool:
        until_s = time.monotonic() + timeout_s
        try:
            async with StreamAdmin(self._settings) as admin:
                # In the order of the steps: what a step has finished is in the topic of the next step.
                for topic, step in TO_THE_INDEX:
                    if not await self._wait(admin, topic, self._settings.names.group(step), until_s):
                        return False
        except KafkaError as error:
            raise StreamUnavailable(f"no Kafka broker responded: {error!r}") from error
        return True

    async def _wait(self, admin: StreamAdmin, topic: Topic, group: str, until_s: float) -> bool:
        """Whether the group finishes all current records of the topic before ``until_s``; checks at least once."""
        lags = await admin.lag(topic, group)
        ends = {lag.partition: lag.end for lag in lags}
        while any(lag.committed < ends[lag.partition] for lag in lags):
            if time.monotonic() > until_s:
                return False
            await asyncio.sleep(_POLL_S)
            lags = await admin.lag(topic, group)
        return True
