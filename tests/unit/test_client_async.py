"""The awaited client asks what the blocking one asks, and reads the same answers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from noria.client import AsyncNoriaClient, NoriaClient
from noria.client.flows import operation
from noria.client.methods import Methods
from noria.errors import Conflict, NotFound, SettingsError, Unavailable
from noria.tls import Trust
from tests.unit.fake_server import Answer, event, job, page, rollout, serving, status

ID = {"deleted": True, "id": "x", "object": "deleted"}
ASKED: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "status": ((), {}, "GET /noria/v1/status"),
    "versions": ((), {}, "GET /noria/v1/versions"),
    "version": (("v2",), {}, "GET /noria/v1/versions/v2"),
    "create_rollout": (("v2",), {"percent": 10}, "POST /noria/v1/rollouts"),
    "rollouts": ((), {"limit": 3}, "GET /noria/v1/rollouts"),
    "rollout": (("roll_1",), {}, "GET /noria/v1/rollouts/roll_1"),
    "wait_rollout": (("roll_1",), {"poll_s": 0.01}, "GET /noria/v1/rollouts/roll_1"),
    "rollback": ((), {}, "POST /noria/v1/rollback"),
    "create_job": ((), {"method": "dpo", "settings": {"dpo": {"beta": 0.2}}}, "POST /noria/v1/jobs"),
    "jobs": ((), {"limit": 1}, "GET /noria/v1/jobs"),
    "job": (("job_1",), {}, "GET /noria/v1/jobs/job_1"),
    "cancel_job": (("job_1",), {}, "POST /noria/v1/jobs/job_1/cancel"),
    "preferences": ((), {"order": "asc"}, "GET /noria/v1/preferences"),
    "record_preference": (
        (),
        {"chosen": {"completion_id": "c", "index": 0}, "rejected": {"text": "b"}, "comment": "why"},
        "POST /noria/v1/preferences",
    ),
    "delete_preference": (("pref_1",), {}, "DELETE /noria/v1/preferences/pref_1"),
    "record_feedback": (("c", 1), {"thumb": "up"}, "POST /noria/v1/feedback"),
    "feedback": ((), {}, "GET /noria/v1/feedback"),
    "delete_feedback": (("fb_1",), {}, "DELETE /noria/v1/feedback/fb_1"),
    "audit_events": ((), {"action": "create_job", "limit": 2}, "GET /noria/v1/audit"),
    "forget_end_user": (("u",), {}, "DELETE /noria/v1/end_users/u"),
}


def test_every_method_is_in_the_table() -> None:
    """A method that is added is tried in both forms."""
    assert set(ASKED) == {name for name, value in vars(Methods).items() if isinstance(value, operation)}


def answer_to(what: str) -> Mapping[str, Any]:
    """Something of the right shape."""
    method, _, path = what.partition(" ")
    if method == "DELETE":
        return ID
    if "rollouts/" in path or "rollback" in path:
        return rollout("succeeded")
    return page(job(), job()) if method == "GET" and path.count("/") == 3 and "status" not in path else job()


@pytest.mark.parametrize("name", list(ASKED))
async def test_both_forms_ask_the_same(name: str) -> None:
    """Path, body, and what comes back."""
    args, more, what = ASKED[name]
    with serving({what: answer_to(what)}) as server:
        with NoriaClient(server.url, api_key="k") as blocking:
            first = getattr(blocking, name)(*args, **more)
        async with AsyncNoriaClient(server.url, api_key="k") as awaited:
            second = await getattr(awaited, name)(*args, **more)
    assert first == second
    assert server.asked[0] == server.asked[1]
    assert server.asked[0][0] == what
    assert server.keys == {"Bearer k"}


def test_methods_say_what_they_do() -> None:
    """On the class, for `help`, and bound."""
    assert str(vars(Methods)["status"].__doc__).startswith("How things stand")
    with NoriaClient("http://127.0.0.1:1") as client:
        assert client.rollback.__name__ == "rollback"
        assert "which has yet to run" in str(client.create_rollout.__doc__)


async def test_pages_follow_each_other() -> None:
    first = {"data": [{"id": f"v{n}"} for n in range(100)], "has_more": True}
    answers: dict[str, Answer] = {"GET /noria/v1/versions": [first, page({"id": "v100"})]}
    with serving(answers) as server:
        async with AsyncNoriaClient(server.url) as client:
            assert [one["id"] for one in await client.versions()][-2:] == ["v99", "v100"]
    assert len(server.asked) == 2


async def test_errors_are_those_of_the_server() -> None:
    with serving({"POST /noria/v1/rollback": Conflict("only one", code="no_previous_version")}) as server:
        async with AsyncNoriaClient(server.url) as client:
            with pytest.raises(Conflict) as caught:
                await client.rollback()
            assert caught.value.code == "no_previous_version"
            with pytest.raises(NotFound):
                [one async for one in client.watch_job("job_none")]
    async with AsyncNoriaClient(server.url) as client:
        with pytest.raises(Unavailable, match="noria up"):
            await client.status()


async def test_a_broken_watch_goes_on_where_it_broke() -> None:
    events = [event(1, "state"), event(2, "stage"), "broken"]
    answers: dict[str, Answer] = {
        "GET /noria/v1/jobs/job_1/events": [{"events": events}, {"events": [event(3, "state", state="succeeded")]}],
        "GET /noria/v1/jobs/job_1": job("succeeded"),
    }
    with serving(answers) as server:
        async with AsyncNoriaClient(server.url) as client:
            assert [one["seq"] async for one in client.watch_job("job_1")] == [1, 2, 3]
    asked = [what for what, _ in server.asked if "events" in what]
    assert asked == ["GET /noria/v1/jobs/job_1/events?after=0", "GET /noria/v1/jobs/job_1/events?after=2"]


async def test_a_rollout_that_does_not_end_is_unavailable() -> None:
    with serving({"GET /noria/v1/rollouts/roll_1": rollout("running")}) as server:
        async with AsyncNoriaClient(server.url) as client:
            with pytest.raises(Unavailable, match="did not end"):
                await client.wait_rollout("roll_1", timeout_s=0.05, poll_s=0.01)


def test_trust_is_read_for_https_only() -> None:
    """So that one environment does for every server."""
    missing = Trust(ca=Path("/nowhere.pem"))
    with serving({"GET /noria/v1/status": status()}) as server, NoriaClient(server.url, trust=missing) as client:
        assert client.status()["live"] == "v1"
    for kind in (NoriaClient, AsyncNoriaClient):
        with pytest.raises(SettingsError, match="tls_ca"):
            kind("https://127.0.0.1:1", trust=missing)
