"""Health, readiness and performance summary of a query process."""

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
from infra.web.peers import PeerProcesses
from infra.web.problems import as_problem, problem_responses
from query.operations.health import DependencyState, health, is_healthy
from query.telemetry.audit_verdicts import AuditVerdict
from query.telemetry.rolling_stats import MAX_WINDOW_S, RequestOutcome, RollingStats, WindowCounts, WindowStats
from schemas.credentials import Scope
from schemas.operations import AuditReport, HealthReport, HealthScore, PerformanceSummary, ReadyReport, TimesReport
from schemas.search import Access

_HEALTH_WINDOW_S: Final = 60
_COUNTS: Final = "window_counts"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Dependency:
    """A dependency that readiness checks.

    Attributes:
        check: raises an exception that describes the failure.
        required: False if questions are answered without it, at lower performance.
    """

    check: Callable[[], Awaitable[None]]
    required: bool


class Operations:
    """Operational state of this process.

    Args:
        dependencies: dependencies by name.
        rolling_stats: request statistics.
        memory_limit_bytes: resident memory above which the process is unhealthy; None for no limit.
        peers: other processes that serve the same address. They expect this process to serve ``peer_handlers``.

    Attributes:
        peers: as the argument.
    """

    def __init__(
        self,
        dependencies: Mapping[str, Dependency],
        rolling_stats: RollingStats,
        *,
        memory_limit_bytes: int | None = None,
        peers: PeerProcesses | None = None,
    ) -> None:
        self.peers: Final = peers or PeerProcesses()
        self._dependencies = dependencies
        self._rolling_stats = rolling_stats
        self._memory_limit_bytes = memory_limit_bytes
        self._process = psutil.Process()
        self._draining = False

    def drain(self) -> None:
        """Fail readiness from now on, so that load balancers stop sending requests."""
        self._draining = True

    @property
    def draining(self) -> bool:
        """Whether the process is shutting down."""
        return self._draining

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Run a request, and record its outcome and latency."""
        began_s = time.monotonic()
        outcome = RequestOutcome.INTERNAL
        try:
            yield
            outcome = RequestOutcome.ANSWERED
        except Exception as error:
            outcome = RequestOutcome.of(as_problem(error).status)
            raise
        finally:
            now_s = time.monotonic()
            self._rolling_stats.record_request(outcome, (now_s - began_s) * 1_000, now_s=now_s)

    def window(self, seconds: int) -> WindowStats:
        """Statistics of the last ``seconds``."""
        return self._rolling_stats.window(seconds, now_s=time.monotonic())

    def health(self) -> HealthReport:
        """Health of the process itself, without its dependencies."""
        window = self.window(_HEALTH_WINDOW_S)
        memory_bytes = self._process.memory_info().rss
        is_over_limit = self._memory_limit_bytes is not None and memory_bytes > self._memory_limit_bytes
        return HealthReport(
            status="ok" if is_healthy(window) and not is_over_limit else "failing",
            uptime_s=round(time.time() - self._process.create_time(), 3),
            memory_bytes=memory_bytes,
            memory_limit_bytes=self._memory_limit_bytes,
            error_rate=window.error_rate,
        )

    async def ready(self) -> ReadyReport:
        """Whether questions can be answered now."""
        if self._draining:  # without checks: load balancers need the answer at once
            return ReadyReport(status="unavailable", dependencies={"process": "draining"})
        states = await self.dependency_states()
        is_unavailable = any(state.fault and state.required for state in states.values())
        is_degraded = any(state.fault for state in states.values())
        return ReadyReport(
            status="unavailable" if is_unavailable else "degraded" if is_degraded else "ready",
            dependencies={name: state.fault or "ready" for name, state in states.items()},
        )

    async def summary(self, window_s: int) -> PerformanceSummary:
        """Performance of the last ``window_s``, over all processes that serve the address."""
        counts = [self._rolling_stats.counts(window_s, now_s=time.monotonic())]
        for process, encoded in (await self.peers.ask(_COUNTS, str(window_s))).items():
            try:
                counts.append(WindowCounts.from_json(orjson.loads(encoded)))
            except ValueError as error:
                _log.warning("peer_counts_unreadable", process=process, reason=str(error))
        window = reduce(add, counts).stats(min(window_s, MAX_WINDOW_S))
        score = health(window, await self.dependency_states())
        return PerformanceSummary(
            window_s=window.seconds,
            processes=len(counts),
            requests=window.requests,
            requests_per_s=round(window.requests / window.seconds, 3),
            times=TimesReport(**asdict(window.latency)),
            errors={
                str(outcome): count
                for outcome, count in window.outcomes.items()
                if outcome is not RequestOutcome.ANSWERED
            },
            error_rate=window.error_rate,
            cache_hit_rate=window.cache_hit_rate,
            staleness=TimesReport(**asdict(window.staleness)),
            audit=_audit_report(window),
            health=HealthScore(score=score.score, reasons=score.reasons),
        )

    @property
    def peer_handlers(self) -> dict[str, Callable[[str], bytes]]:
        """Handlers of requests from peer processes."""
        return {_COUNTS: self._encoded_counts}

    def _encoded_counts(self, window_s: str) -> bytes:
        return orjson.dumps(self._rolling_stats.counts(int(window_s), now_s=time.monotonic()).to_json())

    async def dependency_states(self) -> dict[str, DependencyState]:
        """Check every dependency."""
        return {
            name: DependencyState(dependency.required, await _fault(dependency))
            for name, dependency in self._dependencies.items()
        }


class Draining:
    """ASGI middleware: closes each connection with its response once the process is draining.

    Otherwise a keep-alive connection could be closed while the next request is being sent on it.
    """

    def __init__(self, app: ASGIApp, *, operations: Operations) -> None:
        self._app = app
        self._operations = operations

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        """Pass the request on."""

        async def send_closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._operations.draining:
                message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
            await send(message)

        await self._app(scope, receive, send_closing)


def add_operations_routes(app: FastAPI, operations: Operations, credentials: Credentials) -> None:
    """Add ``/health``, ``/ready`` and ``/performance-summary``, and the ``Draining`` middleware."""
    app.add_middleware(Draining, operations=operations)

    @app.get("/health", responses={503: {"model": HealthReport, "description": "The process is unhealthy."}})
    async def health(response: Response) -> HealthReport:
        """Liveness: the process responds, memory is within its limit, and fewer than 5 % of requests failed."""
        report = operations.health()
        response.status_code = 200 if report.status == "ok" else 503
        return report

    @app.get("/ready", responses={503: {"model": ReadyReport, "description": "A required dependency is unavailable."}})
    async def ready(response: Response) -> ReadyReport:
        """Readiness: `ready`, `degraded` (lower performance), or `unavailable` with status 503."""
        report = await operations.ready()
        response.status_code = 503 if report.status == "unavailable" else 200
        return report

    @app.get("/performance-summary", responses=problem_responses(401, 403, 422))
    async def performance_summary(
        _access: Annotated[Access, Depends(credentials.requiring(Scope.ADMIN))],
        window: Annotated[int, Query(ge=1, le=MAX_WINDOW_S, description="Length of the window in seconds.")] = 300,
    ) -> PerformanceSummary:
        """Latency, errors, cache hit rate, staleness, and a health score with reasons."""
        return await operations.summary(window)


def _audit_report(window: WindowStats) -> AuditReport:
    compared = sum(count for verdict, count in window.audits.items() if verdict is not AuditVerdict.GONE)
    return AuditReport(
        verdicts={str(verdict): count for verdict, count in window.audits.items()},
        violation_rate=window.audits[AuditVerdict.VIOLATION] / compared if compared else None,
        slo_violations=window.slo_violations,
        staleness=TimesReport(**asdict(window.audited_staleness)),
    )


async def _fault(dependency: Dependency) -> str | None:
    try:
        await dependency.check()
    except Exception as error:  # noqa: BLE001 - any failure of a check makes the dependency unavailable
        return str(error) or type(error).__name__
    return None
