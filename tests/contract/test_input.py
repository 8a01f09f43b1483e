"""Both doors let the same in, refuse the same in the same words, and keep what the engine was given."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc
import pytest
from PIL import Image

from noria.blobs import Blobs
from noria.records import Completion, Json
from noria.settings import Settings
from noria.v1 import inference_pb2
from tests.contract.conftest import System
from tests.contract.doors import GrpcDoor, HttpDoor, Refused, refused
from tests.contract.fake_system import FakeSystem
from tests.unit.input.material import SECRET, Web, data_url, encoded, exif, noise, png_bomb, serving

FETCHED = encoded(noise(seed=5), "JPEG", exif=exif(8))
SHORT: Json = {"temperature": 0, "max_tokens": 4}
PLACE = "messages.0.content.0.image_url.url"
CHAT = "/noria.v1.InferenceService/CreateChatCompletion"


def refusals(http: Callable[[], Any], rpc: Callable[[], Any]) -> tuple[Refused, Refused]:
    """What the two doors say."""
    said = []
    for call in (http, rpc):
        with pytest.raises(Refused) as error:
            call()
        said.append(error.value)
    return said[0], said[1]


def kept(system: System, id_: str) -> Completion:
    assert system.http.client.get(f"/v1/chat/completions/{id_}").status_code in (200, 404)  # waits, where it is routed
    system.http.feedback({"completion_id": id_, "index": 0, "thumb": "up"})
    with system.store() as store:
        return store.get_completion(id_)


@pytest.mark.parametrize(
    ("picture", "told", "code"),
    [
        (encoded(noise(), "PNG")[:-30], "cut short", "image_broken"),
        (encoded(noise(), "JPEG", quality=95)[:-700], "", "image_broken"),
        (encoded(noise(), "BMP"), "is BMP; taken are png, jpeg, webp, gif", "image_format"),
        (b"<svg/>", "is of no known format", "image_format"),
        (png_bomb(60_000, 60_000), "60000 x 60000", "image_pixels"),
        (b"", "no known format", "image_format"),
    ],
)
def test_a_picture_that_is_refused(system: System, picture: bytes, told: str, code: str) -> None:
    if system.name == "fake" and not told:
        told, picture = "cut short", picture[:300]  # the fake decodes nothing
    http, rpc = refusals(lambda: system.http.chat("?", picture), lambda: system.grpc.chat("?", picture))
    assert (rpc.status, rpc.message, rpc.type, rpc.code) == (http.status, http.message, http.type, http.code)
    assert (http.status, http.code, http.param, rpc.param) == ("INVALID_ARGUMENT", code, PLACE, PLACE)
    assert told in http.message and http.message.startswith(f"{PLACE}: the picture ")


def test_a_stream_is_refused_before_it_begins(system: System) -> None:
    broken = encoded(noise(), "PNG")[:-30]
    http, rpc = refusals(lambda: list(system.http.stream("?", broken)), lambda: list(system.grpc.stream("?", broken)))
    assert (http.status, http.code) == (rpc.status, rpc.code) == ("INVALID_ARGUMENT", "image_broken")


def test_a_turned_picture_is_kept_upright_and_without_metadata(system: System) -> None:
    picture = encoded(noise(60, 40), "JPEG", exif=exif(6))
    assert SECRET in picture
    http, rpc = (
        kept(system, door.chat("which way is up?", picture, **SHORT)["id"]) for door in (system.http, system.grpc)
    )
    assert http.images == rpc.images and http.prompt_hash == rpc.prompt_hash
    (image,) = http.images
    assert (image.width, image.height, image.media_type) == (40, 60, "image/jpeg")
    stored = Blobs(Settings(home=system.home).blobs_url).get(image.sha256)
    assert SECRET not in stored
    with Image.open(BytesIO(stored)) as shown:
        assert not shown.getexif() and shown.size == (40, 60)


def shown_at(url: str, count: int = 1) -> tuple[Json, Any]:
    """A request with a picture by its address, for both wires."""
    message = inference_pb2.ChatMessage(role="user")
    for _ in range(count):
        message.parts.add().image.url = url
    content = [{"type": "image_url", "image_url": {"url": url}}] * count
    body = {"model": "noria", "messages": [{"role": "user", "content": content}], **SHORT}
    return body, inference_pb2.CreateChatCompletionRequest(
        model="noria", messages=[message], temperature=0, max_tokens=4
    )


def asked(system: System, body: Json, request: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The two calls."""

    def http() -> Any:
        answer = system.http.client.post("/v1/chat/completions", json=body)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            raise Refused(str(answer.status_code), **{key: error[key] for key in ("message", "type", "param", "code")})
        return answer.json()

    def rpc() -> Any:
        try:
            return system.grpc.inference.CreateChatCompletion(request, timeout=60)
        except grpc.RpcError as error:
            raise refused(error) from error

    return http, rpc


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://169.254.169.254/latest/meta-data/", "image_fetch_off"),
        ("https://example.com/a.png", "image_fetch_off"),
        ("file:///etc/passwd", "image_file"),
        ("ftp://example.com/a.png", "image_url"),
        ("data:image/png,AAAA", "image_url"),
    ],
)
def test_addresses_are_not_called_unless_a_setting_says_so(system: System, url: str, code: str) -> None:
    http, rpc = refusals(*asked(system, *shown_at(url)))
    assert (http.status, rpc.status) == ("400", "INVALID_ARGUMENT")
    assert (http.message, http.param, http.code) == (rpc.message, rpc.param, rpc.code) and http.code == code


