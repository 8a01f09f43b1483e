"""HTTP connections with an end to patience: heads, bodies and readers that dawdle are told off and hung up on.

Comes in: uvicorn's protocol and `doors` of the settings. Goes out: a protocol class for `uvicorn.Config(http=..)`, and
counts of what it ended. uvicorn itself ends a connection only where it is silent between two
requests. Must not import vllm.
"""

from __future__ import annotations

import asyncio
import http
import json
from collections import Counter, deque
from typing import Any, Literal

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from noria.settings.wire import DoorSettings

MOST_HEAD_BYTES = 64 * 1024  # llhttp has no limit of its own
MOST_UNANSWERED = 16  # requests on one connection: uvicorn keeps as many as a piece of 64 KiB holds
Reason = Literal["head_late", "head_large", "body_slow", "unread", "too_many"]
REASONS: tuple[Reason, ...] = ("head_late", "head_large", "body_slow", "unread", "too_many")


class PatientProtocol(HttpToolsProtocol):
    """One connection. A request is in its head, then in its body, then only its answer is; one timer fits each."""

    limits: DoorSettings
    ended: Counter[Reason]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase: Literal["head", "body", "answer"] = "head"
        self._arriving: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._bytes = self._since_body = 0
        self._was_paused = False
        self._unanswered: deque[Any] = deque()  # uvicorn's cycles, oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has until `head_s` to say what it wants."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end("too_many", 503, f"more than {self.limits.connections} connections are open: try again later")
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more, and every request learns of it: uvicorn tells the last one alone."""
        self._stop_waiting()
        self._read_again()
        super().connection_lost(exc)
        for cycle in self._unanswered:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unanswered.clear()

    def data_received(self, data: bytes) -> None:
        """Counts what comes and has it parsed; headers that have no end by then are too large."""
        if self.transport.is_closing():
            return
        if self._phase == "answer" and self._is_idle():
            self._await_head()
        self._bytes += len(data)
        self._since_body += len(data)
        super().data_received(data)
        head = self._bytes if self._phase == "head" else self._since_body if self._phase == "body" else 0
        if head > MOST_HEAD_BYTES and not self.transport.is_closing():  # what follows a body is headers, too
            self._end("head_large", 431, f"the request's headers are larger than {MOST_HEAD_BYTES} bytes")

    def on_headers_complete(self) -> None:
        """From here on the body is awaited. Too many requests ahead of their answers are no HTTP that is served."""
        last = self.cycle
        super().on_headers_complete()
        if self.cycle is not last:
            self._unanswered.append(self.cycle)
        if len(self._unanswered) > MOST_UNANSWERED:
            raise ValueError("too many requests without an answer")  # uvicorn answers 400 and hangs up
        self._phase, self._since_body = "body", 0
        self._await_body()

    def on_body(self, body: bytes) -> None:
        """Some of it."""
        self._since_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; a pipelined one begins anew."""
        super().on_message_complete()
        self._stop_waiting()
        self._phase, self._bytes = "answer", 0

    def on_message_begin(self) -> None:
        """Another request on the same connection."""
        super().on_message_begin()
        if self._phase == "answer":
            self._await_head()

    def on_response_complete(self) -> None:
        """The answer is given; whether it is read is another matter."""
        self._unanswered.popleft()
        super().on_response_complete()
        self._await_reader()

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        super().pause_writing()
        self._await_reader()

    def resume_writing(self) -> None:
        """It has caught up."""
        super().resume_writing()
        self._read_again()
        if self.transport.is_closing():  # nothing else would look at the rest
            self._await_reader()

    def timeout_keep_alive_handler(self) -> None:
        """Closing waits for what is not read yet, too."""
        super().timeout_keep_alive_handler()
        self._await_reader()

    def handle_websocket_upgrade(self) -> None:
        """Another protocol takes the connection over, unless an answer is being given: that would never end."""
        self._stop_waiting()
        self._read_again()
        if not self._is_idle():
            self.transport.abort()
            return
        super().handle_websocket_upgrade()

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        self._stop_waiting()
        self._phase, self._bytes = "head", 0
        self._arriving = self.loop.call_later(self.limits.head_s, self._head_late)

    def _await_body(self) -> None:
        self._stop_waiting()
        self._bytes, self._was_paused = 0, self.flow.read_paused
        self._arriving = self.loop.call_later(self.limits.body_window_s, self._look_at_body)

    def _await_reader(self) -> None:
        if self._unread is None and self.transport.get_write_buffer_size():
            self._unread = self.loop.call_later(self.limits.stalled_s, self._not_read)

    def _stop_waiting(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _read_again(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _head_late(self) -> None:
        self._end("head_late", 408, f"the request's headers did not arrive within {self.limits.head_s:g} s")

    def _look_at_body(self) -> None:
        """What we do not take in is not the client's fault: a window in which we held back does not count."""
        wanted = self.limits.body_bytes_per_s * self.limits.body_window_s
        if self._bytes < wanted and not (self.flow.read_paused or self._was_paused):
            pace = self.limits.body_bytes_per_s
            self._end("body_slow", 408, f"the request's body came more slowly than {pace} bytes per second")
        else:
            self._await_body()

    def _not_read(self) -> None:
        self._unread = None
        if self.transport.get_write_buffer_size():
            self.ended["unread"] += 1
            self.transport.abort()

    def _end(self, reason: Reason, status: int, message: str) -> None:
        """Says why where no answer has begun, and hangs up."""
        self._stop_waiting()
        self.ended[reason] += 1
        begun = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not begun and not self.transport.is_closing():
            self.transport.write(_answer(status, message, reason))
        self.transport.close()
        self._await_reader()


def patient(limits: DoorSettings, ended: Counter[Reason]) -> type[PatientProtocol]:
    """The protocol with these limits; what it ends is added to `ended`."""
    return type("Patient", (PatientProtocol,), {"limits": limits, "ended": ended})


def _answer(status: int, message: str, reason: str) -> bytes:
    kind = "service_unavailable_error" if status == 503 else "invalid_request_error"
    said = {"message": message, "type": kind, "param": None, "code": reason}
    body = json.dumps({"error": said}).encode()
    head = f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body
