"""The real server behind mutual TLS: who goes away stops the engine's work, by the engine's own counters; commands
find and trust the server; its health tells of its end before anything is cut."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from noria.client import NoriaClient
from noria.records import Json
from noria.sampling.places import place_at
from noria.tls import Trust
from noria.v1 import inference_pb2 as pb
from noria.v1 import inference_pb2_grpc
from tests.certificates import issue
from tests.servers import Server, publish_tiny, start_server

LONG = 1900  # tokens: many seconds of the tiny model
BODY: Json = {
    "model": "noria",
    "messages": [{"role": "user", "content": "which colour?"}],
    "temperature": 1,
    "max_tokens": LONG,
    "ignore_eos": True,
    "store": False,
}


@dataclass
class World:
    """The server, and both wires to it."""

    server: Server
    trust: Trust
    http: httpx.Client
    channel: grpc.Channel

    def environment(self) -> dict[str, str]:
        """What a shell has that may speak to the server."""
        trust = {"CA": self.trust.ca, "CERT": self.trust.cert, "KEY": self.trust.key}
        told = {f"NORIA_TLS_{name}": str(path) for name, path in trust.items()}
        return {**os.environ, "NORIA_HOME": str(self.server.home), **told}

    def counted(self, name: str) -> float:
        """The engine's counter or gauge."""
        text = self.http.get("/metrics").text
        found = re.findall(rf"^vllm:{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
        assert found, f"no vllm:{name} in /metrics"
        return sum(map(float, found))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A server on the tiny model that asks its callers for a certificate."""
    papers, home = issue(tmp_path_factory.mktemp("papers")), tmp_path_factory.mktemp("home")
    publish_tiny(home)
    tls = {f"NORIA_SERVER__TLS__{key.upper()}": str(path) for key, path in papers.server(mutual=True).items()}
    engine = {"NORIA_ENGINE__MAX_MODEL_LEN": "2048", "NORIA_ENGINE__KV_CACHE_GIB": "0.25"}
    trust = papers.trust(client="client")
    with start_server(home, **tls, **engine) as server:
        channel = grpc.secure_channel(server.grpc, trust.channel_credentials())
        with httpx.Client(base_url=server.url, verify=trust.context(), timeout=120) as http, channel:
            yield World(server, trust, http, channel)


def request(**more: Any) -> Any:
    """The long request as a message."""
    fields: Json = {"max_tokens": LONG, "temperature": 1.0, "store": False, **more}
    made = pb.CreateChatCompletionRequest(model="noria", extra_json='{"ignore_eos": true}', **fields)
    made.messages.add(role="user", content="which colour?")
    return made


def http_whole(world: World, under_way: Callable[[], None]) -> None:
    """A caller who closes the connection."""
    with httpx.Client(base_url=world.server.url, verify=world.trust.context()) as client:
        thread = threading.Thread(target=lambda: closed(lambda: client.post("/v1/chat/completions", json=BODY)))
        thread.start()
        under_way()
        for connection in client._transport._pool._connections:  # type: ignore[attr-defined]
            connection._connection._network_stream.get_extra_info("socket").shutdown(2)
        thread.join(30)
        assert not thread.is_alive()


def http_stream(world: World, under_way: Callable[[], None]) -> None:
    """A reader who stops reading and goes."""
    with world.http.stream("POST", "/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        lines = answer.iter_lines()  # kept: without it httpx would close the stream now
        next(lines)
        under_way()


def grpc_whole(world: World, under_way: Callable[[], None]) -> None:
    """A caller who cancels."""
    call = inference_pb2_grpc.InferenceServiceStub(world.channel).CreateChatCompletion.future(request())
    under_way()
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED


def grpc_stream(world: World, under_way: Callable[[], None]) -> None:
    """A reader who cancels."""
    call = inference_pb2_grpc.InferenceServiceStub(world.channel).StreamChatCompletion(request())
    next(call)
    under_way()
    call.cancel()
    assert call.code() is grpc.StatusCode.CANCELLED


def grpc_deadline(world: World, under_way: Callable[[], None]) -> None:
    """A deadline that passes."""
    call = inference_pb2_grpc.InferenceServiceStub(world.channel).CreateChatCompletion.future(request(), timeout=1.5)
    under_way()
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def grpc_stream_deadline(world: World, under_way: Callable[[], None]) -> None:
    """The same in a stream, whose pieces came until then."""
    call = inference_pb2_grpc.InferenceServiceStub(world.channel).StreamChatCompletion(request(), timeout=1.5)
    next(call)
    under_way()
    closed(lambda: list(call))
    assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def closed(call: Callable[[], object]) -> None:
    """Makes a call that is cut off."""
    with suppress(httpx.HTTPError, grpc.RpcError):
        call()


WAYS = [http_whole, http_stream, grpc_whole, grpc_stream, grpc_deadline, grpc_stream_deadline]


@pytest.mark.parametrize("go_away", WAYS, ids=[way.__name__ for way in WAYS])
def test_who_goes_away_stops_the_generation(world: World, go_away: Callable[..., None]) -> None:
    """The engine runs nothing any more, and gave far fewer tokens than were asked for."""
    begun = world.counted("generation_tokens_total")

    def under_way() -> None:
        until(lambda: world.counted("generation_tokens_total") > begun and world.counted("num_requests_running") == 1)

    go_away(world, under_way)
    until(lambda: world.counted("num_requests_running") + world.counted("num_requests_waiting") == 0)
    given = world.counted("generation_tokens_total")
    assert 0 < given - begun < LONG
    time.sleep(1.0)
    assert world.counted("generation_tokens_total") == given
    with NoriaClient(world.server.url, trust=world.trust) as client:
        until(lambda: client.status()["in_flight"] == 0)


def until(holds: Callable[[], bool]) -> None:
    """Waits for it, half a minute at most."""
    for _ in range(600):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about")


def test_the_address_says_https_and_commands_use_it(world: World) -> None:
    """Where the server is, `noria status` finds out by itself; whom it trusts, by NORIA_TLS_CA."""
    assert world.server.url.startswith("https://127.0.0.1:")
    assert f"on {world.server.url} and grpc {world.server.grpc}" in world.server.log.read_text()
    done = noria("status", "--json", env=world.environment())
    assert (done.returncode, json.loads(done.stdout)["live"]) == (0, "v1"), done.stderr
    without = {key: value for key, value in world.environment().items() if not key.startswith("NORIA_TLS_")}
    done = noria("status", env=without)
    assert done.returncode == 7
    assert "is not trusted" in done.stderr and "NORIA_TLS_CA" in done.stderr


def noria(*words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command."""
    command = [sys.executable, "-m", "noria", *words]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_sampling_speaks_tls(world: World) -> None:
    """Over both kinds of address, with the same tokens."""
    body = {"messages": BODY["messages"], "max_tokens": 6, "temperature": 0}
    groups = []
    for address in (world.server.url, f"grpcs://{world.server.grpc}"):
        place = place_at(address, trust=world.trust)
        groups.append(place.sample(body)["samples"][0]["token_ids"])
        place.close()
    assert groups[0] == groups[1] and len(groups[0]) > 0


def test_a_certificate_that_is_not_of_its_key_stops_the_start(world: World, tmp_path: Path) -> None:
    """In one line, before anything slow begins."""
    papers = issue(tmp_path)
    env = {
        **world.environment(),
        "NORIA_HOME": str(tmp_path / "home"),
        "NORIA_SERVER__TLS__CERT": str(papers.pair("a")[0]),
        "NORIA_SERVER__TLS__KEY": str(papers.pair("b")[1]),
    }
    done = noria("serve", "--http-port", "0", env=env)
    assert done.returncode == 2
    assert "b.key is not the key of the certificate in" in done.stderr


def test_health_tells_of_the_end_before_anything_is_cut(world: World) -> None:
    """Last: the server ends. A stream that runs is answered to its end; who watches the health knows at once."""
    stub = health_pb2_grpc.HealthStub(world.channel)
    watching = stub.Watch(health_pb2.HealthCheckRequest(service="noria.v1.InferenceService"), timeout=60)
    assert next(watching).status == health_pb2.HealthCheckResponse.SERVING
    asked = request(max_tokens=150)
    pieces = inference_pb2_grpc.InferenceServiceStub(world.channel).StreamChatCompletion(asked, timeout=60)
    next(pieces)
    world.server.process.send_signal(signal.SIGTERM)
    assert [one.status for one in watching] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    last = list(pieces)[-1]
    assert last.usage.completion_tokens == 150
    assert world.server.stop() == 0
