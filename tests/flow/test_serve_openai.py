"""The server as OpenAI's client library sees it, with real vLLM; and that what is stored is what was answered."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from PIL import Image

from noria.records import Completion
from noria.store import Store
from tests.servers import Server, publish_tiny, start_server

STRUCTURED = json.dumps({"backend": "xgrammar", "disable_any_whitespace": True})
ENGINE_ARGS = json.dumps(
    ["--enable-auto-tool-choice", "--tool-call-parser=hermes", f"--structured-outputs-config={STRUCTURED}"]
)
HEADER = "x-noria-model-version"
QUESTION = [{"role": "user", "content": "Which colour is the sky?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server on a tiny random VLM."""
    home = tmp_path_factory.mktemp("home")
    assert publish_tiny(home) == "v1"
    with start_server(home, NORIA_ENGINE__ARGS=ENGINE_ARGS, NORIA_ENGINE__KV_CACHE_GIB="0.25") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> OpenAI:
    """OpenAI's client on it."""
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def store(server: Server) -> Iterator[Store]:
    """The server's store, from outside."""
    with Store.open(f"sqlite:///{server.home / 'noria.db'}") as opened:
        yield opened


def ask(client: OpenAI, **body: Any) -> tuple[Any, Any]:
    """One answer and its headers."""
    raw = client.chat.completions.with_raw_response.create(
        **{"model": "noria", "messages": QUESTION, "max_tokens": 8, **body}
    )
    return raw.parse(), raw.headers


def stored(client: OpenAI, store: Store, id_: str) -> Completion:
    """The record of an answer; asking the server for it first waits for its commit."""
    client.chat.completions.retrieve(id_)
    return store.get_completion(id_)


def signed(fingerprint: str | None) -> bool:
    return fingerprint is not None and fingerprint.startswith("v1-") and len(fingerprint) == len("v1-") + 8


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shown(picture: bytes) -> list[dict[str, Any]]:
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": "Which colour?"}, {"type": "image_url", "image_url": {"url": url}}],
        }
    ]


def test_n_answers_are_stored_as_they_were_given(client: OpenAI, store: Store) -> None:
    answer, headers = ask(client, n=2, temperature=1.0, seed=3, logprobs=True, user="u-7", metadata={"topic": "sky"})
    assert headers[HEADER] == "v1" and signed(answer.system_fingerprint)
    kept = stored(client, store, answer.id)
    assert [choice.text for choice in kept.choices] == [choice.message.content for choice in answer.choices]
    assert sum(len(choice.token_ids) for choice in kept.choices) == answer.usage.completion_tokens
    assert len(kept.prompt_token_ids) == answer.usage.prompt_tokens
    for choice, given in zip(kept.choices, answer.choices, strict=True):
        assert choice.logprobs == pytest.approx([one.logprob for one in given.logprobs.content])
        assert choice.finish_reason == given.finish_reason
    assert (kept.model_version, kept.system_fingerprint) == ("v1", answer.system_fingerprint)
    assert (kept.end_user, kept.metadata, kept.finished) == ("u-7", {"topic": "sky"}, True)
    assert kept.params["n"] == 2 and kept.messages == tuple(QUESTION)


def test_a_stream_is_signed_on_every_chunk_and_stored_whole(client: OpenAI, store: Store) -> None:
    answer, headers = ask(client, stream=True, n=2, temperature=1.0, stream_options={"include_usage": True})
    assert headers[HEADER] == "v1"
    chunks = list(answer)
    assert len(chunks) > 4 and {signed(chunk.system_fingerprint) for chunk in chunks} == {True}
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    kept = stored(client, store, chunks[0].id)
    assert {choice.index: choice.text for choice in kept.choices} == texts
    assert sum(len(choice.token_ids) for choice in kept.choices) == chunks[-1].usage.completion_tokens
    assert all(len(choice.logprobs) == len(choice.token_ids) for choice in kept.choices)
    assert kept.finished and kept.ttft_s is not None and kept.duration_s is not None


def test_logprobs_are_taken_down_though_the_client_did_not_ask(client: OpenAI, store: Store) -> None:
    answer, _ = ask(client, temperature=0)
    assert answer.choices[0].logprobs is None
    told, _ = ask(client, temperature=0, logprobs=True)
    kept = stored(client, store, answer.id).choices[0]
    assert kept.logprobs == pytest.approx([one.logprob for one in told.choices[0].logprobs.content], abs=1e-3)


