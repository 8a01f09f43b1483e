"""What can be asked of `/noria/v1`: one method a call, for both clients.

Every method raises the NoriaError that the server answered with, or Unavailable when nobody answers. See
`noria.client.flows` for how a method becomes one that returns or one that is awaited.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast
from urllib.parse import quote

from noria.client.flows import Call, Flow, Sleep, operation
from noria.client.shapes import (
    AuditEvent,
    Deleted,
    Feedback,
    ForgottenEndUser,
    Job,
    Preference,
    Rollout,
    Status,
    Version,
)
from noria.errors import Unavailable

ROLLED_OUT = frozenset({"succeeded", "failed"})
PAGE = 100  # the most rows that the server gives at once


def rows(path: str, limit: int | None = None, **query: Any) -> Flow[list[Any]]:
    """The first `limit` rows, or all, over as many pages as it takes."""
    found: list[Any] = []
    while limit is None or len(found) < limit:
        size = PAGE if limit is None else min(PAGE, limit - len(found))
        page = yield Call("GET", path, query={**query, "limit": size, "after": found[-1]["id"] if found else None})
        found += page["data"]
        if not page.get("has_more") or not page["data"]:
            break
    return found


class Methods:
    """Preferences, feedback, jobs, versions, rollouts, status."""

    @operation
    def status(self) -> Flow[Status]:
        """How things stand: live, serving, previous, preferences, trainer, job."""
        return cast(Status, (yield Call("GET", "/noria/v1/status")))

    @operation
    def versions(self) -> Flow[list[Version]]:
        """All versions, newest first."""
        return (yield from rows("/noria/v1/versions"))

    @operation
    def version(self, version: str) -> Flow[Version]:
        """One version."""
        return cast(Version, (yield Call("GET", f"/noria/v1/versions/{_segment(version)}")))

    @operation
    def create_rollout(self, version: str, *, strategy: str = "direct", percent: int | None = None) -> Flow[Rollout]:
        """Asks for a version to go live; returns the rollout, which has yet to run."""
        body = {"version": version, "strategy": strategy} | ({} if percent is None else {"percent": percent})
        return cast(Rollout, (yield Call("POST", "/noria/v1/rollouts", body)))

    @operation
    def rollouts(self, *, limit: int | None = None) -> Flow[list[Rollout]]:
        """All rollouts, or the newest, newest first."""
        return (yield from rows("/noria/v1/rollouts", limit))

    @operation
    def rollout(self, rollout_id: str) -> Flow[Rollout]:
        """One rollout."""
        return cast(Rollout, (yield Call("GET", f"/noria/v1/rollouts/{_segment(rollout_id)}")))

    @operation
    def wait_rollout(self, rollout_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.3) -> Flow[Rollout]:
        """Polls until the rollout has succeeded or failed. Raises Unavailable (code `timeout`) when it does neither."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = cast(Rollout, (yield Call("GET", f"/noria/v1/rollouts/{_segment(rollout_id)}")))
            if found["state"] in ROLLED_OUT:
                return found
            yield Sleep(poll_s)
        raise Unavailable(f"rollout {rollout_id} did not end within {timeout_s:g} s", code="timeout")

    @operation
    def rollback(self) -> Flow[Rollout]:
        """Asks for the previous version to be live again; returns the rollout."""
        return cast(Rollout, (yield Call("POST", "/noria/v1/rollback", {})))

    @operation
    def create_job(
        self, *, method: str | None = None, settings: Mapping[str, Any] | None = None, rollout: str | None = None
    ) -> Flow[Job]:
        """Asks for a training job; `settings` is a partial tree under `train`, like `{"dpo": {"beta": 0.2}}`.

        A method or rollout that is not named is the server's `train.policy`.
        """
        body = {"method": method, "settings": dict(settings or {}), "rollout": rollout}
        return cast(Job, (yield Call("POST", "/noria/v1/jobs", _given(body))))

    @operation
    def jobs(self, *, limit: int = 20) -> Flow[list[Job]]:
        """The newest jobs, newest first."""
        return (yield from rows("/noria/v1/jobs", limit))

    @operation
    def job(self, job_id: str) -> Flow[Job]:
        """One job."""
        return cast(Job, (yield Call("GET", f"/noria/v1/jobs/{_segment(job_id)}")))

    @operation
    def cancel_job(self, job_id: str) -> Flow[Job]:
        """Asks for a job to stop; returns it as it is now."""
        return cast(Job, (yield Call("POST", f"/noria/v1/jobs/{_segment(job_id)}/cancel", {})))

    @operation
    def preferences(self, *, limit: int = 20, order: str = "desc") -> Flow[list[Preference]]:
        """The newest preferences, newest first; the oldest, oldest first, with order `asc`."""
        return (yield from rows("/noria/v1/preferences", limit, order=order))

    @operation
    def record_preference(
        self,
        *,
        chosen: Mapping[str, Any],
        rejected: Mapping[str, Any],
        verdict: str = "chosen",
        annotator: str | None = None,
        comment: str | None = None,
    ) -> Flow[Preference]:
        """Records a preference; a side is `{"completion_id", "index"}` or `{"text"}`. Durable when it returns."""
        body = {"chosen": dict(chosen), "rejected": dict(rejected), "verdict": verdict}
        said = {**body, "annotator": annotator, "comment": comment}
        return cast(Preference, (yield Call("POST", "/noria/v1/preferences", said)))

    @operation
    def delete_preference(self, preference_id: str) -> Flow[Deleted]:
        """Deletes one preference."""
        return cast(Deleted, (yield Call("DELETE", f"/noria/v1/preferences/{_segment(preference_id)}")))

    @operation
    def record_feedback(
        self,
        completion_id: str,
        index: int = 0,
        *,
        rating: int | None = None,
        thumb: str | None = None,
        edit: str | None = None,
        comment: str | None = None,
        annotator: str | None = None,
    ) -> Flow[Feedback]:
        """Records feedback on one choice: a rating of 1 to 5, a thumb `up` or `down`, a better text, words."""
        said = {"rating": rating, "thumb": thumb, "edit": edit, "comment": comment, "annotator": annotator}
        body = {"completion_id": completion_id, "index": index, **_given(said)}
        return cast(Feedback, (yield Call("POST", "/noria/v1/feedback", body)))

    @operation
    def feedback(self, *, limit: int = 20) -> Flow[list[Feedback]]:
        """The newest feedback, newest first."""
        return (yield from rows("/noria/v1/feedback", limit))

    @operation
    def delete_feedback(self, feedback_id: str) -> Flow[Deleted]:
        """Deletes one feedback."""
        return cast(Deleted, (yield Call("DELETE", f"/noria/v1/feedback/{_segment(feedback_id)}")))

    @operation
    def audit_events(
        self, *, limit: int = 20, key_id: str | None = None, action: str | None = None
    ) -> Flow[list[AuditEvent]]:
        """The newest lines of the audit log, newest first."""
        return (yield from rows("/noria/v1/audit", limit, key_id=key_id, action=action))

    @operation
    def forget_end_user(self, user: str) -> Flow[ForgottenEndUser]:
        """Deletes everything that one end user left; returns how much of each."""
        return cast(ForgottenEndUser, (yield Call("DELETE", f"/noria/v1/end_users/{quote(user)}")))


def _given(body: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in body.items() if value is not None}


def _segment(text: str) -> str:
    return quote(text, safe="")
