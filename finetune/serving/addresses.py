"""The check that a network address is public."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# All other IPv6 addresses are local, reserved, or carry an IPv4 address, by which Python 3.13 classifies a mapped one.
_UNICAST = IPv6Network("2000::/3")
# Public for some releases of Python, yet they lead elsewhere: tunnels and translators that carry an IPv4 address, and
# services that a cloud's virtual machines reach on their own host.
_NOT_PUBLIC = tuple(
    ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20")
)


def as_address(text: str) -> IPv4Address | IPv6Address | None:
    """Return the address in a text of four decimal numbers or IPv6; None for any other text."""
    try:
        return None if "%" in text else ip_address(text)  # a zone names an interface of this machine
    except ValueError:
        return None


def is_allowed(text: str, allow_private: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Return True if an address is public, or in a network of ``allow_private``.

    Private, loopback, link-local, multicast and reserved addresses are not public; nor are IPv6 addresses that carry an
    IPv4 address (mapped, NAT64, 6to4, Teredo), public or not.
    """
    address = as_address(text)
    if address is None:
        return False
    if any(address in network for network in allow_private):
        return True
    if address.version == 6 and address not in _UNICAST:
        return False
    special = address.is_multicast or address.is_reserved or any(address in network for network in _NOT_PUBLIC)
    return address.is_global and not special
