"""gRPC's connections as the settings have them: message sizes, packing, pings, ages; and the health of each service."""

from __future__ import annotations

import socket
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from noria.settings import GrpcSettings
from noria.v1 import feedback_pb2, feedback_pb2_grpc, inference_pb2, inference_pb2_grpc
from serve.api.grpc.server import connection_options
from tests.contract.conftest import System, fake_system
from tests.contract.doors import GrpcDoor

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
EDIT = "a much better answer, that says everything; " * 50


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where systems of this module live."""
    return tmp_path_factory.mktemp("connections")


def ask(text: str, **more: Any) -> Any:
    """A chat request."""
    made = inference_pb2.CreateChatCompletionRequest(**more)
    made.messages.add(role="user", content=text)
    return made


def test_settings_are_the_arguments_of_grpc() -> None:
    """Milliseconds and bytes; no age unless one is set."""
    plain = dict(connection_options(GrpcSettings(), 20.0))
    assert plain["grpc.max_receive_message_length"] == plain["grpc.max_send_message_length"] == 64 * 2**20
    assert (plain["grpc.keepalive_time_ms"], plain["grpc.keepalive_timeout_ms"]) == (60_000, 20_000)
    assert plain["grpc.keepalive_permit_without_calls"] == 1
    assert plain["grpc.http2.min_ping_interval_without_data_ms"] == 10_000
    assert plain["grpc.http2.max_ping_strikes"] == 2
    assert "grpc.max_connection_age_ms" not in plain
    aged = dict(connection_options(GrpcSettings(max_connection_age_s=90, permit_without_calls=False), 5.0))
    assert (aged["grpc.max_connection_age_ms"], aged["grpc.max_connection_age_grace_ms"]) == (90_000, 5_000)
    assert aged["grpc.keepalive_permit_without_calls"] == 0


def test_a_message_over_the_limit_is_refused(home: Path) -> None:
    """And one below it is not."""
    with fake_system(home / "small", server={"grpc": {"max_message_mib": 1}}) as system:
        stub = system.grpc.inference
        assert stub.CreateChatCompletion(ask("a" * 900_000), timeout=30).model_version == "v1"
        with pytest.raises(grpc.RpcError) as refusal:
            stub.CreateChatCompletion(ask("a" * 1_100_000), timeout=30)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_an_old_connection_is_made_anew(home: Path) -> None:
    """Behind a caller's back: its calls go on."""
    with fake_system(home / "aged", server={"grpc": {"max_connection_age_s": 1}}) as system, relay(system) as wire:
        door = GrpcDoor(wire.address)
        for _ in range(100):
            assert door.status()["live"] == "v1"
            if wire.connections > 1:
                break
            wire.pause(0.05)
        assert wire.connections > 1


class Relay:
    """A TCP relay that counts connections and the server's bytes."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.connections = self.given = 0
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def pause(self, pause_s: float) -> None:
        """Waits a little."""
        self._over.wait(pause_s)

    def close(self) -> None:
        """Takes no more connections."""
        self._over.set()
        self._listening.close()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(("127.0.0.1", self._port))
            threading.Thread(target=self._carry, args=(client, server, False), daemon=True).start()
            threading.Thread(target=self._carry, args=(server, client, True), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        try:
            while data := source.recv(65536):
                self.given += len(data) if counted else 0
                sink.sendall(data)
        except OSError:
            return
        finally:
            sink.close()


@contextmanager
def relay(system: System) -> Iterator[Relay]:
    """A relay before the system's gRPC."""
    assert system.fake is not None
    made = Relay(system.fake.grpc_port)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(("compression", "packed"), [("gzip", True), ("none", False)])
def test_answers_are_packed(home: Path, compression: str, packed: bool) -> None:
    """A page of long texts takes a fraction of its bytes; a packed request is taken either way."""
    with (
        fake_system(home / compression, server={"grpc": {"compression": compression}}) as system,
        relay(system) as wire,
    ):
        id_ = system.grpc.chat("hello")["id"]
        system.grpc.feedback({"completion_id": id_, "index": 0, "edit": EDIT})
        channel = grpc.insecure_channel(wire.address)
        stub = feedback_pb2_grpc.FeedbackServiceStub(channel)
        listing = feedback_pb2.ListFeedbackRequest()
        stub.ListFeedback(listing, timeout=30)  # the connection's own bytes
        wire.pause(0.2)
        before = wire.given
        page = stub.ListFeedback(listing, timeout=30, compression=grpc.Compression.Gzip)
        assert page.data[0].edit == EDIT
        wire.pause(0.2)
        given, size = wire.given - before, page.ByteSize()
        assert (given < size / 2) is packed, (given, size)
        assert len(zlib.compress(page.SerializeToString())) < size / 2
        channel.close()


def test_pieces_of_streams_are_not_packed(home: Path) -> None:
    """A few words would grow by it; they arrive whole."""
    with fake_system(home / "pieces") as system:
        stub = inference_pb2_grpc.InferenceServiceStub(system.grpc.channel)
        pieces = list(stub.StreamChatCompletion(ask("hello"), timeout=30, compression=grpc.Compression.Gzip))
        assert pieces[-1].usage.completion_tokens == 5


def test_a_lost_engine_is_not_healthy(home: Path) -> None:
    """What needs the engine stops serving, for those who watch too; judging goes on. At its end nothing serves."""
    with fake_system(home / "lost") as system:
        assert system.fake is not None
        stub = health_pb2_grpc.HealthStub(system.grpc.channel)

        def said(service: str) -> int:
            return int(stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status)

        names = ("", *(f"noria.v1.{one}Service" for one in ("Inference", "Sampling", "Feedback", "Operator")))
        assert {said(name) for name in names} == {SERVING}
        request = health_pb2.HealthCheckRequest(service="noria.v1.FeedbackService")
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=""), timeout=30)
        other = stub.Watch(request, timeout=30)
        assert next(watch).status == next(other).status == SERVING
        fake = system.fake
        fake.on_loop(lambda: fake.gate.fail("the engine lost its weights"))
        assert next(watch).status == NOT_SERVING
        assert [said(name) for name in names] == [NOT_SERVING] * 3 + [SERVING] * 2
        fake.on_loop(fake.health.close)
        assert {said(name) for name in names} == {NOT_SERVING}
        assert [one.status for one in other] == [NOT_SERVING]
        assert list(watch) == []
