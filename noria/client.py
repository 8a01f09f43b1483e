"""A small typed client of `/noria/v1`, for the command line, the demo and programs.

Comes in: the server's URL. Goes out: the wire's JSON as dicts; an error body becomes the NoriaError it was.
Must not import serve or train: it knows the wire only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import httpx

from noria.errors import WIRE, NoriaError, SettingsError, Unavailable
from noria.records import Json

ENDED = frozenset({"succeeded", "failed", "cancelled"})
ROLLED_OUT = frozenset({"succeeded", "failed"})
RECONNECTS = 20
PAGE = 100  # the most rows that the server gives at once


class NoriaClient:
    """Speaks to one server; use it as a context manager or close it.

    Every method raises the NoriaError that the server answered with, or Unavailable when nobody answers.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def status(self) -> Json:
        """DESIGN's status: live, serving, previous, preferences, trainer, job."""
        return self._call("GET", "/noria/v1/status")

    def versions(self) -> list[Json]:
        """All versions, newest first."""
        return self._list("/noria/v1/versions")

    def version(self, version: str) -> Json:
        """One version."""
        return self._call("GET", f"/noria/v1/versions/{version}")

    def create_rollout(self, version: str, *, strategy: str = "direct", percent: int | None = None) -> Json:
        """Asks for a version to go live; returns the rollout, which has yet to run."""
        body = {"version": version, "strategy": strategy} | ({} if percent is None else {"percent": percent})
        return self._call("POST", "/noria/v1/rollouts", body)

    def rollouts(self, *, limit: int | None = None) -> list[Json]:
        """All rollouts, or the newest, newest first."""
        return self._list("/noria/v1/rollouts", limit)

    def rollout(self, rollout_id: str) -> Json:
        """One rollout."""
        return self._call("GET", f"/noria/v1/rollouts/{rollout_id}")

    def wait_rollout(self, rollout_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.3) -> Json:
        """Polls until the rollout has succeeded or failed. Raises Unavailable (code `timeout`) when it does neither."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.rollout(rollout_id)
            if found["state"] in ROLLED_OUT:
                return found
            time.sleep(poll_s)
        raise Unavailable(f"rollout {rollout_id} did not end within {timeout_s:g} s", code="timeout")

    def rollback(self) -> Json:
        """Asks for the previous version to be live again; returns the rollout."""
        return self._call("POST", "/noria/v1/rollback", {})

    def create_job(
        self, *, method: str | None = None, settings: Mapping[str, Any] | None = None, rollout: str | None = None
    ) -> Json:
        """Asks for a training job; `settings` is a partial tree under `train`, like `{"dpo": {"beta": 0.2}}`.

        A method or rollout that is not named is the server's `train.policy`.
        """
        body = {"method": method, "settings": dict(settings or {}), "rollout": rollout}
        return self._call("POST", "/noria/v1/jobs", {key: value for key, value in body.items() if value is not None})

    def jobs(self, *, limit: int = 20) -> list[Json]:
        """The newest jobs, newest first."""
        return self._list("/noria/v1/jobs", limit)

    def job(self, job_id: str) -> Json:
        """One job."""
        return self._call("GET", f"/noria/v1/jobs/{job_id}")

    def cancel_job(self, job_id: str) -> Json:
        """Asks for a job to stop; returns it as it is now."""
        return self._call("POST", f"/noria/v1/jobs/{job_id}/cancel", {})

    def watch_job(self, job_id: str, *, after: int = 0) -> Iterator[Json]:
        """The job's events from `after` on, until it has ended; a broken connection is taken up where it broke.

        An event is `{"job_id", "seq", "at", "kind", "data"}`.
        """
        failures = 0
        while True:
            try:
                for event in self._events(f"/noria/v1/jobs/{job_id}/events", after):
                    after, failures = max(after, int(event["seq"])), 0
                    yield event
                if self.job(job_id)["state"] in ENDED:
                    return
            except Unavailable:
                failures += 1
                if failures > RECONNECTS:
                    raise
            time.sleep(0.2 if failures == 0 else 1.0)

    def preferences(self, *, limit: int = 20, order: str = "desc") -> list[Json]:
        """The newest preferences, newest first; the oldest, oldest first, with order `asc`."""
        return self._list("/noria/v1/preferences", limit, order=order)

    def record_preference(
        self,
        *,
        chosen: Mapping[str, Any],
        rejected: Mapping[str, Any],
        verdict: str = "chosen",
        annotator: str | None = None,
        comment: str | None = None,
    ) -> Json:
        """Records a preference; a side is `{"completion_id", "index"}` or `{"text"}`. Durable when it returns."""
        body = {"chosen": dict(chosen), "rejected": dict(rejected), "verdict": verdict}
        return self._call("POST", "/noria/v1/preferences", {**body, "annotator": annotator, "comment": comment})

    def delete_preference(self, preference_id: str) -> Json:
        """Deletes one preference."""
        return self._call("DELETE", f"/noria/v1/preferences/{preference_id}")

    def record_feedback(self, completion_id: str, index: int = 0, **said: Any) -> Json:
        """Records feedback on one choice: `rating`, `thumb`, `edit`, `comment`, `annotator`."""
        return self._call("POST", "/noria/v1/feedback", {"completion_id": completion_id, "index": index, **said})

    def feedback(self, *, limit: int = 20) -> list[Json]:
        """The newest feedback, newest first."""
        return self._list("/noria/v1/feedback", limit)

    def delete_feedback(self, feedback_id: str) -> Json:
        """Deletes one feedback."""
        return self._call("DELETE", f"/noria/v1/feedback/{feedback_id}")

    def audit_events(self, *, limit: int = 20, key_id: str | None = None, action: str | None = None) -> list[Json]:
        """The newest lines of the audit log, newest first."""
        return self._list("/noria/v1/audit", limit, key_id=key_id, action=action)

    def forget_end_user(self, user: str) -> Json:
        """Deletes everything that one end user left; returns how much of each."""
        return self._call("DELETE", f"/noria/v1/end_users/{quote(user)}")

    def _call(self, method: str, path: str, body: Json | None = None, **query: Any) -> Json:
        params = {key: value for key, value in query.items() if value is not None}
        try:
            response = self._http.request(method, path, json=body, params=params)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        return _json_or_raise(response)

    def _list(self, path: str, limit: int | None = None, **query: Any) -> list[Json]:
        """The first `limit` rows, or all, over as many pages as it takes."""
        rows: list[Json] = []
        while limit is None or len(rows) < limit:
            size = PAGE if limit is None else min(PAGE, limit - len(rows))
            page = self._call("GET", path, limit=size, after=rows[-1]["id"] if rows else None, **query)
            rows += page["data"]
            if not page.get("has_more") or not page["data"]:
                break
        return rows

    def _events(self, path: str, after: int) -> Iterator[Json]:
        timeout = httpx.Timeout(30.0, read=120.0)
        try:
            with self._http.stream("GET", path, params={"after": after}, timeout=timeout) as response:
                if response.is_error:
                    response.read()
                    _json_or_raise(response)
                yield from _server_sent(response.iter_lines())
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.HTTPError) -> Unavailable:
        what = "took too long" if isinstance(error, httpx.TimeoutException) else "does not answer"
        return Unavailable(
            f"the server at {self.url} {what} ({error or type(error).__name__}); start it with `noria up`, "
            "or say where it is with --url or NORIA_URL"
        )


def _server_sent(lines: Iterator[str]) -> Iterator[Json]:
    """The JSON of each event of a `text/event-stream` (WHATWG HTML, 9.2), without comments and `[DONE]`."""
    data: list[str] = []
    for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text, data = "\n".join(data), []
            if text != "[DONE]":
                yield json.loads(text)


def _json_or_raise(response: httpx.Response) -> Json:
    try:
        body = response.json() if response.content else {}
    except ValueError:
        body = {}
    if response.is_error:
        raise error_of(response.status_code, body)
    if not isinstance(body, dict) or (not body and response.content):
        raise Unavailable(f"{response.request.url} answered {response.status_code} without JSON: is it a Noria server?")
    return body


def error_of(status: int, body: Any) -> NoriaError:
    """The NoriaError that an error body tells of: by its `type` in the table, else by the HTTP status."""
    said = body.get("error") if isinstance(body, dict) else None
    said = said if isinstance(said, dict) else {}
    message = str(said.get("message") or f"the server answered {status}")
    code, param = said.get("code"), said.get("param")
    rows = [cls for cls, wire in WIRE.items() if wire.openai_type == said.get("type")]
    rows = rows or [cls for cls, wire in WIRE.items() if wire.http_status == status]
    rows = rows or [Unavailable if status in (502, 504) else NoriaError]
    # Two classes may share a row's words: the code tells them apart. Without one, settings are the least likely.
    rows.sort(key=lambda cls: (cls.code != code, cls is SettingsError))
    return rows[0](message, param=param, code=str(code) if code else None)
