"""A small server of `/noria/v1` that answers what a test tells it to, over real HTTP, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from noria.errors import NoriaError, NotFound, openai_body, retry_after, wire_of
from noria.records import Json

Answer = Mapping[str, Any] | NoriaError | list[Any]


class FakeServer(ThreadingHTTPServer):
    """`answers` maps "GET /noria/v1/status" to a body, an error, or a list of these, one a call.

    A path that ends in /events is answered as server-sent events; a string among them breaks the connection there.
    """

    daemon_threads = True

    def __init__(self, answers: Mapping[str, Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = answers
        self.asked: list[tuple[str, Json]] = []
        self.keys: set[str | None] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_answer(self, what: str) -> Any:
        """The answer to this call; a list gives its first until one is left."""
        found = self.answers.get(what)
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return NotFound(f"nothing at {what}") if found is None else found


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_DELETE = do_GET

    def _answer(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(size)) if size else {}
        path, _, query = self.path.partition("?")
        self.server.asked.append((f"{self.command} {path}" + (f"?{query}" if path.endswith("/events") else ""), body))
        self.server.keys.add(self.headers.get("authorization"))
        answer = self.server.next_answer(f"{self.command} {path}")
        if path.endswith("/events") and not isinstance(answer, NoriaError):
            self._events(answer["events"])
        elif isinstance(answer, NoriaError):
            self._send(wire_of(answer).http_status, openai_body(answer), retry_after(answer))
        else:
            self._send(200, answer)

    def _send(self, status: int, body: Mapping[str, Any], wait_s: str | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        if wait_s is not None:
            self.send_header("retry-after", wait_s)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _events(self, events: list[Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(10**6) if "broken" in events else str(len(_text(events))))
        self.end_headers()
        self.wfile.write(_text(events))
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""


def _text(events: list[Any]) -> bytes:
    lines = [
        f"id: {one['seq']}\nevent: {one['kind']}\ndata: {json.dumps(one)}\n\n" for one in events if one != "broken"
    ]
    return (": hello\n\n" + "".join(lines)).encode()


@contextmanager
def serving(answers: Mapping[str, Answer]) -> Iterator[FakeServer]:
    """Runs the server in a thread."""
    server = FakeServer(answers)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def page(*rows: Json) -> Json:
    """A list as the wire shapes it."""
    return {"object": "list", "data": list(rows), "has_more": False}


def job(state: str = "succeeded", **more: Any) -> Json:
    """A job as the wire shapes it."""
    shape: Json = {"id": "job_1", "object": "job", "method": "dpo", "state": state, "stage": "rollout", "progress": 1.0}
    shape |= {"metrics": {}, "version": None, "error": None, "created_at": 1e9, "reason": "operator"}
    return {**shape, **more}


def rollout(state: str = "succeeded", **more: Any) -> Json:
    """A rollout as the wire shapes it."""
    shape: Json = {"id": "roll_1", "object": "rollout", "version": "v2", "previous": "v1", "state": state}
    return {**shape, "reason": None, "metrics": {}, "finished_at": None, **more}


def status(**more: Any) -> Json:
    """A status as the wire shapes it."""
    shape: Json = {"live": "v1", "serving": "v1", "previous": None, "job": None}
    shape |= {"preferences": {"total": 50, "unused": 40, "needed": 200}}
    return {**shape, "trainer": {"alive": True, "idle_reason": "40 of 200 preferences"}, **more}


def event(seq: int, kind: str, **data: Any) -> Json:
    """A job's event as the wire shapes it."""
    return {"job_id": "job_1", "seq": seq, "at": 1e9, "kind": kind, "data": data}
