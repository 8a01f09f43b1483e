"""Preferences and feedback: the same records and the same refusals through both doors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from noria.records import Json
from tests.contract.conftest import System
from tests.contract.doors import Door, Refused, plain

SAMPLED: Json = {"temperature": 1, "seed": 3, "n": 2, "max_tokens": 8}


@pytest.fixture(scope="module")
def answered(system: System) -> str:
    """Id of a completion with two different choices."""
    return str(system.http.chat("red or green?", **SAMPLED)["id"])


@pytest.fixture(scope="module")
def another(system: System) -> str:
    """Id of a completion of another prompt."""
    return str(system.grpc.chat("circle or square?", **SAMPLED)["id"])


def side(id_: str, index: int = 0) -> Json:
    """One side of a preference."""
    return {"completion_id": id_, "index": index}


def test_an_answer_just_given_can_be_judged(door: Door, other: Door, system: System) -> None:
    """The preference is durable when answered; said again, through either door, it is the same one."""
    id_ = door.chat("left or right?", **SAMPLED)["id"]
    body = {"chosen": side(id_), "rejected": side(id_, 1), "annotator": "u-17", "comment": "shorter"}
    first = door.prefer(body)
    assert first["created"] is True
    assert first["id"].startswith("pref_")
    with system.store() as store:
        kept = store.get_preference(first["id"])
    assert plain(kept.to_wire()) == plain({k: v for k, v in first.items() if k != "created"})
    again = other.prefer(body)
    assert (again["id"], again["created"]) == (first["id"], False)
    assert plain(again) == plain({**first, "created": False})


def test_an_edit_is_a_preference(door: Door, other: Door, answered: str) -> None:
    """Feedback with an edit names the preference that it made; both doors list it."""
    said = door.feedback({**side(answered), "rating": 2, "edit": f"better, says {door.name}", "annotator": "u-2"})
    newest = other.preferences(limit=1)["data"][0]
    assert newest["id"] == said["preference_id"]
    assert newest["chosen"] == {"text": f"better, says {door.name}"}
    assert newest["source"] == "edit"


def test_pages_are_the_same(system: System, answered: str) -> None:
    """OpenAI's list object, page after page."""
    for number in range(3):
        system.http.feedback({**side(answered), "edit": f"page {number}", "annotator": "pages"})
    first = system.http.preferences(limit=2, annotator="pages")
    assert first["object"] == "list"
    assert [len(first["data"]), first["has_more"]] == [2, True]
    assert [first["first_id"], first["last_id"]] == [first["data"][0]["id"], first["data"][1]["id"]]
    rest = system.http.preferences(limit=2, annotator="pages", after=first["last_id"])
    assert [len(rest["data"]), rest["has_more"]] == [1, False]
    grpc = system.grpc.preferences(limit=2, annotator="pages")
    assert plain(grpc) == plain({k: v for k, v in first.items() if k != "object"})


WRONG: list[tuple[str, Callable[[str, str], Json], str, str]] = [
    (
        "unknown completion",
        lambda one, two: {"chosen": side("chatcmpl-none"), "rejected": side(one)},
        "NOT_FOUND",
        "chosen.completion_id",
    ),
    (
        "index out of range",
        lambda one, two: {"chosen": side(one), "rejected": side(one, 5)},
        "INVALID_ARGUMENT",
        "rejected.index",
    ),
    (
        "negative index",
        lambda one, two: {"chosen": side(one, -1), "rejected": side(one)},
        "INVALID_ARGUMENT",
        "chosen.index",
    ),
    (
        "chosen equal to rejected",
        lambda one, two: {"chosen": side(one), "rejected": side(one)},
        "INVALID_ARGUMENT",
        "rejected",
    ),
    (
        "different prompts",
        lambda one, two: {"chosen": side(one), "rejected": side(two)},
        "INVALID_ARGUMENT",
        "rejected.completion_id",
    ),
    (
        "two texts",
        lambda one, two: {"chosen": {"text": "a"}, "rejected": {"text": "b"}},
        "INVALID_ARGUMENT",
        "chosen.completion_id",
    ),
    (
        "a side that is both",
        lambda one, two: {"chosen": {**side(one), "text": "a"}, "rejected": side(one, 1)},
        "INVALID_ARGUMENT",
        "chosen",
    ),
    ("no rejected", lambda one, two: {"chosen": side(one)}, "INVALID_ARGUMENT", "rejected"),
    (
        "a verdict that is none",
        lambda one, two: {"chosen": side(one), "rejected": side(one, 1), "verdict": "better"},
        "INVALID_ARGUMENT",
        "verdict",
    ),
]