def test_pictures_are_counted(system: System) -> None:
    http, rpc = refusals(*asked(system, *shown_at(data_url(encoded(noise(), "PNG")), 21)))
    assert (http.code, http.message) == (rpc.code, rpc.message) and http.code == "image_count"
    assert "more than 20 pictures" in http.message


def test_numbers_that_are_none_are_refused(system: System) -> None:
    body, request = shown_at(data_url(encoded(noise(), "PNG")))
    request.temperature = float("nan")
    raw = json.dumps({**body, "temperature": 1e300}).replace("1e+300", "1e999")
    answer = system.http.client.post("/v1/chat/completions", content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "body_number"
    with pytest.raises(grpc.RpcError) as error:
        system.grpc.inference.CreateChatCompletion(request, timeout=60)
    said = refused(error.value)
    assert (said.status, said.code, said.param) == ("INVALID_ARGUMENT", "body_number", "temperature")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[" * 200 + "]" * 200, "body_depth"),
        ('{"logit_bias":{"1":1,"1":2}}', "body_json"),
        ('{"min_p":NaN}', "body_json"),
        ('{"user_text":"\\u0000"}', "body_text"),
        ('{"top":18446744073709551616}', "body_number"),
    ],
)
def test_a_json_text_in_a_message_is_looked_over_as_a_body_is(system: System, text: str, code: str) -> None:
    headers = {"content-type": "application/json"}
    answer = system.http.client.post("/v1/chat/completions", content=text, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
    _, request = shown_at(data_url(encoded(noise(), "PNG")))
    request.extra_json = text
    with pytest.raises(grpc.RpcError) as error:
        system.grpc.inference.CreateChatCompletion(request, timeout=60)
    said = refused(error.value)
    assert (said.status, said.code, said.param) == ("INVALID_ARGUMENT", code, "extra_json")


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 50,
        b"\x12\xff\xff\xff\xff\x0f",
        b"\x0a\x02\xff\xfe",
        bytes.fromhex("0b" * 200),
        b"\x12" + (lambda one: bytes([len(one)]) + one)(b"\x0a\x02\xc3\x28"),
    ],
    ids=["noise", "length", "utf-8", "groups", "inner-utf-8"],
)
def test_a_message_that_cannot_be_read_is_the_client_s_fault(system: System, message: bytes) -> None:
    with pytest.raises(grpc.RpcError) as error:
        system.grpc.channel.unary_unary(CHAT)(message, timeout=60)
    said = refused(error.value)
    assert (said.status, said.code, said.param) == ("INVALID_ARGUMENT", "body_protobuf", "body")


