"""The limits hold over both wires together, say truly when to come back, and outlive the server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from noria.records import Json
from noria.settings import DoorSettings, Settings
from noria.store import Store
from tests.contract.doors import Door, GrpcDoor, HttpDoor, Refused, chat_body, chat_request
from tests.contract.fake_system import FakeSystem
from tests.contract.test_sampling import waited

NOON = 1_800_000_000.0 - 1_800_000_000.0 % 86_400 + 43_200
ENDLESS: Json = {"ignore_eos": True}


class Clocks:
    """Both clocks of a fake system, moved by hand."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def start(self, home: Path, limits: Json, **more: Any) -> FakeSystem:
        """A started system on these clocks."""
        fake = FakeSystem(home, limits=limits, **more)
        fake.monotonic_ns = lambda: int(self.passed_s * 1e9)
        fake.wall = lambda: NOON + self.passed_s
        fake.start()
        return fake


@pytest.fixture
def clocks() -> Clocks:
    """At noon."""
    return Clocks()


@pytest.fixture
def running() -> Iterator[list[FakeSystem]]:
    """Systems to be stopped at the end."""
    started: list[FakeSystem] = []
    yield started
    for one in started:
        one.stop()


def doors(fake: FakeSystem) -> list[Door]:
    """Both."""
    return [HttpDoor(f"http://127.0.0.1:{fake.http_port}"), GrpcDoor(f"127.0.0.1:{fake.grpc_port}")]


def endless(door: Door) -> Any:
    """A stream that ends only when it is closed, its first chunk read."""
    stream: Any = door.stream("yes", **(ENDLESS if door.name == "http" else {"extra": ENDLESS}))
    next(stream)
    return stream


def refusals(fake: FakeSystem) -> list[tuple[str, Json]]:
    """How a chat is refused at each door: `Retry-After`, and the error object."""
    answer = httpx.post(f"http://127.0.0.1:{fake.http_port}/v1/chat/completions", json=chat_body("x", None))
    assert answer.status_code in (429, 503), answer.text
    with grpc.insecure_channel(f"127.0.0.1:{fake.grpc_port}") as channel, pytest.raises(grpc.RpcError) as refused:
        GrpcDoor(f"127.0.0.1:{fake.grpc_port}").inference.CreateChatCompletion(chat_request("x", None), timeout=20)
        channel.close()
    details = dict(refused.value.trailing_metadata())
    expected = {429: grpc.StatusCode.RESOURCE_EXHAUSTED, 503: grpc.StatusCode.UNAVAILABLE}
    assert refused.value.code() == expected[answer.status_code]
    said = json.loads(details["noria-error-bin"])["error"]
    return [(answer.headers["retry-after"], answer.json()["error"]), (details["retry-after"], said)]


def limits_of(fake: FakeSystem) -> Json:
    """GET /noria/v1/limits."""
    said: Json = httpx.get(f"http://127.0.0.1:{fake.http_port}/noria/v1/limits").json()
    return said