@pytest.mark.parametrize(("body", "status", "param"), [case[1:] for case in WRONG], ids=[case[0] for case in WRONG])
def test_a_wrong_preference_is_refused_alike(
    system: System, answered: str, another: str, body: Callable[[str, str], Json], status: str, param: str
) -> None:
    """Status, code, message and parameter are the same; nothing is recorded."""
    before = system.http.status()["preferences"]["total"]
    said = [refusal_of(door.prefer, body(answered, another)) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].param) == (status, param)
    assert system.http.status()["preferences"]["total"] == before


@pytest.mark.parametrize(
    ("more", "status", "param"),
    [
        ({}, "INVALID_ARGUMENT", "body"),
        ({"rating": 9}, "INVALID_ARGUMENT", "rating"),
        ({"thumb": "sideways"}, "INVALID_ARGUMENT", "thumb"),
        ({"index": 7, "thumb": "up"}, "INVALID_ARGUMENT", "index"),
        ({"completion_id": "chatcmpl-none", "thumb": "up"}, "NOT_FOUND", "completion_id"),
    ],
)
def test_a_wrong_feedback_is_refused_alike(system: System, answered: str, more: Json, status: str, param: str) -> None:
    """The same refusal from both."""
    said = [refusal_of(door.feedback, {**side(answered), **more}) for door in (system.http, system.grpc)]
    assert said[0] == said[1]
    assert (said[0].status, said[0].param) == (status, param)


def test_an_unknown_field_is_named(system: System, answered: str) -> None:
    """HTTP refuses what it does not know, instead of ignoring a typing error."""
    body = {"chosen": side(answered), "rejected": side(answered, 1), "annotater": "u-1"}
    said = refusal_of(system.http.prefer, body)
    assert (said.status, said.param, said.message) == ("INVALID_ARGUMENT", "annotater", "annotater: unknown field")


def test_a_body_that_is_not_json_is_refused(system: System) -> None:
    """With an OpenAI-shaped error."""
    answer = system.http.client.post("/noria/v1/preferences", content=b"{not json")
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert answer.json()["error"]["param"] == "body"


def test_deleting(system: System, answered: str) -> None:
    """A deleted preference is gone; deleting it again is 404."""
    made = system.grpc.feedback({**side(answered), "edit": "to be deleted"})
    path = f"/noria/v1/preferences/{made['preference_id']}"
    assert system.http.client.delete(path).json() == {
        "id": made["preference_id"],
        "object": "preference.deleted",
        "deleted": True,
    }
    assert system.http.client.delete(path).status_code == 404
    assert system.http.client.delete(f"/noria/v1/feedback/{made['id']}").json()["deleted"] is True


def test_an_end_user_is_forgotten(door: Door, system: System) -> None:
    """Their completions and all that hangs on them; asking again finds nothing."""
    user = f"forget-{door.name}"
    id_ = door.chat("square?", **SAMPLED, user=user)["id"]
    door.prefer({"chosen": side(id_, 1), "rejected": side(id_)})
    gone = plain(door.forget(user))
    assert [gone["completions"], gone["choices"], gone["preferences"]] == [1, 2, 1]
    assert refusal_of(door.feedback, {**side(id_), "rating": 1}).status == "NOT_FOUND"
    assert plain(door.forget(user)) == {"id": user, "object": "end_user.deleted", "deleted": True}


def refusal_of(call: Callable[[Json], Any], body: Json) -> Refused:
    """What the call is refused with."""
    with pytest.raises(Refused) as refusal:
        call(body)
    return refusal.value
