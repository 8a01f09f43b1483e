"""Redaction, metadata, `store: false` and forgetting through both doors of one server; the fake engine answers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from noria.records import Json, Snapshot, Version
from serve.privacy.redact import Redactor
from tests.contract.conftest import System, fake_system
from tests.contract.doors import Door, Refused, plain

SETTINGS = """
[privacy]
redact = ["email", "key"]
metadata_keys = ["page"]
"""


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A server that redacts and keeps one key of metadata."""
    home = tmp_path_factory.mktemp("private") / "home"
    home.mkdir()
    (home / "noria.toml").write_text(SETTINGS)
    Redactor(("email",))  # its library's import takes longer than the fake system waits for itself
    with fake_system(home) as made:
        yield made


@pytest.fixture(params=["http", "grpc"])
def way(request: pytest.FixtureRequest, private: System) -> Door:
    """One door of it."""
    return private.http if request.param == "http" else private.grpc


def test_what_is_kept_has_neither_addresses_nor_other_metadata(way: Door, private: System) -> None:
    """The client's own answer is as it was; the record, and what is said of it, are redacted."""
    asked = way.chat("I am jane@x.org", metadata={"page": "3 of joe@x.org", "who": "jane"}, store=True, n=2)
    way.feedback({**side(asked["id"]), "comment": "ask jim@x.org", "edit": "write to jim@x.org"})
    way.prefer({"chosen": {"text": "sk-abcdefghijklmnopqr5t"}, "rejected": side(asked["id"]), "comment": "a@b.org"})
    with private.store() as store:
        kept = store.get_completion(asked["id"])
        said = store.list_feedback(completion_id=kept.id)[0]
        preference = store.list_preferences(limit=1)[0]
    assert "jane" not in str(kept.messages) and "<EMAIL>" in str(kept.messages)
    assert (kept.metadata, kept.prompt_token_ids) == ({"page": "3 of <EMAIL>"}, ())
    assert all(choice.token_ids for choice in kept.choices)  # nobody's address is in the answers
    assert (said.comment, said.edit) == ("ask <EMAIL>", "write to <EMAIL>")
    assert (preference.chosen.text, preference.comment) == ("<KEY>", "<EMAIL>")
    told = private.http.status()["privacy"]
    assert told["redacted"]["email"] >= 5
    assert told["metadata_dropped"] >= 1


def test_what_is_not_to_be_stored_is_nowhere(way: Door, private: System) -> None:
    """Nor can anything be said of it: an edit would keep its prompt."""
    id_ = way.chat("not to be kept", store=False, user="nobody")["id"]
    for said in ({"edit": "better"}, {"thumb": "up"}):
        with pytest.raises(Refused) as refusal:
            way.feedback({**side(id_), **said})
        assert refusal.value.status == "NOT_FOUND"
    with pytest.raises(Refused):
        way.prefer({"chosen": {"text": "better"}, "rejected": side(id_)})
    with private.store() as store:
        assert store.list_completions(end_user="nobody") == []
        assert id_ not in str(store.list_feedback(limit=100)) + str(store.list_preferences(limit=100))


def test_forgetting_tells_which_versions_had_learnt(way: Door, private: System) -> None:
    """And the version's own page counts the user ever after."""
    user = f"learnt-{way.name}"
    id_ = way.chat(f"who are you, {user}?", user=user, n=2)["id"]
    made = way.prefer({"chosen": side(id_), "rejected": side(id_, 1)})
    with private.store() as store:
        job = store.create_job("dpo")
        store.add_snapshot(Snapshot(f"snap-{user}", job.id, 1.0, (made["id"],), (), {}))
        store.request_cancel(job.id)
        store.add_version(Version(f"v-{user}", "v1", "candidate", "dpo", job.id, 1.0))
        before = store.forgotten_of(f"v-{user}")
    gone = plain(way.forget(user))
    use = {"version": f"v-{user}", "state": "candidate", "job": job.id, "uses": {"train": 1}}
    assert gone["lineage"] == {"versions": [use]}
    with private.store() as store:
        assert (before["users"], store.forgotten_of(f"v-{user}")["users"]) == (0, 1)
    shown = private.http.client.get("/noria/v1/versions/v1").json()
    assert shown["forgotten"] == {"users": 0, "uses": {}, "inherited": 0}


def side(id_: str, index: int = 0) -> Json:
    """One side of a preference."""
    return {"completion_id": id_, "index": index}
