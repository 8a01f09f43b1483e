"""One address that samples, over HTTP or gRPC: the same four calls, the same JSON, the same errors.

Comes in: `http://host:port`, `https://..`, `grpc://..` or `grpcs://host:port` (TLS, as https). Goes out: a `Place`.
gRPC is the leaner of the two where prompts have pictures: they travel as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from noria.client import error_of
from noria.errors import InvalidRequest, NoriaError, Unavailable
from noria.records import Json
from noria.tls import Trust

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PIECE_BYTES = 2**20
QUICK_S = 30.0  # calls that do not generate
UPLOAD_S = 300.0


class Place(Protocol):
    """A server. Every method raises the NoriaError that it answered with, or Unavailable when nobody answers."""

    address: str

    def put_adapter(self, name: str, version: str, ttl_s: float, folder: Path) -> Json:
        """Loads peft's adapter from a folder here; the same bytes again begin its lease anew."""
        ...

    def delete_adapter(self, name: str) -> Json:
        """Unloads it."""
        ...

    def list_adapters(self) -> Json:
        """`data`, and the `version` that serves."""
        ...

    def sample(self, body: Json) -> Json:
        """A group."""
        ...

    def close(self) -> None:
        """Closes the connections."""
        ...


def place_at(
    address: str, *, api_key: str | None = None, timeout_s: float = 600.0, trust: Trust | None = None
) -> Place:
    """The place at an address. `timeout_s` bounds one group, its wait for a gap between users included.

    `trust` is for https and grpcs; none trusts the system's authorities. Raises InvalidRequest for an address of
    another kind, SettingsError for files of `trust` that cannot be used.
    """
    scheme, found, rest = address.rstrip("/").partition("://")
    secure = (trust or Trust()) if scheme in ("https", "grpcs") else None
    if found and rest and scheme in ("http", "https"):
        return HttpPlace(address.rstrip("/"), api_key, timeout_s, secure)
    if found and rest and scheme in ("grpc", "grpcs"):
        return GrpcPlace(address.rstrip("/"), rest, api_key, timeout_s, secure)
    raise InvalidRequest(
        f"{address}: a sampling address is http://host:port or grpc://host:port, with TLS https:// or grpcs://",
        param="addresses",
    )


def framed(folder: Path) -> Iterator[bytes]:
    """An adapter as the wire has it: the configuration's length in eight bytes, the configuration, the tensors."""
    config = (folder / CONFIG).read_bytes()
    yield len(config).to_bytes(8, "little") + config
    with (folder / WEIGHTS).open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


class HttpPlace:
    """Over HTTP."""

    def __init__(self, address: str, api_key: str | None, timeout_s: float, trust: Trust | None = None) -> None:
        import httpx

        self.address, self._timeout_s = address, timeout_s
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=32)
        verify: Any = True if trust is None else trust.context()
        self._http = httpx.Client(base_url=address, headers=headers, timeout=QUICK_S, limits=limits, verify=verify)

    def put_adapter(self, name: str, version: str, ttl_s: float, folder: Path) -> Json:
        """PUT /noria/v1/adapters/NAME."""
        params = {"version": version, "ttl_s": ttl_s}
        return self._call("PUT", _path(name), params=params, content=framed(folder), timeout=UPLOAD_S)

    def delete_adapter(self, name: str) -> Json:
        """DELETE /noria/v1/adapters/NAME."""
        return self._call("DELETE", _path(name))

    def list_adapters(self) -> Json:
        """GET /noria/v1/adapters."""
        return self._call("GET", "/noria/v1/adapters")

    def sample(self, body: Json) -> Json:
        """POST /noria/v1/samples."""
        return self._call("POST", "/noria/v1/samples", json=body, timeout=self._timeout_s)

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def _call(self, method: str, path: str, **more: Any) -> Json:
        import httpx

        try:
            answer = self._http.request(method, path, **more)
        except httpx.HTTPError as error:
            raise Unavailable(f"{self.address} does not answer ({error or type(error).__name__})") from error
        try:
            said: Any = answer.json()
        except ValueError:
            said = {}
        if answer.is_error:
            raise error_of(answer.status_code, said, answer.headers.get("retry-after"))
        if not isinstance(said, dict) or not said:
            raise Unavailable(f"{self.address} answered {answer.status_code} without JSON: is it a Noria server?")
        return said


class GrpcPlace:
    """Over gRPC."""

    def __init__(
        self, address: str, target: str, api_key: str | None, timeout_s: float, trust: Trust | None = None
    ) -> None:
        import grpc

        from noria.v1 import sampling_pb2_grpc

        self.address, self._timeout_s = address, timeout_s
        sizes = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]  # the server's limit holds
        # A channel that found nobody waits up to two minutes before it looks again; the pool has pauses of its own.
        again = [("grpc.initial_reconnect_backoff_ms", 200), ("grpc.max_reconnect_backoff_ms", 1000)]
        options = [*sizes, *again]
        if trust is None:
            self._channel = grpc.insecure_channel(target, options=options)
        else:
            self._channel = grpc.secure_channel(target, trust.channel_credentials(), options=options)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._stub = sampling_pb2_grpc.SamplingServiceStub(self._channel)

    def put_adapter(self, name: str, version: str, ttl_s: float, folder: Path) -> Json:
        """PutAdapter."""
        from noria.v1 import sampling_pb2 as pb

        first = pb.PutAdapterRequest(name=name, version=version, ttl_s=ttl_s)
        pieces = (pb.PutAdapterRequest(data=piece) for piece in framed(folder))
        return self._call(self._stub.PutAdapter, (one for part in ([first], pieces) for one in part), UPLOAD_S)

    def delete_adapter(self, name: str) -> Json:
        """DeleteAdapter."""
        from noria.v1 import sampling_pb2 as pb

        return self._call(self._stub.DeleteAdapter, pb.DeleteAdapterRequest(name=name), QUICK_S)

    def list_adapters(self) -> Json:
        """ListAdapters."""
        from noria.v1 import sampling_pb2 as pb

        return self._call(self._stub.ListAdapters, pb.ListAdaptersRequest(), QUICK_S)

    def sample(self, body: Json) -> Json:
        """SampleGroup."""
        from noria.sampling.messages import sample_request

        return self._call(self._stub.SampleGroup, sample_request(body), self._timeout_s)

    def close(self) -> None:
        """Closes the channel."""
        self._channel.close()

    def _call(self, method: Any, request: Any, timeout_s: float) -> Json:
        import grpc

        from noria.sampling.messages import as_json

        try:
            return as_json(method(request, timeout=timeout_s, metadata=self._metadata))
        except grpc.RpcError as error:
            raise self._error_of(error) from error

    def _error_of(self, error: Any) -> NoriaError:
        trailing = dict(error.trailing_metadata() or ())
        told = trailing.get("noria-error-bin")
        if told is not None:
            return error_of(0, json.loads(told), trailing.get("retry-after"))
        code = error.code().name
        if code == "RESOURCE_EXHAUSTED":  # gRPC's own word for a message over its limit: no other try would help
            return InvalidRequest(f"{self.address} takes no such message: {error.details()}", param="messages")
        return Unavailable(f"{self.address} does not answer ({code}: {error.details()})")


def _path(name: str) -> str:
    return f"/noria/v1/adapters/{quote(name, safe='')}"
