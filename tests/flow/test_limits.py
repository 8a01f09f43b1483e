"""Limits over real vLLM: tokens are counted as its usage counts them, and overload is shed while those inside end."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from PIL import Image

from noria.records import Json
from noria.store import Store
from noria.v1 import inference_pb2_grpc
from tests.contract.doors import chat_request
from tests.servers import Server, publish_tiny, start_server

QUESTION = [{"role": "user", "content": "Which colour is the sky?"}]
LONG: Json = {"max_tokens": 1900, "ignore_eos": True}
SETTINGS = {
    "NORIA_ENGINE__KV_CACHE_GIB": "0.25",
    "NORIA_ENGINE__MAX_MODEL_LEN": "2048",
    "NORIA_ENGINE__MAX_NUM_SEQS": "2",
    "NORIA_LIMITS__WAITING": "3",
    "NORIA_LIMITS__REQUESTS_PER_MINUTE": "10000",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that runs two sequences and lets three more wait."""
    home = tmp_path_factory.mktemp("home")
    publish_tiny(home)
    with start_server(home, **SETTINGS) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def used(http: httpx.Client) -> int:
    """The day's tokens."""
    return int(http.get("/noria/v1/limits").json()["tokens_per_day"]["used"])


def metric(http: httpx.Client, name: str) -> float:
    """One of `/metrics`."""
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rpartition(" ")[2])


def settled(http: httpx.Client) -> int:
    """The day's tokens, once nobody is inside."""
    until = time.monotonic() + 60
    while metric(http, "noria_requests_inside") and time.monotonic() < until:
        time.sleep(0.05)
    assert metric(http, "noria_requests_inside") == 0
    return used(http)


def post(http: httpx.Client, path: str, **body: Any) -> Json:
    """An answer. Its head names what is left."""
    answer = http.post(path, json={"model": "noria", **body})
    assert answer.status_code == 200, answer.text
    assert int(answer.headers["x-ratelimit-remaining-requests"]) < 10_000
    said: Json = answer.json()
    return said


def picture() -> str:
    """A red square as a data: URL."""
    out = io.BytesIO()
    Image.new("RGB", (48, 48), (200, 30, 40)).save(out, "PNG")
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


def test_every_route_counts_what_its_usage_says(http: httpx.Client, server: Server) -> None:
    """Whole and streamed, with a picture, with choices, with several prompts, over both wires."""
    before = settled(http)
    seen = [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "What is it?"}]
    usages = [
        post(http, "/v1/chat/completions", messages=QUESTION, max_tokens=9)["usage"],
        post(http, "/v1/chat/completions", messages=[{"role": "user", "content": seen}], n=2, max_tokens=7)["usage"],
        post(http, "/v1/completions", prompt=["one", "two three"], n=2, max_tokens=5)["usage"],
        post(http, "/v1/responses", input="Which colour?", max_output_tokens=8)["usage"],
        post(http, "/v1/messages", messages=QUESTION, max_tokens=6)["usage"],
    ]
    for path, body in (("/v1/chat/completions", {"messages": QUESTION}), ("/v1/completions", {"prompt": "one"})):
        more = {"model": "noria", "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 11, "n": 2}
        with http.stream("POST", path, json={**body, **more}) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        usages.append(chunks[-1]["usage"])
    with grpc.insecure_channel(server.grpc) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        usages.append({"total_tokens": stub.CreateChatCompletion(chat_request("x", None)).usage.total_tokens})
    totals = [one.get("total_tokens") or one["input_tokens"] + one["output_tokens"] for one in usages]
    assert min(totals) > 0 and settled(http) - before == sum(totals)


def test_what_a_client_left_is_counted(http: httpx.Client) -> None:
    """A stream that is closed, and an answer that nobody waited for: the prompt and the tokens that were made."""
    prompt = post(http, "/v1/chat/completions", messages=QUESTION, max_tokens=1)["usage"]["prompt_tokens"]
    before = settled(http)
    body = {"model": "noria", "messages": QUESTION, **LONG}
    with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        for _ in range(20):
            next(lines)
    streamed = settled(http) - before
    assert prompt + 15 <= streamed < prompt + 1900
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
    left = settled(http) - before - streamed
    assert prompt + 5 <= left < prompt + 1900


def test_what_never_fits_is_told_so(http: httpx.Client, server: Server) -> None:
    """Choices and prompts of one request, over both wires: the engine's sequences plus four times what may wait."""
    before = settled(http)
    for path, body in (
        ("/v1/chat/completions", {"messages": QUESTION, "n": 15}),
        ("/v1/completions", {"prompt": ["x"] * 15}),
    ):
        answer = http.post(path, json={"model": "noria", "max_tokens": 2, **body})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_sequences"), answer.text
    with grpc.insecure_channel(server.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        inference_pb2_grpc.InferenceServiceStub(channel).CreateChatCompletion(chat_request("x", None, n=15))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert settled(http) - before < 100  # the prompts that had begun


def test_overload_is_shed_early(http: httpx.Client) -> None:
    """Two run, three wait, the sixth is refused at once; those inside go on, and room is made as they leave."""
    settled(http)
    body = {"model": "noria", "messages": QUESTION, "stream": True, **LONG, "store": False}
    with ExitStack() as stack:
        held = [stack.enter_context(http.stream("POST", "/v1/chat/completions", json=body)) for _ in range(2)]
        pieces = [one.iter_raw() for one in held]
        assert all(next(one) for one in pieces)
        for _ in range(3):
            stack.enter_context(threaded(http, {**body, "stream": False, "max_tokens": 20}))
        until = time.monotonic() + 30
        while metric(http, "noria_requests_waiting") < 3 and time.monotonic() < until:
            time.sleep(0.02)
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert metric(http, "noria_requests_waiting") == 3
        assert all(next(one) for one in pieces)
        held[0].close()
        until = time.monotonic() + 30
        while metric(http, "noria_requests_waiting") == 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert http.post("/v1/chat/completions", json={**body, "stream": False, "max_tokens": 2}).status_code == 200
    settled(http)


@contextmanager
def threaded(http: httpx.Client, body: Json) -> Iterator[None]:
    """A request that waits in a thread of its own; it is answered in the end."""
    statuses: list[int] = []
    thread = threading.Thread(
        target=lambda: statuses.append(
            httpx.post(f"{http.base_url}/v1/chat/completions", json=body, timeout=120).status_code
        )
    )
    thread.start()
    yield
    thread.join(120)
    assert statuses == [200]


def test_tokens_are_in_the_store_when_the_server_has_ended(http: httpx.Client, server: Server) -> None:
    """Written at the end, too."""
    post(http, "/v1/chat/completions", messages=QUESTION, max_tokens=3)
    total = settled(http)
    assert server.stop() == 0
    with Store.open(f"sqlite:///{Path(server.home) / 'noria.db'}") as store:
        assert store.tokens_of(int(time.time() // 86_400)) == {"local": total}