def test_without_settings_nothing_is_limited(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """No header, no refusal; what would be limited is told all the same."""
    fake = clocks.start(tmp_path / "home", {})
    running.append(fake)
    for door in doors(fake) * 10:
        door.chat("x")
    answer = httpx.post(f"http://127.0.0.1:{fake.http_port}/v1/chat/completions", json=chat_body("x", None))
    assert [key for key in answer.headers if key.startswith("x-ratelimit")] == []
    said = limits_of(fake)
    assert said["requests_per_minute"]["limit"] is said["concurrent_requests"]["limit"] is None
    assert said["preferences_per_hour"] == {"limit": None, "used": None}
    assert said["tokens_per_day"]["limit"] is None and said["tokens_per_day"]["used"] > 0


def test_requests_a_minute(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """Counted over both doors; whoever waits as long as was said is let in, a moment earlier is not."""
    fake = clocks.start(tmp_path / "home", {"requests_per_minute": 4})
    running.append(fake)
    http, rpc = doors(fake)
    http.chat("x")
    clocks.passed_s += 10.25
    rpc.chat("x")
    list(http.stream("x"))
    list(rpc.stream("x"))
    for retry_after, error in refusals(fake):
        assert retry_after == "50"  # 49.75 s, in whole seconds
        assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    clocks.passed_s += 49.74
    for retry_after, _ in refusals(fake):
        assert retry_after == "1"
    clocks.passed_s += 0.01
    http.chat("x")
    assert [one[0] for one in refusals(fake)] == ["11", "11"]
    clocks.passed_s += 11
    rpc.chat("x")
    assert fake.limits.refused["requests_per_minute"] == 6


def test_openai_s_headers(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """On answers and on refusals."""
    fake = clocks.start(tmp_path / "home", {"requests_per_minute": 2})
    running.append(fake)
    seen = []
    for _ in range(3):
        answer = httpx.post(f"http://127.0.0.1:{fake.http_port}/v1/chat/completions", json=chat_body("x", None))
        seen.append([answer.status_code, *(answer.headers[f"x-ratelimit-{one}-requests"] for one in FIELDS)])
        clocks.passed_s += 1.5
    assert seen == [[200, "2", "1", "1m0s"], [200, "2", "0", "1m0s"], [429, "2", "0", "58.5s"]]
    assert "x-ratelimit-limit-requests" not in httpx.get(f"http://127.0.0.1:{fake.http_port}/noria/v1/status").headers


FIELDS = ("limit", "remaining", "reset")


def test_concurrent_requests(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """A stream holds its place to its end; a client who goes away gives it back, at either door."""
    fake = clocks.start(tmp_path / "home", {"concurrent_requests": 2})
    running.append(fake)
    http, rpc = doors(fake)
    streams = [endless(http), endless(rpc)]
    assert limits_of(fake)["concurrent_requests"] == {"limit": 2, "used": 2}
    for retry_after, error in refusals(fake):
        assert retry_after == "1" and error["code"] == "rate_limit_exceeded"
    for stream, door in zip(streams, (http, rpc), strict=True):
        stream.close()
        assert waited(lambda: limits_of(fake)["concurrent_requests"]["used"] == 1)
        streams[0 if door is http else 1] = endless(door)
        assert limits_of(fake)["concurrent_requests"]["used"] == 2
    for stream in streams:
        stream.close()
    assert waited(lambda: limits_of(fake)["concurrent_requests"]["used"] == 0)
    assert fake.limits.load.demand == 0 and fake.limits.load.body_bytes == 0
    with pytest.raises(Refused):
        http.chat("x", model="nobody")  # what fails inside gives its place back, too
    assert limits_of(fake)["concurrent_requests"]["used"] == 0


def test_tokens_a_day(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """Counted as the usage counts them, kept over a restart, let in again after midnight UTC."""
    home = tmp_path / "home"
    first = clocks.start(home, {"tokens_per_day": 400})
    running.append(first)
    http, rpc = doors(first)
    used = http.chat("x", n=2)["usage"]["total_tokens"]
    assert limits_of(first)["tokens_per_day"]["used"] == used
    used += rpc.chat("x")["usage"]["total_tokens"]
    used += list(http.stream("x"))[-1]["usage"]["total_tokens"]
    used += list(rpc.stream("x", n=2))[-1]["usage"]["total_tokens"]
    assert limits_of(first)["tokens_per_day"]["used"] == used
    first.stop()
    second = clocks.start(home, {"tokens_per_day": used + 1})
    running.append(second)
    assert limits_of(second)["tokens_per_day"] == {"limit": used + 1, "used": used, "reset_s": 43_200.0}
    doors(second)[0].chat("x")  # the last one in may go past it
    for retry_after, error in refusals(second):
        assert retry_after == "43200"
        assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    clocks.passed_s += 43_200
    doors(second)[1].chat("x")


def test_a_cancelled_stream_s_tokens_count(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """The prompt, and what was generated until then."""
    fake = clocks.start(tmp_path / "home", {})
    running.append(fake)
    before = 0
    for door in doors(fake):
        stream = endless(door)
        for _ in range(8):
            next(stream)
        stream.close()
        assert waited(lambda: fake.limits.load.demand == 0)
        now = limits_of(fake)["tokens_per_day"]["used"]
        assert now - before >= len(json.dumps(chat_body("yes", None)["messages"])) + 8
        before = now


def stored(fake: FakeSystem, door: Door) -> Json:
    """A preference's body over an answer of two choices, committed."""
    id_ = door.chat("which?", n=2)["id"]
    return {"chosen": {"completion_id": id_, "index": 0}, "rejected": {"completion_id": id_, "index": 1}}


def test_preferences_an_hour(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """Preferences and feedback together, over both doors and a restart; what records nothing does not count."""
    home = tmp_path / "home"
    fake = clocks.start(home, {"preferences_per_hour": 3})
    running.append(fake)
    http, rpc = doors(fake)
    pair = stored(fake, http)
    assert http.prefer({**pair, "annotator": "a"})["created"]
    clocks.passed_s += 100.5
    assert not rpc.prefer({**pair, "annotator": "a"})["created"]  # said before
    for door in (http, rpc):
        with pytest.raises(Refused) as refused:
            door.feedback({"completion_id": "chatcmpl-none", "index": 0, "thumb": "up"})
        assert refused.value.code == "completion_not_found"
    rpc.feedback({"completion_id": pair["chosen"]["completion_id"], "index": 0, "thumb": "up"})
    assert rpc.prefer({**pair, "annotator": "b"})["created"]
    assert limits_of(fake)["preferences_per_hour"] == {"limit": 3, "used": 3}
    fake.stop()
    again = clocks.start(home, {"preferences_per_hour": 3})
    running.append(again)
    for door in doors(again):
        with pytest.raises(Refused) as refused:
            door.prefer({**pair, "annotator": "c"})
        assert "3 preferences and feedback an hour" in refused.value.message
        assert (refused.value.status, refused.value.code) == ("RESOURCE_EXHAUSTED", "rate_limit_exceeded")
        with pytest.raises(Refused):
            door.feedback({"completion_id": pair["chosen"]["completion_id"], "index": 0, "thumb": "down"})
    answer = httpx.post(f"http://127.0.0.1:{again.http_port}/noria/v1/preferences", json={**pair, "annotator": "c"})
    assert answer.headers["retry-after"] == "3500"  # 3499.5 s
    clocks.passed_s += 3500
    assert doors(again)[1].prefer({**pair, "annotator": "c"})["created"]
    with Store.open(Settings(home=home).store_url) as store:
        assert store.preference_counts()["total"] == 3


def test_overload_sheds_and_those_inside_end(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """Four run, two wait, the seventh is told to come back, at either door; nobody inside notices."""
    fake = clocks.start(tmp_path / "home", {"waiting": 2})
    running.append(fake)
    http, rpc = doors(fake)
    held = [endless(door) for door in (http, rpc) * 3]
    assert (fake.limits.load.demand, fake.limits.load.waiting) == (6, 2)
    for retry_after, error in refusals(fake):
        assert 1 <= int(retry_after) <= 60
        assert (error["type"], error["code"]) == ("service_unavailable_error", "overloaded")
    assert doors(fake)[0].status()["in_flight"] == 6  # what asks nothing of the engine is answered
    for stream in held:
        assert next(stream)["choices"][0]["delta"]["content"]
    held.pop().close()
    assert waited(lambda: fake.limits.load.waiting == 1)
    rpc.chat("x")
    for stream in held:
        stream.close()
    assert waited(lambda: fake.limits.load.demand == 0)
    assert fake.limits.refused["waiting"] == 2


def test_choices_count_as_sequences(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """What one request splits into is bounded, too."""
    fake = clocks.start(tmp_path / "home", {"waiting": 2})
    running.append(fake)
    for door in doors(fake):
        with pytest.raises(Refused) as refused:
            door.chat("x", n=13)
        assert "takes 12" in refused.value.message
        assert (refused.value.status, refused.value.code) == ("INVALID_ARGUMENT", "too_many_sequences")
        door.chat("x", n=12)
    stream = doors(fake)[0].stream("x", n=12, **ENDLESS)
    next(stream)
    for retry_after, error in refusals(fake):
        assert int(retry_after) >= 1 and error["code"] == "overloaded"
    stream.close()  # type: ignore[attr-defined]
    assert waited(lambda: fake.limits.load.demand == 0)


def test_bodies_in_flight_are_bounded(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """By what is declared, before it is sent; by what arrives, where nothing is declared; given back at the end."""
    fake = clocks.start(tmp_path / "home", {"body_bytes_in_flight": 2**20})
    running.append(fake)
    url = f"http://127.0.0.1:{fake.http_port}/v1/chat/completions"
    with socket.create_connection(("127.0.0.1", fake.http_port), timeout=20) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n{")
        assert waited(lambda: fake.limits.load.body_bytes == 900_000)
        body = chat_body("x" * 200_000, None)
        answer = httpx.post(url, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "overloaded")
        assert "retry-after" in answer.headers
        pieces = (json.dumps(body).encode()[at : at + 50_000] for at in range(0, 250_000, 50_000))
        assert httpx.post(url, content=pieces).status_code == 503
        with pytest.raises(Refused) as refused:
            doors(fake)[1].chat("x" * 200_000)
        assert (refused.value.status, refused.value.code) == ("UNAVAILABLE", "overloaded")
        assert httpx.post(url, json=chat_body("x", None)).status_code == 200
    assert waited(lambda: fake.limits.load.body_bytes == 0)
    assert httpx.post(url, json=body).status_code == 200
    for door in doors(fake):
        with pytest.raises(Refused) as refused:
            door.chat("x" * 2**20)
        assert "1048576" in refused.value.message
        assert (refused.value.status, refused.value.code) == ("INVALID_ARGUMENT", "request_too_large")
    assert fake.limits.load.body_bytes == fake.limits.load.demand == 0


def test_a_body_that_never_comes_gives_its_place_back(
    tmp_path: Path, clocks: Clocks, running: list[FakeSystem]
) -> None:
    """Half a body and then nothing: refused, and the place is free."""
    patience = DoorSettings(body_window_s=0.3)
    fake = clocks.start(tmp_path / "home", {"concurrent_requests": 1}, doors=patience)
    running.append(fake)
    with socket.create_connection(("127.0.0.1", fake.http_port), timeout=20) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 90\r\n\r\n{")
        said = b"".join(iter(lambda: sock.recv(4096), b""))  # to its end: the line is closed
    assert said.startswith(b"HTTP/1.1 408") and b"body_slow" in said
    assert waited(lambda: fake.limits.load.demand == 0)
    doors(fake)[0].chat("x")


def test_a_refusal_comes_before_the_body(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """Over HTTP the head alone is enough; over gRPC the call is ended before its message is asked for."""
    fake = clocks.start(tmp_path / "home", {"requests_per_minute": 1})
    running.append(fake)
    doors(fake)[0].chat("x")
    with socket.create_connection(("127.0.0.1", fake.http_port), timeout=20) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900000\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 429")
    with grpc.insecure_channel(f"127.0.0.1:{fake.grpc_port}") as channel:
        method = channel.stream_unary("/noria.v1.InferenceService/CreateChatCompletion")
        asked = []

        def slowly() -> Iterator[bytes]:
            time.sleep(5)
            asked.append(True)
            yield b""

        with pytest.raises(grpc.RpcError) as refused:
            method(slowly(), timeout=4)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and not asked


def test_samples_are_no_user_s(tmp_path: Path, clocks: Clocks, running: list[FakeSystem]) -> None:
    """A trainer's groups take no place and no tokens of anybody's."""
    limits = {"requests_per_minute": 1, "concurrent_requests": 1, "tokens_per_day": 1, "waiting": 1}
    fake = clocks.start(tmp_path / "home", limits)
    running.append(fake)
    url = f"http://127.0.0.1:{fake.http_port}/noria/v1/samples"
    with ThreadPoolExecutor() as threads:
        body = {"messages": [{"role": "user", "content": "one"}], "n": 2}
        answers = list(threads.map(lambda _: httpx.post(url, json=body), range(4)))
    assert [one.status_code for one in answers] == [200] * 4
    assert limits_of(fake)["tokens_per_day"]["used"] == 0