def test_a_struct_that_nests_too_deep(system: System) -> None:
    """Protobuf reads 100 messages inside each other: some thirty levels of a Struct."""
    field = inference_pb2.CreateChatCompletionRequest.DESCRIPTOR.fields_by_name["tools"].number
    level = b"\x08\x01"
    for _ in range(400):  # as bytes: the library would not write what it does not read
        value = b"\x2a" + _length(level) + level
        entry = b"\x0a\x01a\x12" + _length(value) + value
        level = b"\x0a" + _length(entry) + entry
    raw = _tag(field, 2) + _length(level) + level
    with pytest.raises(grpc.RpcError) as error:
        system.grpc.channel.unary_unary(CHAT)(raw, timeout=60)
    assert refused(error.value).code == "body_protobuf"


def _length(data: bytes) -> bytes:
    return _varint(len(data))


def _tag(field: int, kind: int) -> bytes:
    return _varint(field << 3 | kind)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def test_a_prompt_over_the_model_s_length_tells_both_numbers(system: System) -> None:
    """The model's, and the prompt's."""
    if system.name == "fake":  # which has no length: its answer is as long as ever
        assert system.http.chat("red " * 5000, **SHORT)["choices"]
        return
    for text, length in (("red " * 270, "at least"), ("red " * 5000, " characters (more than ")):
        http, rpc = refusals(lambda: system.http.chat(text, **SHORT), lambda: system.grpc.chat(text, **SHORT))  # noqa: B023
        assert (http.status, rpc.status) == ("INVALID_ARGUMENT", "INVALID_ARGUMENT")
        assert http.message == rpc.message
        assert "maximum context length is 256 tokens" in http.message and length in http.message


@pytest.fixture
def web() -> Iterator[Web]:
    """A picture somewhere on the internet, and a way from there to where nobody may look."""

    def answer(path: str) -> tuple[int, dict[str, str], bytes]:
        inward = {"location": "http://169.254.169.254/latest/meta-data/"}
        return (302, inward, b"") if path == "/inward" else (200, {}, FETCHED)

    with serving(answer) as made:
        yield made


@pytest.fixture
def fetching(tmp_path: Path, web: Web) -> Iterator[tuple[FakeSystem, System]]:
    """A system that fetches, over a network of its own."""

    async def resolve(host: str, port: int) -> list[str]:
        return [host] if host[0].isdecimal() else ["93.184.215.14"]

    home = tmp_path / "home"
    fake = FakeSystem(home, input={"images": {"fetch": "any-public"}}, resolve=resolve, dial=web.dial)
    fake.start()
    try:
        http, rpc = HttpDoor(f"http://127.0.0.1:{fake.http_port}"), GrpcDoor(f"127.0.0.1:{fake.grpc_port}")
        yield fake, System("fake", home, http, rpc)
    finally:
        fake.stop()


def test_a_fetched_picture_is_stored(fetching: tuple[FakeSystem, System], web: Web) -> None:
    """Upright and clean, like any other: what was an address that may change is a picture."""
    _, system = fetching
    http, rpc = asked(system, *shown_at("http://images.example.com/a.jpg"))
    for id_ in (http()["id"], rpc().id):
        completion = kept(system, id_)
        (image,) = completion.images
        assert (image.media_type, image.width, image.height) == ("image/jpeg", 40, 60)
        assert f"noria-blob:{image.sha256}" in json.dumps(completion.messages)
        assert SECRET not in Blobs(Settings(home=system.home).blobs_url).get(image.sha256)
    assert [host for _, host in web.calls] == ["images.example.com"] * 2


def test_a_redirect_inward_is_refused_and_counted(fetching: tuple[FakeSystem, System], web: Web) -> None:
    fake, system = fetching
    http, rpc = refusals(*asked(system, *shown_at("http://images.example.com/inward")))
    assert http.code == rpc.code == "image_host" and http.message == rpc.message
    assert fake.refusals.counts == {"image_host": 2} and len(web.calls) == 2
