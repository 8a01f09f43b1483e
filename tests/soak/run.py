"""One soak: a crowd, then a smaller crowd among dawdlers, with somebody who looks on all the time.

Comes in: a running server on the tiny model, a `Plan`. Goes out: what was seen, and which promises were kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import httpx

from noria.records import Json
from tests.servers import Server
from tests.soak.clients import Crowd, Got
from tests.soak.dawdlers import SLOW, Dawdlers
from tests.soak.watch import Sample, Watch, sockets

FAIR = 0.5  # the slowest client's answers, of the median's
MOST_GROWTH_MIB = 128.0
WARM_SHARE = 0.25
SETTLE_S = 60.0
SPARE_SOCKETS = 3  # ours: one that looks, one of the gRPC readers
LOOK_S = 1.5
ENOUGH = 10  # answers a client, below which nothing is said of fairness


@dataclass(frozen=True)
class Plan:
    """How many, how long; `dawdlers` are those of each kind. The limits on connections are shortened to be seen."""

    clients: int = 200
    seconds: float = 180.0
    dawdlers: int = 8
    head_s: float = 5.0
    stalled_s: float = 10.0
    among: int = 8

    @property
    def dawdle_s(self) -> float:
        """How long the second part is: every limit is reached, and more than once where there is time."""
        return max(3 * (self.head_s + self.stalled_s), self.seconds / 6)

    @property
    def environment(self) -> dict[str, str]:
        """The server's."""
        return {
            "NORIA_ENGINE__MAX_MODEL_LEN": "256",
            "NORIA_ENGINE__KV_CACHE_GIB": "0.5",
            "NORIA_DOORS__HEAD_S": str(self.head_s),
            "NORIA_DOORS__BODY_WINDOW_S": str(self.head_s),
            "NORIA_DOORS__STALLED_S": str(self.stalled_s),
            "NORIA_DOORS__KEEP_ALIVE_S": str(2 * self.stalled_s),
        }


def soak(server: Server, plan: Plan) -> Json:
    """Runs both parts."""
    return asyncio.run(_soak(server, plan))


async def _soak(server: Server, plan: Plan) -> Json:
    watch = Watch(server.url, server.process.pid)
    looking = asyncio.create_task(watch.run())
    await asyncio.sleep(LOOK_S)
    before = sockets(server.process.pid)
    crowd = Crowd(server.url, server.grpc, plan.clients, f"soak-{uuid.uuid4().hex[:8]}")
    await crowd.run(plan.seconds)
    status = await _settled(server.url)
    kept = await _stored(server.url, crowd.tag)
    first = list(watch.samples)
    alone = Crowd(server.url, server.grpc, plan.among, f"{crowd.tag}-among")
    dawdlers = Dawdlers(server.url, server.grpc, plan.dawdlers, 2 * plan.stalled_s)
    released = asyncio.Event()
    dawdling = asyncio.create_task(dawdlers.run(released))
    await alone.run(plan.dawdle_s)
    status_after = await _settled(server.url)
    left = await _sockets_left(server.process.pid, before)  # while those who were not hung up on still hold theirs
    await dawdlers.told(SETTLE_S)
    released.set()
    await dawdling
    second = watch.samples[len(first) :]
    await _stopped(looking)
    lost = {id_ for got in crowd.got for id_ in got.ids} - kept
    growth = _growth([*first, *second])
    per_client = [len(got.ids) for got in crowd.got]
    fair = min(per_client) / statistics.median(per_client) if statistics.median(per_client) else 0.0
    capture = status_after["capture"]
    return {
        "crowd": {
            "title": f"{plan.clients} streaming clients, {plan.seconds:g} s",
            **_told(crowd.got, plan.seconds),
            "answers_a_client": _spread(per_client),
            "slowest_client_to_median": round(fair, 2),
            "stored_with_its_tag": len(kept),
            "finished_but_not_stored": len(lost),
            "capture": status["capture"],
            **_looks(first),
        },
        "dawdlers": {
            "title": f"{plan.among} streaming clients among {sum(dawdlers.opened.values())} dawdlers, "
            f"{plan.dawdle_s:g} s",
            **_told(alone.got, plan.dawdle_s),
            "ended_by_the_server": {kind: f"{dawdlers.ended[kind]}/{n}" for kind, n in dawdlers.opened.items()},
            "sockets_before_and_left": [before, left],
            "capture": capture,
            **_looks(second),
        },
        "promises": {
            "no error": not _errors(crowd.got) and not _errors(alone.got),
            "every finished answer is in the store": not lost and bool(kept),
            "sent = stored, dropped 0": capture["sent"] == capture["stored"] and not capture["dropped"],
            "no more inside than clients": max((one.in_flight for one in first), default=0) <= plan.clients,
            f"server's memory grows by at most {MOST_GROWTH_MIB:g} MiB": growth <= MOST_GROWTH_MIB,
            f"the slowest client gets {FAIR:g} of the median": fair >= FAIR or statistics.median(per_client) < ENOUGH,
            "dawdlers stop nobody": all(got.ids for got in alone.got),
            "dawdlers learn of their end": not {**dawdlers.opened - dawdlers.ended, SLOW: 0}.keys() - {SLOW},
            "the status answers all the time": not watch.missed and bool(first) and bool(second),
            "no connection is left to them": left <= before + SPARE_SOCKETS,
        },
    }


