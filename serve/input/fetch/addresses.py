"""Which IP addresses the server may call on a client's behalf: those that everybody can reach, and no others.

Comes in: an address as the resolver gave it, never as a client spelt it. Goes out: a yes or a no.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

NOT_PUBLIC_4 = tuple(
    ip_network(one)
    for one in (
        "0.0.0.0/8",  # this host
        "10.0.0.0/8",
        "100.64.0.0/10",  # carrier-grade NAT; a cloud's metadata (100.100.100.200) among it
        "127.0.0.0/8",
        "168.63.129.16/32",  # a cloud's platform channel, reachable from inside it alone
        "169.254.0.0/16",  # link-local; the clouds' metadata (169.254.169.254)
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocol assignments; a cloud's metadata (192.0.0.192)
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
PUBLIC_6 = ip_network("2000::/3")  # global unicast; ::1, fc00::/7, fe80::/10, ff00::/8, 64:ff9b::/96 lie outside
NOT_PUBLIC_6 = tuple(
    ip_network(one)
    for one in (
        "2001::/23",  # protocol assignments; Teredo among them, which carries an IPv4 address
        "2001:db8::/32",
        "2002::/16",  # 6to4, which carries an IPv4 address
        "3fff::/20",
    )
)


def is_public(address: str) -> bool:
    """Whether an IPv4 or IPv6 address is one that everybody can reach.

    An IPv6 address that carries an IPv4 one (mapped, compatible, NAT64, 6to4, Teredo) is not, whatever it carries.
    """
    try:
        found = ip_address(address)
    except ValueError:  # a zone (`fe80::1%eth0`) too
        return False
    if isinstance(found, IPv4Address):
        return found.is_global and not any(found in network for network in NOT_PUBLIC_4)
    return _is_public_6(found)


def _is_public_6(address: IPv6Address) -> bool:
    if address.scope_id is not None or address not in PUBLIC_6:
        return False
    return address.is_global and not any(address in network for network in NOT_PUBLIC_6)
