"""The rule of a server without keys: it listens on this machine's own addresses, or nowhere.

Comes in: the host that is asked for, whether any key exists. Goes out: nothing, or SettingsError.
Must not import the store or serve.
"""

from __future__ import annotations

import ipaddress
import socket

from noria.errors import SettingsError
from noria.settings import ServerSettings


def require_keys_beyond_loopback(server: ServerSettings, has_keys: bool) -> None:
    """Raises SettingsError where a server without keys would listen to other machines and nobody said `insecure`."""
    if has_keys or server.api_key or server.insecure or is_loopback(server.host):
        return
    raise SettingsError(
        f"server.host={server.host!r} is reachable from other machines and no key is configured: whoever reaches the "
        "port could do everything. Make a key (`noria keys create NAME --role client`), or listen on 127.0.0.1, or "
        "say --insecure (server.insecure=true) where something else keeps strangers out",
        param="server.host",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; a name is, where every address that it stands for is."""
    try:
        return _is_own(host)
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_is_own(str(one[4][0])) for one in found)


def _is_own(address: str) -> bool:
    """Raises ValueError for what is no address."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_loopback)
