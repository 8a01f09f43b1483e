"""Every error has one row in the table, and the client gives back the error that the server put on the wire."""

from __future__ import annotations

import httpx
import pytest
from fastapi import APIRouter, FastAPI

from noria import errors
from noria.client import error_of
from noria.errors import WIRE, NoriaError, openai_body, wire_of
from serve.api.errors import NoriaRoute

CLASSES = [one for one in vars(errors).values() if isinstance(one, type) and issubclass(one, NoriaError)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_its_own_row(kind: type[NoriaError]) -> None:
    assert wire_of(kind("said")) is WIRE[kind]
    assert 400 <= WIRE[kind].http_status <= 599
    assert WIRE[kind].exit_code > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_the_client_gets_back_what_the_server_raised(kind: type[NoriaError]) -> None:
    sent = kind("said", param="where")
    got = error_of(wire_of(sent).http_status, openai_body(sent))
    assert (type(got), got.message, got.param, got.code) == (kind, "said", "where", kind.code)


def test_a_subclass_without_a_row_takes_its_parents() -> None:
    class Special(errors.Conflict):
        """A conflict of its own."""

    assert wire_of(Special("said")).http_status == 409


def test_a_code_of_its_own_survives() -> None:
    sent = errors.Conflict("said", code="no_previous_version")
    assert openai_body(sent)["error"] == {
        "message": "said",
        "type": "conflict_error",
        "param": None,
        "code": "no_previous_version",
    }
    got = error_of(409, openai_body(sent))
    assert (type(got), got.code) == (errors.Conflict, "no_previous_version")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (404, {"error": {"message": "said", "type": "NotFoundError", "code": 404}}, errors.NotFound),
        (400, {"error": {"message": "said", "type": "BadRequestError"}}, errors.InvalidRequest),
        (401, {"error": "Unauthorized"}, errors.Unauthenticated),
        (502, "<html>", errors.Unavailable),
        (503, {}, errors.Unavailable),
        (418, {}, NoriaError),
    ],
)
def test_bodies_that_are_not_ours_go_by_their_status(status: int, body: object, kind: type[NoriaError]) -> None:
    assert type(error_of(status, body)) is kind


async def test_a_bug_is_logged_without_whom_it_was_asked_about(caplog: pytest.LogCaptureFixture) -> None:
    """The path of `DELETE /noria/v1/end_users/U` names who is to be forgotten."""
    router = APIRouter(prefix="/noria/v1", route_class=NoriaRoute)

    @router.delete("/end_users/{user}")
    async def forget(user: str) -> None:
        raise RuntimeError

    app = FastAPI()
    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://noria") as client:
        assert (await client.delete("/noria/v1/end_users/jane")).status_code == 500
    (line,) = (record for record in caplog.records if record.message == "request_failed")
    assert vars(line)["path"] == "/noria/v1/end_users/{user}"
