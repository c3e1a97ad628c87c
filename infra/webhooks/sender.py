"""Sending of webhook messages to verified addresses, without redirects, within a timeout."""

import asyncio
import ipaddress
import socket
import time
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, Self

import httpx
from typing_extensions import override

from infra.settings import WebhookSettings
from infra.webhooks.port import NotDelivered, Sender
from infra.webhooks.signing import signed
from infra.webhooks.targets import TargetRefused, checked_url, permitted
from schemas.webhooks import KeptWebhook, WaitingMessage

_HTTPS_PORT: Final = 443
_HTTP_PORT: Final = 80


class HttpSender(Sender):
    """Sends webhook messages over HTTP.

    It resolves the host name once and connects to the verified address, which prevents DNS rebinding. Redirects are
    failures. Only the status of the response is read.
    """

    def __init__(self, settings: WebhookSettings) -> None:
        self._settings = settings
        # Without proxies of the environment, which may reach forbidden addresses.
        self._http = httpx.AsyncClient(follow_redirects=False, trust_env=False, timeout=settings.timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @override
    async def send(self, webhook: KeptWebhook, message: WaitingMessage) -> NotDelivered | None:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                status = await self._post(webhook, message)
        except TimeoutError:
            return NotDelivered(f"no response within {self._settings.timeout_s:g} s")
        except TargetRefused as error:
            return NotDelivered(f"the URL {error}")
        except OSError as error:
            return NotDelivered(f"the host name cannot be resolved ({type(error).__name__})")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            # The message may contain the URL.
            return NotDelivered(f"the request failed ({type(error).__name__})")
        if HTTPStatus(200) <= status < HTTPStatus.MULTIPLE_CHOICES:
            return None
        return NotDelivered(f"the receiver responded with {status}", is_gone=status == HTTPStatus.GONE)

    async def _post(self, webhook: KeptWebhook, message: WaitingMessage) -> int:
        url = checked_url(webhook.url, self._settings.targets)
        address = await self._permitted_address(url)
        body = message.body.encode()
        headers = {
            "content-type": "application/json",
            "user-agent": "freshline",
            "host": url.netloc.decode("ascii"),
            **signed(webhook.secret, message.message_id, int(time.time()), body),
        }
        # Certificates are verified for the host name, although the URL contains the address.
        extensions = {"sni_hostname": url.host} if url.scheme == "https" else {}
        resolved = url.copy_with(host=address)
        async with self._http.stream(
            "POST", resolved, content=body, headers=headers, extensions=extensions
        ) as response:
            return response.status_code

    async def _permitted_address(self, url: httpx.URL) -> str:
        port = url.port or (_HTTPS_PORT if url.scheme == "https" else _HTTP_PORT)
        found: Any = await asyncio.get_running_loop().getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [str(one[4][0]).partition("%")[0] for one in found]
        # All addresses must be permitted: a mixture indicates an attack.
        if not addresses or not all(permitted(ipaddress.ip_address(one), self._settings.targets) for one in addresses):
            raise TargetRefused("resolves to an address that is not permitted (FRESHLINE_WEBHOOKS__TARGETS)")
        return addresses[0]