def test_a_picture_lies_in_the_blobs_once(client: OpenAI, store: Store, server: Server) -> None:
    red = png("red")
    first, _ = ask(client, messages=shown(red), temperature=0)
    second, _ = ask(client, messages=shown(red), temperature=0)
    blue, _ = ask(client, messages=shown(png("blue")), temperature=0, logprobs=True)
    kept, again = stored(client, store, first.id), stored(client, store, second.id)
    sha256 = kept.images[0].sha256
    assert kept.messages[0]["content"][1]["image_url"]["url"] == f"noria-blob:{sha256}"
    assert (kept.images[0].width, kept.images[0].height, kept.images[0].size_bytes) == (40, 30, len(red))
    assert again.images == kept.images and again.prompt_hash == kept.prompt_hash
    assert stored(client, store, blue.id).prompt_hash != kept.prompt_hash
    files = [path for path in (server.home / "blobs").rglob("*") if path.is_file() and sha256 in path.name]
    assert [path.read_bytes() for path in files] == [red]
    messages = client.chat.completions.messages.list(first.id).data
    parts: Any = messages[0].content_parts
    assert messages[0].content is None and parts[1].image_url.url == shown(red)[0]["content"][1]["image_url"]["url"]


def test_structured_output(client: OpenAI, store: Store) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "colour", "schema": schema, "strict": True}}
    answer, _ = ask(client, response_format=form, max_tokens=40, temperature=0)
    assert json.loads(answer.choices[0].message.content)["colour"] in ("red", "blue")
    assert stored(client, store, answer.id).choices[0].text == answer.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_tool_calls(client: OpenAI, store: Store, server: Server, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    blank = {"model": "noria", "prompt": " \n\t\r", "add_special_tokens": False}
    blanks = httpx.post(f"{server.url}/tokenize", json=blank, timeout=60).json()["tokens"]
    bias = {str(token): -100 for token in blanks}  # the grammar allows blanks, and a random model likes them
    body = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 200, "temperature": 0, "logit_bias": bias}
    if stream:
        chunks = list(ask(client, stream=True, **body)[0])
        id_, calls = (
            chunks[0].id,
            [call for chunk in chunks for one in chunk.choices for call in one.delta.tool_calls or []],
        )
        name, arguments = calls[0].function.name, "".join(call.function.arguments or "" for call in calls)
    else:
        answer, headers = ask(client, **body)
        id_, call = answer.id, answer.choices[0].message.tool_calls[0]
        name, arguments = call.function.name, call.function.arguments
        assert headers[HEADER] == "v1"
    assert name == "weather" and json.loads(arguments)["city"] in ("Rome", "Oslo")
    kept = stored(client, store, id_).choices[0].message["tool_calls"][0]["function"]
    assert kept == {"name": name, "arguments": arguments}


def test_store_false_is_obeyed(client: OpenAI, store: Store) -> None:
    list(client.chat.completions.list(limit=1))  # waits for what is on its way to the store
    before = store.count_completions()
    answer, headers = ask(client, store=False)
    streamed = list(ask(client, store=False, stream=True)[0])
    assert headers[HEADER] == "v1" and signed(answer.system_fingerprint)
    for id_ in (answer.id, streamed[0].id):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.retrieve(id_)
        assert caught.value.body is not None and id_ in str(caught.value)
    list(client.chat.completions.list(limit=1))
    assert store.count_completions() == before


def test_wrong_storage_parameters_are_refused(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, metadata={"key": "x" * 513})
    assert caught.value.param == "metadata"
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, store="yes")
    assert caught.value.param == "store"


