"""A client's side of TLS: whom it trusts and what it shows, for HTTP and gRPC alike.

Comes in: names of PEM files. Goes out: an `ssl.SSLContext` for httpx, channel credentials for gRPC. A file that is
missing, unreadable or no PEM is a SettingsError that names the setting. Must not import grpc or httpx at import.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from noria.errors import SettingsError


@dataclass(frozen=True)
class Trust:
    """`ca`: authorities whose servers are trusted, none being the system's own. `cert` and `key` are what this side
    shows to a server that asks (mutual TLS). All are PEM files.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For httpx, as `verify`. Raises SettingsError."""
        self._both()
        if self.ca is not None:
            read_pem(self.ca, "tls_ca")
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca.expanduser()))
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(f"tls_ca: {self.ca} holds no certificates: {error}", param="tls_ca") from error
        if self.cert is not None and self.key is not None:
            load_pair(context, self.cert, self.key, ("tls_cert", "tls_key"))
        return context

    def channel_credentials(self) -> Any:
        """For `grpc.secure_channel`. Raises SettingsError."""
        import grpc

        self.context()  # gRPC would take any bytes, and say only at the first call that they were none
        system = ssl.get_default_verify_paths().cafile  # gRPC would take authorities that it brings along
        ca = self.ca or (None if system is None else Path(system))
        return grpc.ssl_channel_credentials(
            None if ca is None else read_pem(ca, "tls_ca"),
            None if self.key is None else read_pem(self.key, "tls_key"),
            None if self.cert is None else read_pem(self.cert, "tls_cert"),
        )

    def _both(self) -> None:
        if (self.cert is None) != (self.key is None):
            missing, given = ("tls_key", "tls_cert") if self.key is None else ("tls_cert", "tls_key")
            raise SettingsError(f"{given} is set without {missing}: a client's certificate needs both", param=missing)


def read_pem(path: Path, setting: str) -> bytes:
    """The file's bytes. Raises SettingsError, naming the setting, where it cannot be read."""
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting}: cannot read {path}: {error.strerror or error}", param=setting) from error


def load_pair(context: ssl.SSLContext, cert: Path, key: Path, settings: tuple[str, str]) -> None:
    """Puts a certificate and its key into the context. Raises SettingsError naming the file at fault."""
    read_pem(cert, settings[0])
    read_pem(key, settings[1])
    try:
        context.load_cert_chain(cert.expanduser(), key.expanduser(), password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            said = f"{key} is not the key of the certificate in {cert}"
        else:
            said = f"{cert} and {key} are no certificate and key in PEM without a passphrase ({error.reason or error})"
        raise SettingsError(f"{settings[0]}, {settings[1]}: {said}", param=settings[0]) from error


def _no_passphrase() -> str:
    """Without this, OpenSSL would ask on the terminal."""
    return ""
