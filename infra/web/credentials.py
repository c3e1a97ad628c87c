"""From a request's credential to what its sender may see and change (I7)."""

import ipaddress
import secrets

from fastapi import Request

from infra.opensearch.port import Access
from infra.settings import TenantSettings
from infra.web.problems import ProblemRaised
from schemas.problems import ProblemType

_KEY_SETTING = "FRESHLINE_TENANT__API_KEY"


class UnsafeBind(ValueError):
    """A service without a key must not be reachable from other machines."""


class Credentials:
    """Who a request speaks for. An instance is a FastAPI dependency, ``Annotated[Access, Depends(credentials)]``.

    With a key set, a request must carry it as ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``. Without one the
    service is open, but to this machine only: it binds loopback (``require_safe_bind``) and answers only requests that
    name it as such, so that a web page whose host name was pointed at loopback gets nothing.

    This is the one place that makes an ``Access`` from a request; tables of keys or signed tokens belong here.
    """

    def __init__(self, settings: TenantSettings) -> None:
        self._access = Access(settings.default)
        self._key = settings.api_key.get_secret_value().encode() if settings.api_key else None

    def __call__(self, request: Request) -> Access:
        """The sender's access.

        Raises:
            ProblemRaised: no valid credential, or an open service addressed by a foreign name.
        """
        headers = request.headers
        return self.check(headers.get("authorization"), headers.get("x-api-key"), headers.get("host"))

    def check(self, authorization: str | None, api_key: str | None, host: str | None) -> Access:
        """The same for callers without a FastAPI request, from the values of the three headers."""
        if self._key is None:
            if not is_loopback(_host_name(host or "")):
                detail = f"without an API key only requests to localhost are served; set {_KEY_SETTING} for others"
                raise ProblemRaised(ProblemType.FORBIDDEN, detail)
            return self._access
        scheme, _, token = (authorization or "").partition(" ")
        presented = token.strip() if scheme.lower() == "bearer" else api_key or ""
        if not secrets.compare_digest(presented.encode(), self._key):
            detail = "send the API key as `Authorization: Bearer KEY` or `X-API-Key: KEY`"
            raise ProblemRaised(ProblemType.UNAUTHENTICATED, detail)
        return self._access


def require_safe_bind(host: str, tenant: TenantSettings) -> None:
    """Refuse to listen where others can reach a service that asks for no key.

    Raises:
        UnsafeBind: ``host`` is not loopback and no key is set.
    """
    if tenant.api_key is None and not is_loopback(host):
        raise UnsafeBind(f"cannot listen on {host} without an API key: set {_KEY_SETTING}, or bind 127.0.0.1")


def is_loopback(host: str) -> bool:
    """True for ``localhost`` and loopback addresses; a name that would have to be resolved is not."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host_name(header: str) -> str:
    """Host part of a ``Host`` header: ``[::1]:8080`` → ``::1``."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0]
