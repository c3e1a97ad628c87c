"""Valid and invalid requests generated from the OpenAPI descriptions: no server error, no undocumented response."""

from collections.abc import AsyncIterator
from http import HTTPStatus

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks
from schemathesis.core.failures import Failure, FailureGroup

from bench.installation import BenchInstallation, installed
from infra.local import Stack
from ingest.batches import NDJSON
from schemas.content_types import SUPPORTED_TYPES

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]


@schemathesis.serializer(NDJSON, *sorted(SUPPORTED_TYPES.keys() - {"application/json"}))
def encoded(_context: object, value: object) -> bytes:
    """Encode a body of another type, which is bytes or text."""
    return value if isinstance(value, bytes) else getattr(value, "data", str(value).encode())


@schemathesis.check
def no_server_error(_context: object, response: schemathesis.Response, _case: schemathesis.Case) -> None:
    """All servers are available, so the only valid 503 is for a position that does not exist yet."""
    not_yet = response.status_code == HTTPStatus.SERVICE_UNAVAILABLE and "position-not-reached" in response.text
    assert response.status_code < HTTPStatus.INTERNAL_SERVER_ERROR or not_yet, response.text


CHECKS = [
    no_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
FUZZED = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
async def installation(stack: Stack) -> AsyncIterator[BenchInstallation]:
    async with installed(
        stack, {"FRESHLINE_KAFKA__PARTITIONS": "3", "FRESHLINE_QUERY__MIN_POSITION_WAIT_S": "0"}
    ) as it:
        yield it


def fuzz(url: str, mode: GenerationMode) -> dict[str, str]:
    """Send cases to every described operation; returns the failures of each."""
    failures = {}
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()

        @FUZZED
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: schemathesis.Case) -> None:
            case.call_and_validate(checks=CHECKS)

        try:
            send()
        except (FailureGroup, Failure) as failure:
            failures[operation.label] = str(failure)
        except Unsatisfiable:  # no request to this operation is invalid
            assert mode is GenerationMode.NEGATIVE
    return failures


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_ingest_responds_as_described(installation, mode):
    failures = fuzz(installation.ingest_url, mode)
    assert not failures, "\n\n".join(f"{name}: {what}" for name, what in failures.items())


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_query_responds_as_described(installation, mode):
    failures = fuzz(installation.query_url, mode)
    assert not failures, "\n\n".join(f"{name}: {what}" for name, what in failures.items())