async def _stopped(looking: asyncio.Task[None]) -> None:
    """Ends it; raises what ended it before."""
    looking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await looking


async def _settled(url: str) -> Json:
    """The status once nothing is inside and nothing waits for its commit, or after a while whatever it is."""
    until = time.monotonic() + SETTLE_S
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while True:
            status: Json = (await http.get("/noria/v1/status")).json()
            capture = status["capture"]
            done = not status["in_flight"] and capture["sent"] == capture["stored"] + capture["dropped"]
            if done or time.monotonic() > until:
                return status
            await asyncio.sleep(0.2)


async def _stored(url: str, tag: str) -> set[str]:
    """The ids of all stored completions with the tag, page by page."""
    found: set[str] = set()
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        query = {"limit": "100", "metadata[soak]": tag}
        while True:
            page = (await http.get("/v1/chat/completions", params=query)).json()
            found |= {one["id"] for one in page["data"] if one["finished"]}
            if not page["has_more"]:
                return found
            query["after"] = page["last_id"]


async def _sockets_left(pid: int, before: int) -> int:
    """Open sockets once the crowd's have gone: those of our own looks, and of whoever still holds one."""
    for _ in range(100):
        if sockets(pid) <= before + SPARE_SOCKETS:
            break
        await asyncio.sleep(0.2)
    return sockets(pid)


def _told(crowd: Sequence[Got], seconds: float) -> Json:
    latencies = sorted(one for got in crowd for one in got.latencies_s)
    answers, tokens = sum(len(got.ids) for got in crowd), sum(got.tokens for got in crowd)
    wires = Counter(got.wire for got in crowd for _ in got.ids)
    p50, p99 = (_quantile(latencies, share) for share in (0.5, 0.99))
    return {
        "answers": answers,
        "answers_by_wire": dict(wires),
        "answers_a_second": round(answers / seconds, 1),
        "tokens": tokens,
        "refused_for_overload": sum(got.refused for got in crowd),
        "errors": dict(_errors(crowd)),
        "latency_p50_p99_s": [round(p50, 2), round(p99, 2)],
        "p99_to_p50": round(p99 / p50, 2) if p50 else 0.0,
    }


def _looks(samples: Sequence[Sample]) -> Json:
    if not samples:
        return {}
    return {
        "looks": len(samples),
        "most_inside": max(one.in_flight for one in samples),
        "most_waiting_for_the_engine": max(one.waiting for one in samples),
        "most_uncommitted": max(one.uncommitted for one in samples),
        "most_sockets": max(one.sockets for one in samples),
        "slowest_status_call_s": round(max(one.took_s for one in samples), 2),
        "server_mib_first_most_last": [
            round(one) for one in (samples[0].server_mib, max(s.server_mib for s in samples), samples[-1].server_mib)
        ],
        "with_engine_mib_first_most": [round(samples[0].family_mib), round(max(s.family_mib for s in samples))],
    }


def _growth(samples: Sequence[Sample]) -> float:
    """MiB between the end of the warm-up and the largest look after it."""
    if not samples:
        return 0.0
    warm = int(len(samples) * WARM_SHARE)
    return max(one.server_mib for one in samples[warm:]) - max(one.server_mib for one in samples[: warm + 1])


def _errors(crowd: Sequence[Got]) -> Counter[str]:
    return sum((got.errors for got in crowd), Counter())


def _spread(counts: Sequence[int]) -> Json:
    return {"least": min(counts), "median": statistics.median(counts), "most": max(counts)}


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
