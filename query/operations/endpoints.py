"""How this process does: health, readiness, and with others of the same address a summary of the last minutes."""

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import reduce
from operator import add
from typing import Annotated, Final

import orjson
import psutil
import structlog
from fastapi import Depends, FastAPI, Query, Response
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from infra.web.credentials import Credentials
from infra.web.peers import PeerProcesses, Told
from infra.web.problems import as_problem, problems_told
from query.operations.health import PartState, health, is_well
from query.telemetry.audit_verdicts import Verdict
from query.telemetry.rolling_stats import LONGEST_S, Ended, RollingStats, Tally, Window
from schemas.credentials import Scope
from schemas.operations import AuditReport, HealthReport, HealthScore, PerformanceSummary, ReadyReport, TimesReport
from schemas.search import Access

_HEALTH_WINDOW_S: Final = 60
_TALLY: Final = "tally"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that readiness depends on.

    Attributes:
        check: raises an exception that says what is wrong.
        needed: False where questions are answered without it, only slower.
    """

    check: Callable[[], Awaitable[None]]
    needed: bool


class Operations:
    """What is known of this process.

    Attributes:
        peers: other processes of the address.

    Args:
        parts: what readiness depends on.
        recent: what happened lately.
        memory_limit_bytes: resident memory beyond which the process is failing.
        peers: other processes of the address, which answer as ``told`` does.
    """

    def __init__(
        self,
        parts: Mapping[str, Part],
        recent: RollingStats,
        *,
        memory_limit_bytes: int | None = None,
        peers: PeerProcesses | None = None,
    ) -> None:
        self.peers: Final = peers or PeerProcesses()
        self._parts = parts
        self._recent = recent
        self._memory_limit_bytes = memory_limit_bytes
        self._process = psutil.Process()
        self._draining = False

    def drain(self) -> None:
        """From now on this process is not ready: whoever balances requests is to send no more."""
        self._draining = True

    @property
    def draining(self) -> bool:
        """Whether the process is about to end."""
        return self._draining

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Note how the request in it ends, and after how long."""
        began_s = time.monotonic()
        ended = Ended.INTERNAL
        try:
            yield
            ended = Ended.ANSWERED
        except Exception as error:
            ended = Ended.of(as_problem(error).status)
            raise
        finally:
            now_s = time.monotonic()
            self._recent.note_end(ended, (now_s - began_s) * 1_000, now_s=now_s)

    def window(self, seconds: int) -> Window:
        """What happened in the last ``seconds``."""
        return self._recent.window(seconds, now_s=time.monotonic())

    def health(self) -> HealthReport:
        """Whether the process itself is well."""
        window = self.window(_HEALTH_WINDOW_S)
        memory_bytes = self._process.memory_info().rss
        is_large = self._memory_limit_bytes is not None and memory_bytes > self._memory_limit_bytes
        return HealthReport(
            status="ok" if is_well(window) and not is_large else "failing",
            uptime_s=round(time.time() - self._process.create_time(), 3),
            memory_bytes=memory_bytes,
            memory_limit_bytes=self._memory_limit_bytes,
            error_share=window.error_share,
        )

    async def ready(self) -> ReadyReport:
        """Whether questions can be answered now."""
        if self._draining:  # at once: whoever balances requests is to know before the stores have answered
            return ReadyReport(status="unavailable", parts={"process": "is about to end"})
        states = await self.states()
        is_out = any(state.fault and state.needed for state in states.values())
        is_poor = any(state.fault for state in states.values())
        return ReadyReport(
            status="unavailable" if is_out else "degraded" if is_poor else "ready",
            parts={name: state.fault or "ready" for name, state in states.items()},
        )

    async def summary(self, window_s: int) -> PerformanceSummary:
        """How the last ``window_s`` went, in all processes of the address."""
        tallies = [self._recent.tally(window_s, now_s=time.monotonic())]
        for process, told in (await self.peers.ask(_TALLY, str(window_s))).items():
            try:
                tallies.append(Tally.read(orjson.loads(told)))
            except ValueError as error:
                _log.warning("sibling_not_understood", process=process, reason=str(error))
        window = reduce(add, tallies).window(min(window_s, LONGEST_S))
        scored = health(window, await self.states())
        return PerformanceSummary(
            window_s=window.seconds,
            processes=len(tallies),
            requests=window.requests,
            requests_per_s=round(window.requests / window.seconds, 3),
            times=TimesReport(**asdict(window.times)),
            errors={str(kind): count for kind, count in window.ended.items() if kind is not Ended.ANSWERED},
            error_share=window.error_share,
            hit_share=window.hit_share,
            staleness=TimesReport(**asdict(window.staleness)),
            audit=_audit_report(window),
            health=HealthScore(score=scored.score, reasons=scored.reasons),
        )

    @property
    def told(self) -> dict[str, Told]:
        """What other processes of the address may ask of this one."""
        return {_TALLY: self._tally}

    def _tally(self, window_s: str) -> bytes:
        return orjson.dumps(self._recent.tally(int(window_s), now_s=time.monotonic()).told())

    async def states(self) -> dict[str, PartState]:
        """Every part as it is now."""
        return {name: PartState(part.needed, await _fault(part)) for name, part in self._parts.items()}


class Draining:
    """ASGI middleware: connections end with their response once the process is about to end.

    A connection that is kept open would otherwise be closed under a request that is just being sent.
    """

    def __init__(self, app: ASGIApp, *, operations: Operations) -> None:
        self._app = app
        self._operations = operations

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def ending(message: Message) -> None:
            if message["type"] == "http.response.start" and self._operations.draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, ending)


def add_operations(app: FastAPI, operations: Operations, credentials: Credentials) -> None:
    """Serve what is known at ``/health``, ``/ready`` and ``/performance-summary``; end connections when draining."""
    app.add_middleware(Draining, operations=operations)

    @app.get("/health", responses={503: {"model": HealthReport, "description": "The process is failing."}})
    async def health(response: Response) -> HealthReport:
        """Whether the process itself is well: it answers, its memory is within its limit, fewer than 5 % errors."""
        report = operations.health()
        response.status_code = 200 if report.status == "ok" else 503
        return report

    @app.get("/ready", responses={503: {"model": ReadyReport, "description": "A needed part does not answer."}})
    async def ready(response: Response) -> ReadyReport:
        """Whether questions can be answered now: `ready`, `degraded` (slower), or `unavailable` with status 503."""
        report = await operations.ready()
        response.status_code = 503 if report.status == "unavailable" else 200
        return report

    @app.get("/performance-summary", responses=problems_told(401, 403, 422))
    async def performance_summary(
        _access: Annotated[Access, Depends(credentials.requiring(Scope.ADMIN))],
        window: Annotated[int, Query(ge=1, le=LONGEST_S, description="Seconds to look back.")] = 300,
    ) -> PerformanceSummary:
        """How the service did lately: times, errors, hits, staleness, and a health score with its reasons."""
        return await operations.summary(window)


def _audit_report(window: Window) -> AuditReport:
    compared = sum(count for verdict, count in window.audited.items() if verdict is not Verdict.GONE)
    return AuditReport(
        verdicts={str(verdict): count for verdict, count in window.audited.items()},
        unsafe_share=window.audited[Verdict.VIOLATION] / compared if compared else None,
        past_objective=window.past_objective,
        stale=TimesReport(**asdict(window.audited_stale)),
    )


async def _fault(part: Part) -> str | None:
    try:
        await part.check()
    except Exception as error:  # noqa: BLE001 - a part that fails in an unforeseen way is not ready either
        return str(error) or type(error).__name__
    return None
