"""Every route of the real server takes pictures by one door: nothing is fetched, read or decoded beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from noria.blobs import Blobs
from noria.records import Json
from noria.settings import Settings
from noria.store import Store
from noria.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2, sampling_pb2_grpc
from tests.contract.doors import refused
from tests.servers import Server, publish_tiny, start_server
from tests.unit.input.material import SECRET, Web, data_url, encoded, exif, noise, serving
from train.data.render import decode_image

PNG = encoded(noise(), "PNG")
TURNED = encoded(noise(60, 40), "JPEG", exif=exif(6), quality=95)


def chat(url: str) -> list[Json]:
    return [
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "image_url": {"url": url}}]}
    ]


def anthropic(url: str) -> Json:
    inline = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    source = inline if url.startswith("data:") else {"type": "url", "url": url}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "hi"}]
    return {"model": "noria", "messages": [{"role": "user", "content": content}], "max_tokens": 2}


def responses(url: str) -> Json:
    parts = [{"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": url, "detail": "auto"}]
    return {"model": "noria", "input": [{"role": "user", "content": parts}], "max_output_tokens": 16}


def completion(url: str) -> Json:
    return {"model": "noria", "messages": chat(url), "max_tokens": 2}


WITH_PICTURES: dict[str, Callable[[str], Json]] = {
    "/v1/chat/completions": completion,
    "/invocations": completion,
    "/v1/chat/completions/batch": lambda url: {**completion(url), "messages": [chat(url)]},
    "/v1/responses": responses,
    "/v1/messages": anthropic,
    "/v1/messages/count_tokens": anthropic,
    "/tokenize": lambda url: {"model": "noria", "messages": chat(url)},
    "/noria/v1/samples": lambda url: {"messages": chat(url), "max_tokens": 2},
}
WITHOUT = {  # token ids, texts, or no body at all; our own routes are closed to unknown fields
    "/detokenize",
    "/generative_scoring",
    "/is_scaling_elastic_ep",
    "/ping",
    "/scale_elastic_ep",
    "/v1/chat/completions/{completion_id}",
    "/v1/completions",
    "/v1/responses/{response_id}/cancel",
}


@pytest.fixture(scope="module")
def trap() -> Iterator[Web]:
    """A server on loopback that nobody must call."""
    with serving(lambda path: (200, {}, PNG)) as web:
        yield web


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that fetches from the internet, and reads one folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "allowed").mkdir()
    (home / "allowed" / "a.png").write_bytes(PNG)
    assert publish_tiny(home) == "v1"
    env = {
        "NORIA_INPUT__IMAGES__FETCH": "listed",
        "NORIA_INPUT__IMAGES__ALLOWED_FOLDER": str(home / "allowed"),
        "NORIA_INPUT__IMAGES__ALLOWED_HOSTS": json.dumps(["*.example.com", "127.0.0.1", "localhost"]),
        "NORIA_ENGINE__KV_CACHE_GIB": "0.25",
        "VLLM_MEDIA_CONNECTOR": "http",  # an operator's slip does not open vLLM's own way
    }
    with start_server(home, **env) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=120) as made:
        yield made


def test_every_route_is_known(client: httpx.Client) -> None:
    """A route that vLLM adds has to be looked at before it is served."""
    paths = client.get("/openapi.json").json()["paths"]
    ours = {path for path in paths if path.startswith("/noria/v1/")} - {"/noria/v1/samples"}
    posted = {path for path, methods in paths.items() if {"post", "put", "patch"} & set(methods)}
    assert posted - ours <= set(WITH_PICTURES) | WITHOUT
    hidden = client.post("/inference/v1/generate", json={"token_ids": [1], "features": {"mm_hashes": {"image": ["a"]}}})
    assert hidden.status_code == 400 and hidden.json()["error"]["code"] == "media_tensors"


@pytest.mark.parametrize("path", WITH_PICTURES)
def test_no_route_has_a_way_of_its_own(client: httpx.Client, server: Server, trap: Web, path: str) -> None:
    """Good pictures are answered; everything else is 400, says which picture, and calls nobody."""
    body = WITH_PICTURES[path]
    for good in (data_url(PNG), data_url(TURNED, "image/jpeg"), f"file://{server.home}/allowed/a.png"):
        answer = client.post(path, json=body(good))
        assert answer.status_code == 200, answer.text
    bad = {
        data_url(PNG[:-30]): "cut short",
        data_url(TURNED[:-400], "image/jpeg"): "cannot be decoded",
        f"http://127.0.0.1:{trap.port}/a.png": "allowed_hosts",
        "http://127.0.0.1/a.png": "no public address",
        "http://localhost/a.png": "no public address",
        f"file://{server.home}/noria.db": "is no file in the folder",
        "file:///etc/passwd": "is no file in the folder",
        "ftp://127.0.0.1/a.png": "has an address that",
    }
    for url, told in bad.items():
        answer = client.post(path, json=body(url))
        message = answer.json()["error"]["message"]
        assert answer.status_code == 400 and told in message, answer.text
        assert message.partition(": ")[0].startswith(("messages.0", "input.0"))
    assert trap.calls == []


def test_grpc_has_none_either(server: Server, trap: Web) -> None:
    message = inference_pb2.ChatMessage(role="user")
    message.parts.add().image.url = "http://127.0.0.1/a.png"
    with grpc.insecure_channel(server.grpc) as channel:
        chats, samples = (
            inference_pb2_grpc.InferenceServiceStub(channel),
            sampling_pb2_grpc.SamplingServiceStub(channel),
        )
        request = inference_pb2.CreateChatCompletionRequest(model="noria", messages=[message])
        for call, asked in (
            (chats.CreateChatCompletion, request),
            (samples.SampleGroup, sampling_pb2.SampleGroupRequest(messages=[message])),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call(asked, timeout=60)
            said = refused(error.value)
            assert (said.status, said.code) == ("INVALID_ARGUMENT", "image_host")
            assert said.param == "messages.0.content.0.image_url.url"
    assert trap.calls == []


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}},
        {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1/a.wav"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        {"type": "image_embeds", "image_embeds": "gASVAAA="},
        {"type": "prompt_embeds", "data": "gASVAAA="},
        {"type": "image_url", "image_url": {"url": data_url(PNG)}, "uuid": "x"},
        {"type": "image_url", "image_url": None, "uuid": "x"},
    ],
    ids=lambda part: part["type"] + ("-uuid" if "uuid" in part else ""),
)
def test_other_media_are_refused(client: httpx.Client, part: Json) -> None:
    body = {"model": "noria", "messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "more", [{"media_io_kwargs": {"image": {"image_mode": None}}}, {"mm_processor_kwargs": {"a": 1}}]
)
def test_a_request_does_not_change_how_pictures_are_read(client: httpx.Client, more: Json) -> None:
    answer = client.post("/v1/chat/completions", json={**completion(data_url(PNG)), **more})
    assert answer.status_code == 400 and "disabled by default" in answer.json()["error"]["message"]


def test_the_engine_the_store_and_the_trainer_see_the_same(client: httpx.Client, server: Server) -> None:
    """A turned photograph: shown as it was stored, it is the same prompt to the engine, and answers alike."""
    question = {"temperature": 0, "max_tokens": 12, "logprobs": True}
    first = client.post("/v1/chat/completions", json={**completion(data_url(TURNED, "image/jpeg")), **question}).json()
    client.get(f"/v1/chat/completions/{first['id']}")
    with Store.open(Settings(home=server.home).store_url) as store:
        kept = store.get_completion(first["id"])
    (image,) = kept.images
    stored = Blobs(Settings(home=server.home).blobs_url).get(image.sha256)
    assert SECRET not in stored and (image.width, image.height) == (40, 60)
    again = client.post("/v1/chat/completions", json={**completion(data_url(stored, "image/jpeg")), **question}).json()
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    client.get(f"/v1/chat/completions/{again['id']}")
    with Store.open(Settings(home=server.home).store_url) as store:
        assert store.get_completion(again["id"]).images == kept.images
    from vllm.multimodal.media.image import ImageMediaIO

    assert np.array_equal(np.asarray(decode_image(stored)), np.asarray(ImageMediaIO().load_bytes(stored).media))


def test_refusals_are_counted_and_leave_no_trace_in_the_log(client: httpx.Client, server: Server) -> None:
    """Not the picture, not the address, and no traceback for what a client did wrong."""
    marked = "http://localhost/marked-address"
    for path in ("/v1/chat/completions", "/v1/messages"):
        assert client.post(path, json=WITH_PICTURES[path](marked)).status_code == 400
    found = [line for line in client.get("/metrics").text.splitlines() if line.startswith("noria_input_refused_total")]
    counts: dict[str, Any] = dict(line.rsplit(" ", 1) for line in found)
    assert float(counts['noria_input_refused_total{reason="image_host"}']) >= 2
    log = Path(server.log).read_text()
    assert "marked-address" not in log and "InputRefused" not in log
