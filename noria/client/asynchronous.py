"""The client whose methods are awaited.

Comes in: the server's URL. Goes out: `AsyncNoriaClient`; its methods are in `noria.client.methods`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx

from noria.client.errors import json_or_raise, unreachable
from noria.client.events import ENDED, TIMEOUT, Watch
from noria.client.flows import Awaited, Flow, Sleep
from noria.client.methods import Methods
from noria.client.shapes import JobEvent
from noria.errors import Unavailable
from noria.tls import Trust

T = TypeVar("T")


class AsyncNoriaClient(Methods, Awaited):
    """Speaks to one server; use it with `async with`, or `await close()`.

    The methods are those of `NoriaClient`, to be awaited; `watch_job` is an asynchronous iterator.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
        trust: Trust | None = None,
    ) -> None:
        """As `NoriaClient`."""
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        verify: Any = trust.context() if trust is not None and self.url.startswith("https:") else True
        self._http = httpx.AsyncClient(
            base_url=self.url, headers=headers, timeout=timeout_s, transport=transport, verify=verify
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def watch_job(self, job_id: str, *, after: int = 0) -> AsyncIterator[JobEvent]:
        """The job's events from `after` on, until it has ended; a broken connection is taken up where it broke."""
        watch = Watch(job_id, after)
        while True:
            try:
                async with aclosing(self._events(watch)) as events:
                    async for event in events:
                        yield event
                if (await self.job(job_id))["state"] in ENDED:
                    return
            except Unavailable as error:
                watch.failed(error)
            await asyncio.sleep(watch.pause_s)

    async def _events(self, watch: Watch) -> Any:
        try:
            async with self._http.stream("GET", watch.path, params=watch.begin(), timeout=TIMEOUT) as response:
                if response.is_error:
                    await response.aread()
                    json_or_raise(response)
                async for line in response.aiter_lines():
                    event = watch.feed(line)
                    if event is not None:
                        yield event
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error

    async def _run(self, flow: Flow[T]) -> T:
        answer: Any = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(step, Sleep):
                await asyncio.sleep(step.pause_s)
                answer = None
                continue
            try:
                answer = json_or_raise(await self._http.request(step.method, step.path, **step.options()))
            except httpx.HTTPError as error:
                raise unreachable(self.url, error) from error
