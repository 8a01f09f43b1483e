"""Certificates made for a test: an authority, a server's for 127.0.0.1, a client's, and strangers.

Comes in: a folder. Goes out: PEM files in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme

from noria.records import Json
from noria.tls import Trust


@dataclass
class Papers:
    """What an operator would have; `authority` can issue more."""

    folder: Path
    authority: trustme.CA

    @property
    def ca(self) -> Path:
        """The authority's certificate."""
        return self.folder / "ca.pem"

    def pair(self, name: str, *, authority: trustme.CA | None = None) -> tuple[Path, Path]:
        """A certificate for 127.0.0.1 and localhost, and its key; made anew each time."""
        issued = (authority or self.authority).issue_cert("127.0.0.1", "localhost", common_name=name)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        return cert, key

    def server(self, *, mutual: bool = False) -> Json:
        """`server.tls` of the settings."""
        cert, key = self.pair("server")
        return {"cert": cert, "key": key, **({"client_ca": self.ca} if mutual else {})}

    def trust(self, *, client: str | None = None) -> Trust:
        """A client that trusts the authority, and perhaps has a certificate of it."""
        cert, key = self.pair(client) if client else (None, None)
        return Trust(self.ca, cert, key)


def issue(folder: Path) -> Papers:
    """An authority in the folder."""
    papers = Papers(folder, trustme.CA())
    papers.authority.cert_pem.write_to_path(papers.ca)
    return papers
