"""The capture queue: sent = stored + dropped, whatever the store does, and nobody waits for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from noria.errors import InvalidRequest, Unavailable
from noria.records import Completion, Image
from noria.settings import CaptureSettings
from noria.store import Store
from serve.capture.metrics import export_capture
from serve.capture.queue import CaptureQueue
from serve.capture.tape import Captured, ChoiceTape
from serve.engine.versions import ServingVersion, Trace

VERSION = ServingVersion("v1", "v1-00000001", Path("v1"))


class NoBlobs:
    """Blobs that nothing is put into."""

    def put(self, data: bytes, media_type: str) -> Image:
        raise AssertionError("no picture was sent")

    def exists(self, sha256: str) -> bool:
        raise AssertionError("no picture was sent")


class Sink:
    """A store in memory that can be slow, away, or refuse one completion."""

    def __init__(self, *, fail: int = 0, refuse: str | None = None) -> None:
        self.batches: list[list[str]] = []
        self.open = threading.Event()
        self.open.set()
        self.fail, self.refuse = fail, refuse

    def add_completions(self, batch: list[Completion], has_picture: Callable[[str], bool]) -> None:
        """Takes the batch when it may."""
        self.open.wait()
        if self.fail:
            self.fail -= 1
            raise Unavailable("the database does not answer")
        if any(one.id == self.refuse for one in batch):
            raise InvalidRequest("refused")
        self.batches.append([one.id for one in batch])

    @property
    def stored(self) -> list[str]:
        return [one for batch in self.batches for one in batch]


class Body:
    """A parsed request."""

    n = 1

    def model_dump(self, **_options: Any) -> dict[str, Any]:
        """What was asked."""
        return {"messages": [{"role": "user", "content": "hi"}]}


def captured(number: int) -> Captured:
    tape = ChoiceTape(0, [1, 2], [], ["yes"], "stop")
    made = Captured(f"chatcmpl-{number}", 1.0 + number, "noria", Body(), Trace("r", VERSION), [5], {0: tape})
    made.finished = True
    return made


def settings(**given: Any) -> CaptureSettings:
    return CaptureSettings(**{"commit_ms": 1, **given})


async def test_a_burst_past_the_queue_is_dropped_and_counted() -> None:
    sink = Sink()
    sink.open.clear()
    queue = CaptureQueue(sink, NoBlobs(), settings(queue_size=8))
    for number in range(50):
        queue.offer(captured(number))
    assert (queue.sent, queue.dropped, queue.counts.waiting) == (50, 42, 8)
    sink.open.set()
    await queue.flush()
    assert (queue.stored, queue.dropped) == (8, 42) and queue.sent == queue.stored + queue.dropped
    assert sink.stored == [f"chatcmpl-{number}" for number in range(8)]  # the newest were dropped
    await queue.close()


async def test_many_completions_share_a_commit() -> None:
    sink = Sink()
    sink.open.clear()
    queue = CaptureQueue(sink, NoBlobs(), settings(batch=16))
    for number in range(33):
        queue.offer(captured(number))
    sink.open.set()
    await queue.close()
    assert len(sink.stored) == 33 and len(sink.batches) <= 4 and max(map(len, sink.batches)) == 16


async def test_an_outage_is_waited_for_and_nothing_is_lost() -> None:
    sink = Sink(fail=3)
    queue = CaptureQueue(sink, NoBlobs(), settings())
    for number in range(5):
        queue.offer(captured(number))
    await queue.flush()
    assert (queue.stored, queue.dropped, queue.counts.retries) == (5, 0, 3)
    await queue.close()


async def test_one_refused_completion_does_not_take_the_others_with_it() -> None:
    sink = Sink(refuse="chatcmpl-2")
    sink.open.clear()
    queue = CaptureQueue(sink, NoBlobs(), settings())
    for number in range(5):
        queue.offer(captured(number))
    sink.open.set()
    await queue.flush()
    assert sorted(sink.stored) == ["chatcmpl-0", "chatcmpl-1", "chatcmpl-3", "chatcmpl-4"]
    assert (queue.stored, queue.dropped, queue.sent) == (4, 1, 5)
    await queue.close()


async def test_flush_waits_for_one_completion() -> None:
    sink = Sink()
    queue = CaptureQueue(sink, NoBlobs(), settings(commit_ms=60_000))  # a flush does not wait for company
    queue.offer(captured(1))
    await queue.flush("chatcmpl-unknown")
    await asyncio.wait_for(queue.flush("chatcmpl-1"), 10)
    assert sink.stored == ["chatcmpl-1"]
    await queue.close()


async def test_closing_writes_what_waits_and_takes_nothing_more() -> None:
    sink = Sink()
    queue = CaptureQueue(sink, NoBlobs(), settings(commit_ms=60_000))
    queue.offer(captured(1))
    await queue.close()
    queue.offer(captured(2))
    assert sink.stored == ["chatcmpl-1"] and (queue.sent, queue.stored, queue.dropped) == (2, 1, 1)


async def test_a_store_that_stays_away_at_closing_costs_counted_drops() -> None:
    queue = CaptureQueue(Sink(fail=1_000_000), NoBlobs(), settings())
    for number in range(3):
        queue.offer(captured(number))
    await queue.close(wait_s=0.2)
    assert (queue.sent, queue.stored, queue.dropped) == (3, 0, 3)


async def test_into_a_real_store(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path}/noria.db") as store:
        queue = CaptureQueue(store, NoBlobs(), settings())
        for number in range(20):
            queue.offer(captured(number))
        await queue.flush("chatcmpl-19")
        assert store.get_completion("chatcmpl-19").choices[0].text == "yes"
        assert store.count_completions() == queue.stored == 20
        await queue.close()


async def test_counters_are_exported() -> None:
    queue = CaptureQueue(Sink(), NoBlobs(), settings())
    registry = CollectorRegistry()
    export_capture(queue, registry)
    queue.offer(captured(1))
    await queue.flush()
    lines = generate_latest(registry).decode().splitlines()
    assert "noria_capture_sent_total 1.0" in lines and "noria_capture_stored_total 1.0" in lines
    assert "noria_capture_dropped_total 0.0" in lines
    await queue.close()
