"""Where webhooks may lead. Whoever registers one makes our worker send requests: never to what only we can reach."""

import ipaddress
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

import httpx

Targets = Literal["public", "private", "local"]

_EMBEDDING: Final = tuple(
    ipaddress.IPv6Network(net)
    for net in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16", "fec0::/10")
)
"""IPv6 networks that lead to IPv4 addresses of which we would not know, or that are no longer in use."""


class TargetRefused(ValueError):
    """A webhook may not lead there. The message is for who registers it."""


def checked_url(text: str, targets: Targets) -> httpx.URL:
    """The URL, if it may be registered; its host is not looked up.

    Raises:
        TargetRefused: see there.
    """
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, UnicodeError) as error:
        raise TargetRefused("is no URL") from error
    if not url.host or url.userinfo or url.fragment or url.port == 0:
        raise TargetRefused("must name a host, and have no user, password or fragment")
    address = _address(url.host)
    is_loopback = url.host == "localhost" or (address is not None and address.is_loopback)
    if url.scheme != "https" and not (url.scheme == "http" and is_loopback and targets == "local"):
        raise TargetRefused("must begin with https://" + (" or http://localhost" if targets == "local" else ""))
    if (address is not None and not permitted(address, targets)) or (is_loopback and targets != "local"):
        raise TargetRefused("must not lead to an address of this kind (FRESHLINE_WEBHOOKS__TARGETS)")
    return url


def permitted(address: IPv4Address | IPv6Address, targets: Targets) -> bool:
    """Whether requests may go to this address. Those of links, such as a cloud's metadata service, are never."""
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
