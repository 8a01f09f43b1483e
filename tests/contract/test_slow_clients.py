"""Clients that dawdle are told off and hung up on, while others are answered: HTTP and gRPC, over the fake engine."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from noria.settings import DoorSettings
from tests.contract.doors import GrpcDoor, HttpDoor, chat_body, chat_request
from tests.contract.fake_system import FakeSystem

DOORS = DoorSettings(
    head_s=1.0, body_window_s=1.0, body_bytes_per_s=64, stalled_s=1.5, message_s=1.0, messages=8, connections=40
)
PATIENCE_S = 30.0
ENDLESS: dict[str, Any] = {"ignore_eos": True, "temperature": 1, "store": False}


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeSystem]:
    """A system whose patience is short."""
    made = FakeSystem(Path(tmp_path_factory.mktemp("slow")) / "home", doors=DOORS)
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.mark.parametrize(
    ("said", "status", "reason"),
    [
        (b"", 408, "head_late"),
        (b"GET /noria/v1/status HTTP/1.1\r\nhost: a\r\n", 408, "head_late"),
        (b"\r\n\r\n", 408, "head_late"),
        (b"POST /noria/v1/jobs HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{", 408, "body_slow"),
        (b"POST /noria/v1/jobs HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{", 408, "body_slow"),
    ],
)
def test_half_a_request_is_given_up(fake: FakeSystem, said: bytes, status: int, reason: str) -> None:
    """It is answered with 408 and its connection ends; another request is answered meanwhile."""
    before = fake.ended[reason]  # type: ignore[index]
    with connected(fake) as one:
        one.sendall(said)
        answers(fake)
        answer = until_closed(one)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == reason
    assert fake.ended[reason] == before + 1  # type: ignore[index]


def test_a_byte_now_and_then_does_not_keep_a_head_open(fake: FakeSystem) -> None:
    """The time of a head is that of the whole, also on a connection that has been used before."""
    with connected(fake) as one:
        one.sendall(b"GET /noria/v1/status HTTP/1.1\r\nhost: a\r\n\r\n")
        assert one.recv(12) == b"HTTP/1.1 200"
        answer = b""
        for _ in range(200):
            try:
                one.sendall(b"\r\n")
                one.settimeout(0.1)
                answer += one.recv(65536)
            except TimeoutError:
                continue
            except OSError:
                break
            if b" 408 Request" in answer:
                break
    assert b"HTTP/1.1 408 " in answer


def test_a_head_has_a_largest_size(fake: FakeSystem) -> None:
    """More than 64 KiB of headers are refused before they have an end."""
    with connected(fake) as one:
        one.sendall(b"GET / HTTP/1.1\r\nhost: a\r\n")
        line = b"x-long: " + b"a" * 8000 + b"\r\n"
        try:
            for _ in range(40):
                one.sendall(line)
        except OSError:
            pass
        answer = until_closed(one)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431 ")  # a reset may overtake the words
    assert fake.ended["head_large"] == 1


def test_what_follows_a_body_has_a_largest_size(fake: FakeSystem) -> None:
    """Trailers are kept as headers are, so they end as those do."""
    before = fake.ended["head_large"]
    with connected(fake) as one:
        one.sendall(b"POST /noria/v1/jobs HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n")
        try:
            for _ in range(400):
                one.sendall(b"x-long: " + b"a" * 8000 + b"\r\n")
        except OSError:
            pass
        until_closed(one)
    assert fake.ended["head_large"] == before + 1


def test_so_many_requests_may_be_ahead_of_their_answers(fake: FakeSystem) -> None:
    """A few are answered in their order; thousands, which would all be kept, are not taken."""
    asked = b"GET /noria/v1/status HTTP/1.1\r\nhost: a\r\n\r\n"
    with connected(fake) as one:
        one.sendall(asked * 7 + asked.replace(b"host", b"connection: close\r\nhost"))
        said = until_closed(one)
    assert said.count(b"HTTP/1.1 200") == 8
    with connected(fake) as one:
        one.sendall(asked * 1000)
        assert b"HTTP/1.1 400 Bad Request" in until_closed(one)
    answers(fake)


UPGRADE = (
    b"GET /v1/realtime HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
    b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\nsec-websocket-version: 13\r\n\r\n"
)


@pytest.mark.parametrize("more", [b"GET /noria/v1/status HTTP/1.1\r\nhost: a\r\n\r\n", UPGRADE])
def test_a_client_that_leaves_ends_what_it_asked_for_first(fake: FakeSystem, more: bytes) -> None:
    """An endless answer ends with its connection, also where another request came after it."""
    settle(lambda: fake.gate.in_flight == 0)
    body = json.dumps({**chat_body("go on", None), **ENDLESS, "stream": True}).encode()
    with connected(fake) as one:
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        one.sendall(body)
        assert one.recv(12) == b"HTTP/1.1 200"
        one.sendall(more)
        time.sleep(0.2)
    settle(lambda: fake.gate.in_flight == fake.limits.load.demand == 0)


def test_a_body_that_arrives_in_pieces_is_taken(fake: FakeSystem) -> None:
    """What is slow but keeps the pace is no fault, however long it takes."""
    body = json.dumps({"completion_id": "nobody", "index": 0, "comment": "c" * 300}).encode()
    with connected(fake) as one:
        head = f"POST /noria/v1/feedback HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n"
        one.sendall(head.encode())
        for at in range(0, len(body), 40):
            time.sleep(0.2)
            one.sendall(body[at : at + 40])
        assert one.recv(12) == b"HTTP/1.1 404"


def test_a_reader_that_stops_is_hung_up_on(fake: FakeSystem) -> None:
    """An endless answer that nobody reads ends: its generation is closed, and nothing is held in memory for it."""
    body = json.dumps({**chat_body("go on", None), **ENDLESS, "stream": True}).encode()
    with connected(fake, buffer_bytes=4096) as one:
        one.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: {len(body)}\r\n\r\n".encode())
        one.sendall(body)
        assert one.recv(12) == b"HTTP/1.1 200"
        settle(lambda: fake.ended["unread"] == 1)
        answers(fake)
    settle(lambda: fake.gate.in_flight == 0)


def test_a_grpc_reader_that_stops_is_hung_up_on(fake: FakeSystem) -> None:
    """The same over gRPC, where the window is HTTP/2's: the call ends with UNAVAILABLE."""
    door = GrpcDoor(f"127.0.0.1:{fake.grpc_port}")
    call: Any = door.inference.StreamChatCompletion(
        chat_request("go on", None, temperature=1, extra={"ignore_eos": True}, store=False), timeout=4 * PATIENCE_S
    )
    next(call)
    settle(lambda: fake.gate.in_flight == 0)
    with pytest.raises(grpc.RpcError) as ended:
        for _ in call:
            pass
    assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    assert door.chat("hello", temperature=0)["model_version"] == "v1"


