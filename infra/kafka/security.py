"""Connection security of Kafka clients: plaintext, TLS, or AWS IAM on MSK."""

import asyncio
import ssl
import time
from typing import Any, Final

from aiokafka.abc import AbstractTokenProvider
from aws_msk_iam_sasl_signer import MSKAuthTokenProvider
from typing_extensions import override

from infra.settings import KafkaSettings

_REFRESH_BEFORE_S: Final = 120.0


class MskTokens(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka is not typed
    """MSK IAM tokens, reused until shortly before they expire.

    The signer runs in a thread, because it may read credentials over the network. Tokens are valid for 900 s.
    """

    def __init__(self, region: str) -> None:
        self._region = region
        self._token = ""
        self._valid_until_s = 0.0
        self._lock = asyncio.Lock()

    @override
    async def token(self) -> str:
        """A token that remains valid for at least two minutes."""
        async with self._lock:
            if time.time() > self._valid_until_s - _REFRESH_BEFORE_S:
                token, expiry_ms = await asyncio.to_thread(MSKAuthTokenProvider.generate_auth_token, self._region)
                self._token, self._valid_until_s = token, expiry_ms / 1000
            return self._token


def client_options(settings: KafkaSettings) -> dict[str, Any]:
    """Connection options of every aiokafka client.

    Raises:
        ValueError: ``msk-iam`` is configured without a region.
    """
    options: dict[str, Any] = {"bootstrap_servers": settings.bootstrap_servers}
    if settings.security == "plaintext":
        return options
    options["ssl_context"] = ssl.create_default_context()
    if settings.security == "tls":
        return options | {"security_protocol": "SSL"}
    if settings.region is None:
        raise ValueError("FRESHLINE_KAFKA__REGION must be set with FRESHLINE_KAFKA__SECURITY=msk-iam")
    return options | {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauth_token_provider": MskTokens(settings.region),
    }
