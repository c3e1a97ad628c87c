"""Permitted webhook targets. Clients choose the URLs, so internal addresses must be excluded."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

import httpx

Targets = Literal["public", "private", "local"]

_EMBEDDING: Final = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")
)
"""IPv6 networks that embed IPv4 addresses, or that are deprecated."""


class TargetRefused(ValueError):
    """The URL or address is not permitted. Clients receive the message."""


def checked_url(text: str, targets: Targets) -> httpx.URL:
    """Parse and verify the URL of a webhook. Does not resolve its host name.

    Raises:
        TargetRefused: the URL is invalid or not permitted.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise TargetRefused("is not a URL") from error
    if not url.host or url.userinfo or url.fragment or url.port == 0:
        raise TargetRefused("must contain a host, and no user, password or fragment")
    address = _address(url.host)
    is_loopback = url.host == "localhost" or (address is not None and address.is_loopback)
    if url.scheme != "https" and not (url.scheme == "http" and is_loopback and targets == "local"):
        raise TargetRefused("must begin with https://" + (" or http://localhost" if targets == "local" else ""))
    if (address is not None and not permitted(address, targets)) or (is_loopback and targets != "local"):
        raise TargetRefused("must not contain an address of this kind (FRESHLINE_WEBHOOKS__TARGETS)")
    return url


def permitted(address: IPv4Address | IPv6Address, targets: Targets) -> bool:
    """Whether requests to this address are permitted. Link-local ones, such as metadata services, never are."""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return permitted(address.ipv4_mapped, targets)
        if address.is_loopback:
            return targets == "local"
        if any(address in network for network in _EMBEDDING):
            return False
    if address.is_loopback:
        return targets == "local"
    if address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved:
        return False
    return address.is_global or (targets != "public" and address.is_private)


def _address(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
