"""Keys and the audit log: only hashes are kept, names are taken once, lines stay."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from sqlalchemy import select

from noria.access.audit import AuditEvent, by_os_user, new_event, os_user
from noria.access.keys import TEXT, hash_of, id_in
from noria.errors import Conflict, InvalidRequest, NotFound
from noria.store import Store
from noria.store.access.tables import api_keys
from tests.unit.store.conftest import Clock


def test_a_key_is_kept_without_its_text(store: Store) -> None:
    assert not store.has_keys()
    made, text = store.create_key("shop", ["annotator", "client", "client"])
    assert made.roles == ("client", "annotator") and made.state(1e12) == "valid"
    assert TEXT.fullmatch(text) and id_in(text) == made.id and made.hash == hash_of(text)
    assert store.list_keys() == [made] and store.get_key("shop") == store.get_key(made.id) == made
    with store._db.read() as conn:
        row = conn.execute(select(api_keys)).one()
    assert text.rpartition("-")[2] not in repr(row) and store.has_keys()
    assert made.hash not in repr(made.to_wire(1e12))


@pytest.mark.parametrize(
    ("name", "roles", "param"),
    [
        ("shop", [], "roles"),
        ("shop", ["client", "king"], "roles"),
        ("", ["client"], "name"),
        ("key_1", ["client"], "name"),
        ("a\nb", ["client"], "name"),
        ("x" * 65, ["client"], "name"),
        ("settings", ["client"], "name"),
    ],
)
def test_a_key_that_cannot_be_is_refused(store: Store, name: str, roles: list[str], param: str) -> None:
    with pytest.raises(InvalidRequest) as told:
        store.create_key(name, roles)
    assert told.value.param == param and store.list_keys() == []


def test_a_name_is_free_again_when_its_key_is_revoked(store: Store, clock: Clock) -> None:
    first, _ = store.create_key("shop", ["client"])
    with pytest.raises(Conflict, match="shop"):
        store.create_key("shop", ["operator"])
    clock.now += 1
    ended = store.revoke_key("shop")
    assert (ended.revoked_at, ended.state(clock.now)) == (clock.now, "revoked")
    clock.now += 1
    assert store.revoke_key(first.id) == ended  # again is no error, and changes nothing
    second, _ = store.create_key("shop", ["client"])
    assert store.get_key("shop").id == second.id != first.id
    with pytest.raises(NotFound):
        store.revoke_key("nobody")


def test_a_rotation_keeps_the_secret_before_for_the_overlap(store: Store, clock: Clock) -> None:
    made, old = store.create_key("shop", ["client"], expires_at=clock.now + 100)
    turned, new = store.rotate_key("shop", 60)
    assert (turned.id, turned.hash, id_in(new)) == (made.id, hash_of(new), made.id)
    assert (turned.previous_hash, turned.previous_until) == (hash_of(old), clock.now + 60)
    again, newest = store.rotate_key("shop")
    assert (again.hash, again.previous_hash, again.previous_until) == (hash_of(newest), None, None)
    clock.now += 100
    assert again.state(clock.now) == "expired"
    with pytest.raises(Conflict, match="expired"):
        store.rotate_key("shop")
    with pytest.raises(InvalidRequest):
        store.create_key("late", ["client"], expires_at=clock.now)


def test_the_last_use_never_goes_back(store: Store) -> None:
    one, _ = store.create_key("one", ["client"])
    two, _ = store.create_key("two", ["client"])
    store.keys_used({one.id: 50.0, two.id: 10.0})
    store.keys_used({one.id: 20.0, two.id: 20.0, "key_gone": 1.0})
    assert [key.last_used_at for key in store.list_keys()] == [50.0, 20.0]


def event(action: str, key_id: str = "key_1") -> AuditEvent:
    """A line with something in every field."""
    return new_event(key_id=key_id, name="boss", action=action, target="v1", result="ok", wire="grpc")


def test_lines_come_back_as_they_were_in_pages(store: Store) -> None:
    kept = [event("rollback"), event("create_job", "key_2"), event("rollback", "key_2")]
    for one in kept:
        store.add_audit_event(one)
    assert store.list_audit_events() == kept[::-1]
    assert store.list_audit_events(order="asc", limit=2) == kept[:2]
    assert store.list_audit_events(after=kept[2].id, limit=1) == [kept[1]]
    assert store.list_audit_events(order="asc", after=kept[0].id) == kept[1:]
    assert store.list_audit_events(key_id="key_2", action="rollback") == [kept[2]]
    with pytest.raises(NotFound):
        store.list_audit_events(after="audit_none")
    assert kept[0].to_wire() == {"object": "audit_event", **asdict(kept[0])}
    assert not [name for name in dir(store) if "audit" in name and name not in ("add_audit_event", "list_audit_events")]


def test_the_command_line_is_audited_as_the_user_whatever_comes_of_it(store: Store) -> None:
    with by_os_user(store, "create_job") as noted:
        noted.target = "job_1"
    with pytest.raises(NotFound), by_os_user(store, "cancel_job", "x" * 1000):
        raise NotFound("no such job")
    with pytest.raises(ZeroDivisionError), by_os_user(store, "forget_end_user"):
        raise ZeroDivisionError
    kept = store.list_audit_events(order="asc")
    assert [(one.key_id, one.name, one.wire) for one in kept] == [("os", os_user(), "cli")] * 3
    assert [(one.action, one.target, one.result) for one in kept] == [
        ("create_job", "job_1", "ok"),
        ("cancel_job", "x" * 200, "not_found"),
        ("forget_end_user", None, "internal_error"),
    ]