@pytest.mark.parametrize("said", [b"", b"PRI * HTTP/2.0\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_a_silent_grpc_connection_is_ended(fake: FakeSystem, said: bytes) -> None:
    """A connection whose handshake has no end is closed after `head_s`."""
    with socket.create_connection(("127.0.0.1", fake.grpc_port), timeout=PATIENCE_S) as one:
        one.sendall(said)
        assert GrpcDoor(f"127.0.0.1:{fake.grpc_port}").status()["serving"] == "v1"
        until_closed(one)


def test_grpc_messages_that_do_not_come_keep_nobody_out(fake: FakeSystem) -> None:
    """Forty calls that never say what they want: each ends in its time, and one that does is answered among them."""

    def never() -> Iterator[bytes]:
        time.sleep(PATIENCE_S)
        yield b""

    with grpc.insecure_channel(f"127.0.0.1:{fake.grpc_port}") as channel:
        begin = channel.stream_unary("/noria.v1.InferenceService/CreateChatCompletion")
        held = [begin.future(never(), timeout=PATIENCE_S) for _ in range(40)]
        assert GrpcDoor(f"127.0.0.1:{fake.grpc_port}").chat("what?")["choices"]
        assert {one.code() for one in held} == {grpc.StatusCode.INVALID_ARGUMENT}
    answers(fake)


def test_a_crowd_of_messages_is_read(fake: FakeSystem) -> None:
    """More at once than are read at once: all are answered."""
    door = GrpcDoor(f"127.0.0.1:{fake.grpc_port}")
    calls = [door.inference.CreateChatCompletion.future(chat_request(f"{n}" * 100_000, None)) for n in range(60)]
    assert all(one.result(PATIENCE_S).choices for one in calls)


def test_no_more_than_so_many_grpc_connections(fake: FakeSystem) -> None:
    """One too many is closed; when the others have gone there is room again."""
    with ExitStack() as stack:
        for _ in range(DOORS.connections + 5):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", fake.grpc_port), timeout=PATIENCE_S))
            one.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        assert until_closed(one) == b""
    answers(fake)


def test_no_more_than_so_many_connections(fake: FakeSystem) -> None:
    """One too many is answered with 503; when the others have gone, there is room again."""
    held = [connected(fake) for _ in range(60)]
    try:
        said = [until_closed(one)[:12] for one in held]
    finally:
        for one in held:
            one.close()
    assert set(said) == {b"HTTP/1.1 408", b"HTTP/1.1 503"}
    assert said.count(b"HTTP/1.1 503") >= 20
    answers(fake)


def connected(fake: FakeSystem, buffer_bytes: int | None = None) -> socket.socket:
    """A bare connection to the HTTP door, with a small receive buffer where one is asked for."""
    one = socket.socket()
    if buffer_bytes is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
    one.settimeout(PATIENCE_S)
    one.connect(("127.0.0.1", fake.http_port))
    return one


def until_closed(one: socket.socket) -> bytes:
    """What the server says before it ends the connection."""
    said = b""
    try:
        while piece := one.recv(65536):
            said += piece
    except ConnectionError:
        pass
    return said


def answers(fake: FakeSystem) -> None:
    """Asserts that somebody else is answered."""
    door = HttpDoor(f"http://127.0.0.1:{fake.http_port}")
    assert door.chat("hello", temperature=0)["model_version"] == "v1"
    door.client.close()


def settle(true: Any) -> None:
    """Waits for it."""
    until = time.monotonic() + 3 * PATIENCE_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)