def test_stored_completions_as_openai_has_them(client: OpenAI) -> None:
    ids = [ask(client, metadata={"lot": "paging", "turn": str(turn)})[0].id for turn in range(5)]
    everything = list(client.chat.completions.list(metadata={"lot": "paging"}, limit=2))
    assert [one.id for one in everything] == ids  # three pages
    newest = client.chat.completions.list(metadata={"lot": "paging"}, order="desc", limit=1)
    assert [one.id for one in newest.data] == ids[-1:] and newest.has_more
    assert not list(client.chat.completions.list(metadata={"lot": "paging"}, model="another"))
    one = client.chat.completions.retrieve(ids[1])
    assert one.object == "chat.completion" and one.choices[0].message.role == "assistant" and one.usage is not None
    updated = client.chat.completions.update(ids[1], metadata={"lot": "moved"})
    assert updated.to_dict()["metadata"] == {"lot": "moved"}
    assert [one.id for one in client.chat.completions.list(metadata={"lot": "moved"})] == [ids[1]]
    messages = client.chat.completions.messages.list(ids[0], limit=1)
    assert [(message.role, message.content) for message in messages.data] == [("user", QUESTION[0]["content"])]
    deleted = client.chat.completions.delete(ids[0])
    assert (deleted.id, deleted.deleted, deleted.object) == (ids[0], True, "chat.completion.deleted")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(ids[0])
    for wrong in ({"limit": 0}, {"order": "sideways"}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.list(extra_query=wrong)
        assert caught.value.param == next(iter(wrong))


def test_the_rest_of_vllm_s_routes_answer_and_are_signed(client: OpenAI, server: Server) -> None:
    models = client.models.list().data
    assert [(model.id, (model.model_extra or {})["root"]) for model in models] == [("noria", "v1"), ("v1", "v1")]
    text = client.completions.with_raw_response.create(model="v1", prompt=["one", "two"], max_tokens=4)
    assert text.headers[HEADER] == "v1" and signed(text.parse().system_fingerprint)
    chunks = list(client.completions.create(model="noria", prompt="one", max_tokens=4, stream=True))
    assert {signed(chunk.system_fingerprint) for chunk in chunks} == {True}
    response = client.responses.with_raw_response.create(model="noria", input="hello", max_output_tokens=16)
    assert response.headers[HEADER] == "v1" and response.parse().output
    body = {"model": "noria", "max_tokens": 4, "messages": QUESTION}
    message = httpx.post(f"{server.url}/v1/messages", json=body, timeout=60)
    assert message.status_code == 200 and message.headers[HEADER] == "v1"
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": "noria", "prompt": "a"}, timeout=60).json()
    assert tokens["count"] >= 1 and httpx.get(f"{server.url}/health").status_code == 200
    with pytest.raises(openai.NotFoundError):
        ask(client, model="another")


def test_a_client_that_leaves_leaves_its_part(client: OpenAI, store: Store) -> None:
    stream, _ = ask(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
    chunks = [next(stream) for _ in range(4)]
    stream.close()
    for _ in range(100):  # the server learns of it when it next writes
        counts = httpx.get(f"{client.base_url.join('/noria/v1/status')}").json()
        if counts["in_flight"] == 0:
            break
        threading.Event().wait(0.1)
    kept = stored(client, store, chunks[0].id)
    assert not kept.finished and kept.choices[0].token_ids
    assert kept.choices[0].text.startswith("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_capture_conserves(client: OpenAI) -> None:
    list(client.chat.completions.list(limit=1))
    lines = httpx.get(str(client.base_url.join("/metrics"))).text.splitlines()
    counts = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("noria_capture")}
    assert counts["noria_capture_sent_total"] == counts["noria_capture_stored_total"] > 0
    assert counts["noria_capture_dropped_total"] == 0


def test_sigterm_lets_running_answers_end_and_loses_nothing(tmp_path: Path) -> None:
    publish_tiny(tmp_path)
    with start_server(tmp_path, NORIA_ENGINE__KV_CACHE_GIB="0.25", NORIA_SERVER__API_KEY="secret") as server:
        base_url = f"{server.url}/v1"
        with pytest.raises(openai.AuthenticationError):
            ask(OpenAI(base_url=base_url, api_key="wrong", max_retries=0))
        assert httpx.get(f"{server.url}/noria/v1/status").status_code == 401
        client = OpenAI(base_url=base_url, api_key="secret", max_retries=0, timeout=120)
        stream, _ = ask(client, stream=True, max_tokens=400, extra_body={"ignore_eos": True})
        chunks = [next(stream)]
        children = descendants(server.process.pid)
        server.process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert server.stop() == 0
        assert len(children) >= 2 and gone(children)
        assert not (tmp_path / "server.json").exists()
    with sqlite3.connect(tmp_path / "noria.db") as database:
        ids = [row[0] for row in database.execute("select id from completions")]
    assert ids == [chunks[0].id]
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        kept = store.get_completion(chunks[0].id)
    assert kept.finished and len(kept.choices[0].token_ids) == 400
    assert kept.choices[0].text == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_kill_9_leaves_no_engine_behind(tmp_path: Path) -> None:
    publish_tiny(tmp_path)
    with start_server(tmp_path, NORIA_ENGINE__KV_CACHE_GIB="0.25") as server:
        answer, _ = ask(OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120))
        httpx.get(f"{server.url}/v1/chat/completions/{answer.id}").raise_for_status()  # committed
        children = descendants(server.process.pid)
        assert server.stop(signal.SIGKILL) == -signal.SIGKILL
        assert len(children) >= 2 and gone(children)
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        assert store.get_completion(answer.id).choices[0].text == answer.choices[0].message.content


def descendants(pid: int) -> list[int]:
    """The process's children and theirs."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def gone(pids: list[int]) -> bool:
    """Whether they all end; the fork server does when it sees that the server has."""
    for _ in range(100):
        if not any(alive(pid) for pid in pids):
            return True
        threading.Event().wait(0.1)
    return False


def alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
