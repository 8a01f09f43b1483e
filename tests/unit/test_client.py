"""The client over real HTTP: paging, errors, a stream of events that breaks."""

from __future__ import annotations

import pytest

from noria.client import NoriaClient
from noria.errors import Conflict, NotFound, RateLimited, Unavailable
from tests.unit.fake_server import Answer, event, job, page, rollout, serving, status


def test_a_list_is_read_over_all_its_pages() -> None:
    first = {**page({"id": "v3"}, {"id": "v2"}), "has_more": True}
    with serving({"GET /noria/v1/versions": [first, page({"id": "v1"})]}) as server, NoriaClient(server.url) as client:
        assert [one["id"] for one in client.versions()] == ["v3", "v2", "v1"]
        assert len(server.asked) == 2


def test_the_key_is_shown() -> None:
    with (
        serving({"GET /noria/v1/status": status()}) as server,
        NoriaClient(server.url + "/", api_key="k") as client,
    ):
        assert client.status()["live"] == "v1"
        assert server.keys == {"Bearer k"}


def test_an_error_body_is_the_error_it_was() -> None:
    refused = Conflict("there is no previous version", code="no_previous_version")
    with serving({"POST /noria/v1/rollback": refused}) as server, NoriaClient(server.url) as client:
        with pytest.raises(Conflict, match="no previous version") as raised:
            client.rollback()
        assert raised.value.code == "no_previous_version"
        with pytest.raises(NotFound):
            client.job("job_x")


def test_a_refusal_says_when_to_come_back() -> None:
    refused = RateLimited("limit of 6 preferences an hour reached", retry_after_s=8.2)
    with (
        serving({"GET /noria/v1/status": refused}) as server,
        NoriaClient(server.url) as client,
        pytest.raises(RateLimited) as raised,
    ):
        client.status()
    assert raised.value.retry_after_s == 9.0


def test_nobody_there_is_unavailable_and_says_what_to_do(free_port: int) -> None:
    with NoriaClient(f"http://127.0.0.1:{free_port}") as client, pytest.raises(Unavailable, match="noria up"):
        client.status()


def test_events_are_taken_up_where_the_line_broke() -> None:
    answers: dict[str, Answer] = {
        "GET /noria/v1/jobs/job_1/events": [
            {"events": [event(1, "state", state="running"), event(2, "stage", stage="train"), "broken"]},
            {"events": [event(3, "state", state="succeeded")]},
        ],
        "GET /noria/v1/jobs/job_1": job(),
    }
    with serving(answers) as server, NoriaClient(server.url) as client:
        assert [one["seq"] for one in client.watch_job("job_1")] == [1, 2, 3]
        streams = [what for what, _ in server.asked if "/events" in what]
    assert streams == ["GET /noria/v1/jobs/job_1/events?after=0", "GET /noria/v1/jobs/job_1/events?after=2"]


def test_events_of_an_unknown_job_are_not_found() -> None:
    with serving({}) as server, NoriaClient(server.url) as client, pytest.raises(NotFound):
        list(client.watch_job("job_1"))


def test_a_rollout_is_followed_to_its_end() -> None:
    answers: dict[str, Answer] = {
        "GET /noria/v1/rollouts/roll_1": [rollout("queued"), rollout("running"), rollout("succeeded")]
    }
    with serving(answers) as server, NoriaClient(server.url) as client:
        assert client.wait_rollout("roll_1", poll_s=0.01)["state"] == "succeeded"
        assert len(server.asked) == 3


def test_a_rollout_that_does_not_end_is_unavailable() -> None:
    answers: dict[str, Answer] = {"GET /noria/v1/rollouts/roll_1": rollout("running")}
    with serving(answers) as server, NoriaClient(server.url) as client, pytest.raises(Unavailable) as raised:
        client.wait_rollout("roll_1", timeout_s=0.05, poll_s=0.01)
    assert raised.value.code == "timeout"


def test_an_end_user_with_slashes_and_spaces_is_one_name() -> None:
    answers: dict[str, Answer] = {"DELETE /noria/v1/end_users/a/b%20c": {"deleted": True, "completions": 2}}
    with serving(answers) as server, NoriaClient(server.url) as client:
        assert client.forget_end_user("a/b c")["completions"] == 2
