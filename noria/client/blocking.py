"""The client whose methods wait for their answers.

Comes in: the server's URL. Goes out: `NoriaClient`; its methods are in `noria.client.methods`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from noria.client.errors import json_or_raise, unreachable
from noria.client.events import ENDED, TIMEOUT, Watch
from noria.client.flows import Blocking, Flow, Sleep
from noria.client.methods import Methods
from noria.client.shapes import JobEvent
from noria.errors import Unavailable
from noria.tls import Trust

T = TypeVar("T")


class NoriaClient(Methods, Blocking):
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
        trust: Trust | None = None,
    ) -> None:
        """`trust` is for https: whose certificates are accepted, and what is shown. Raises SettingsError for its
        files."""
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        verify: Any = trust.context() if trust is not None and self.url.startswith("https:") else True
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=timeout_s, transport=transport, verify=verify
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def watch_job(self, job_id: str, *, after: int = 0) -> Iterator[JobEvent]:
        """The job's events from `after` on, until it has ended; a broken connection is taken up where it broke."""
        watch = Watch(job_id, after)
        while True:
            try:
                yield from self._events(watch)
                if self.job(job_id)["state"] in ENDED:
                    return
            except Unavailable as error:
                watch.failed(error)
            time.sleep(watch.pause_s)

    def _events(self, watch: Watch) -> Iterator[JobEvent]:
        try:
            with self._http.stream("GET", watch.path, params=watch.begin(), timeout=TIMEOUT) as response:
                if response.is_error:
                    response.read()
                    json_or_raise(response)
                for line in response.iter_lines():
                    event = watch.feed(line)
                    if event is not None:
                        yield event
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error

    def _run(self, flow: Flow[T]) -> T:
        answer: Any = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, Sleep):
                time.sleep(step.pause_s)
                answer = None
                continue
            try:
                answer = json_or_raise(self._http.request(step.method, step.path, **step.options()))
            except httpx.HTTPError as error:
                raise unreachable(self.url, error) from error
