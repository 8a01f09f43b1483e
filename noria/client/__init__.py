"""Clients of `/noria/v1`: `NoriaClient` waits for each answer, `AsyncNoriaClient` is awaited; the methods are the same.

Comes in: the server's URL, perhaps a key and a `Trust`. Goes out: typed results (`noria.client.shapes`); an error body
becomes the NoriaError it was. Must not import serve or train: it knows the wire only.
"""

from noria.client.asynchronous import AsyncNoriaClient
from noria.client.blocking import NoriaClient
from noria.client.errors import error_of
from noria.tls import Trust

__all__ = ["AsyncNoriaClient", "NoriaClient", "Trust", "error_of"]
