"""Both doors give the same answers and keep the same records."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import pytest

from noria.records import BLOB_SCHEME, Completion, Json
from tests.contract.conftest import System
from tests.contract.doors import Door, Refused, plain

GREEDY: Json = {"temperature": 0, "max_tokens": 12}
SAMPLED: Json = {"temperature": 1, "seed": 7, "n": 2, "max_tokens": 8}


def test_a_greedy_answer_is_the_same(system: System) -> None:
    """Text, reason, usage, version and fingerprint."""
    answers = [door.chat("what is red?", **GREEDY, logprobs=True) for door in (system.http, system.grpc)]
    http, grpc = [plain({k: v for k, v in one.items() if k not in ("id", "created")}) for one in answers]
    choice = http["choices"][0]
    assert grpc["choices"][0]["message"]["content"] == choice["message"]["content"] != ""
    assert grpc["choices"][0]["finish_reason"] == choice["finish_reason"]
    tokens = [[one["token"] for one in door["choices"][0]["logprobs"]["content"]] for door in (http, grpc)]
    assert tokens[0] == tokens[1]
    for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert grpc["usage"][key] == http["usage"][key]
    assert http["model_version"] == grpc["model_version"] == "v1"
    assert http["system_fingerprint"] == grpc["system_fingerprint"]
    assert http["system_fingerprint"].startswith("v1-")


def test_sampled_choices_are_the_same(system: System) -> None:
    """n choices with a seed."""
    http, grpc = [door.chat("one two", **SAMPLED) for door in (system.http, system.grpc)]
    assert [one["message"]["content"] for one in http["choices"]] == [
        one["message"].get("content") for one in grpc["choices"]
    ]
    assert [one.get("index", 0) for one in grpc["choices"]] == [0, 1]


def test_chunks_join_to_the_whole_answer(door: Door) -> None:
    """A stream says what the whole answer says, signs every chunk, and ends with the usage."""
    whole = door.chat("the blue square", **GREEDY)
    chunks = list(door.stream("the blue square", **GREEDY))
    assert joined(chunks) == whole["choices"][0]["message"]["content"]
    assert {one["system_fingerprint"] for one in chunks} == {whole["system_fingerprint"]}
    assert {one["model_version"] for one in chunks} == {"v1"}
    assert len({one["id"] for one in chunks}) == 1
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_the_same_request_is_kept_alike(system: System, picture: bytes) -> None:
    """A picture as bytes or in a data URL, metadata and user: equal records, equal hashes."""
    more: Json = {**GREEDY, "user": "u-1", "metadata": {"case": "alike"}, "store": True}
    kept = [kept_as(system, door.chat("what is it?", picture, **more)["id"]) for door in (system.http, system.grpc)]
    http, grpc = kept
    assert [one.sha256 for one in grpc.images] == [hashlib.sha256(picture).hexdigest()]
    assert grpc.images == http.images
    assert f"{BLOB_SCHEME}{http.images[0].sha256}" in str(http.messages)
    for field in ("model", "model_version", "messages", "prompt_hash", "end_user", "metadata", "prompt_token_ids"):
        assert getattr(grpc, field) == getattr(http, field), field
    assert http.end_user == "u-1" and http.metadata == {"case": "alike"}
    assert {k: v for k, v in grpc.params.items() if v} == {k: v for k, v in http.params.items() if v}
    assert [one.text for one in grpc.choices] == [one.text for one in http.choices]


def test_store_false_is_obeyed(door: Door, system: System) -> None:
    """Nothing of such an answer is kept."""
    id_ = door.chat("the small circle", **GREEDY, store=False)["id"]
    with pytest.raises(Refused) as refusal:
        door.feedback({"completion_id": id_, "index": 0, "thumb": "up"})
    assert refusal.value.status == "NOT_FOUND"


def test_a_caller_who_goes_away_stops_the_generation(door: Door, system: System) -> None:
    """The generation is closed inside too; what was said so far is kept, marked unfinished."""
    endless: Json = {"ignore_eos": True}
    more = endless if door.name == "http" else {"extra": endless}
    stream: Any = door.stream("yes", temperature=1, max_tokens=200, **more)
    first = next(stream)
    assert first["model_version"] == "v1"
    stream.close()
    for _ in range(600):
        if not door.status().get("in_flight"):
            break
        time.sleep(0.05)
    assert not door.status().get("in_flight")
    kept = kept_as(system, first["id"])
    if system.name == "fake":  # its stream never ends by itself; the tiny model's may have ended before the close
        assert not kept.finished


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({"model": "nobody"}, "NOT_FOUND", "model"),
        ({"temperature": -1}, "INVALID_ARGUMENT", "temperature"),
        ({"metadata": {"k": "x" * 600}}, "INVALID_ARGUMENT", "metadata"),
    ],
)
def test_a_wrong_request_is_refused_alike(system: System, more: Json, status: str, param: str) -> None:
    """The same status, parameter and message."""
    said = []
    for door in (system.http, system.grpc):
        with pytest.raises(Refused) as refusal:
            door.chat("no", **{**GREEDY, **more})
        said.append(refusal.value)
    assert [one.status for one in said] == [status, status]
    assert [one.param for one in said] == [param, param]
    assert said[0].message == said[1].message


def joined(chunks: list[Json]) -> str:
    """The text of choice 0."""
    deltas = [choice["delta"] for one in chunks for choice in one.get("choices", []) if not choice.get("index")]
    return "".join(delta.get("content") or "" for delta in deltas)


def kept_as(system: System, id_: str) -> Completion:
    """The stored completion, once it is there: feedback on it waits for its commit."""
    system.http.feedback({"completion_id": id_, "index": 0, "rating": 3})
    with system.store() as store:
        return store.get_completion(id_)
