"""A group on a small engine: faults, ends, limits; and what the service counts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from noria.errors import InvalidRequest, NoriaError, Superseded, Unavailable
from noria.records import Json
from noria.store import Store
from serve.access.audit import Audit
from serve.engine.versions import ServingVersion, Trace, VersionGate
from serve.sampling.adapters.shelf import AdapterShelf
from serve.sampling.group import Group
from serve.sampling.metrics import export_sampling
from serve.sampling.ports import Draw
from serve.sampling.service import Sampling
from serve.sampling.turns import Turns
from tests.contract.fake_sampling import FakeSamplingEngine
from tests.unit.sampling.adapters import write_serving

ASK: list[Json] = [{"role": "user", "content": "which colour?"}]
PLAIN = Draw(1.0, 1.0, 0, 256, None)


def group(engine: FakeSamplingEngine, n: int = 3, draw: Draw = PLAIN, turns: Turns | None = None) -> Group:
    """A group of the live version's."""
    return Group("sample-1", engine, turns or Turns(2, 1), None, draw, n)


async def test_a_failing_sample_is_begun_again_once_with_the_prompt_prepared_anew() -> None:
    engine = FakeSamplingEngine(faults=[Unavailable("Expected a cached item")])
    one = group(engine)
    await one.run(ASK)
    assert [sample.finish_reason for sample in one.samples] == ["stop"] * 3
    assert engine.prepared == 2
    engine.faults = [Unavailable("again"), Unavailable("and again"), Unavailable("and again")]
    one = group(engine, n=1)
    with pytest.raises(Unavailable, match="and again"):
        await one.run(ASK)


@pytest.mark.parametrize("error", [InvalidRequest("no"), RuntimeError("a bug")])
async def test_the_first_failure_ends_the_group(error: Exception) -> None:
    engine, turns = FakeSamplingEngine(faults=[error], beat_s=0.005), Turns(2, 1)
    with pytest.raises(type(error)):
        await group(engine, n=6, turns=turns).run(ASK)
    assert engine.running == {} and (turns.running, turns.waiting) == (0, 0)


async def test_an_end_reaches_those_that_run_and_those_that_wait() -> None:
    engine, turns = FakeSamplingEngine(beat_s=0.01), Turns(2, 1)
    one = group(engine, n=5, turns=turns)
    running = asyncio.create_task(one.run(ASK))
    await asyncio.sleep(0.03)
    assert len(engine.running) == 2 and turns.waiting == 3
    one.end(Superseded("first"))
    one.end(Unavailable("second"))
    with pytest.raises(Superseded, match="first"):
        await running
    assert engine.running == {} and (turns.running, turns.waiting) == (0, 0)
    with pytest.raises(Superseded):
        await one.run(ASK)  # it stays ended


async def test_an_engine_that_lets_a_sample_go_unasked_is_no_answer() -> None:
    engine = FakeSamplingEngine(beat_s=0.01)
    one = group(engine, n=1)
    running = asyncio.create_task(one.run(ASK))
    await asyncio.sleep(0.03)
    await engine.abort("sample-1-0-0")
    await running  # begun again, once
    assert one.samples[0].finish_reason == "stop" and len(one.samples[0].token_ids) == 25
    running = asyncio.create_task(group(engine, n=1).run(ASK))
    for turn in range(2):
        await asyncio.sleep(0.03)
        await engine.abort(f"sample-1-0-{turn}")
    with pytest.raises(Unavailable, match="let the sample go"):
        await running


async def test_the_context_bounds_the_answer() -> None:
    engine = FakeSamplingEngine(context_tokens=20)
    one = group(engine, n=1)
    await one.run(ASK)
    assert one.samples[0].finish_reason == "length"
    assert len(one.samples[0].token_ids) == 20 - 1 - len("which colour?")
    with pytest.raises(InvalidRequest, match="no token of an answer fits"):
        await group(FakeSamplingEngine(context_tokens=14), n=1).run(ASK)


async def test_a_seeded_sample_that_was_set_back_goes_on_with_another_seed() -> None:
    """The same seed again would repeat the noise that drew its first tokens."""
    seeds: list[int | None] = []

    class Noting(FakeSamplingEngine):
        def sample(self, prepared, said, draw, request_id, adapter):  # type: ignore[no-untyped-def]
            seeds.append(draw.seed)
            return super().sample(prepared, said, draw, request_id, adapter)

    engine, turns = Noting(beat_s=0.01), Turns(2, 0, quiet_s=0.0)
    one = group(engine, n=2, draw=Draw(1.0, 1.0, 0, 256, 5), turns=turns)
    running = asyncio.create_task(one.run(ASK))
    await asyncio.sleep(0.05)
    turns.users(1)
    await asyncio.sleep(0.05)
    assert engine.running == {} and 0 < len(one.samples[0].token_ids) < 25
    turns.users(0)
    await running
    assert seeds[:2] == [5, 6] and len(set(seeds)) == 4
    assert [len(sample.token_ids) for sample in one.samples] == [25, 25]


class Server:
    """A service over the small engine."""

    def __init__(self, tmp_path: Path) -> None:
        self.engine = FakeSamplingEngine()
        self.gate = VersionGate(ServingVersion("v1", "v1-00000001", write_serving(tmp_path / "serving")))
        store = Store.open(f"sqlite:///{tmp_path / 'noria.db'}")
        shelf = AdapterShelf(self.engine, self.gate, tmp_path / "adapters", most=1, max_rank=8)
        self.sampling = Sampling(self.engine, self.gate, shelf, Turns(4, 1), Audit(store))


async def test_groups_hold_a_swap_up_only_until_they_are_let_go(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.engine.beat_s = 0.02
    running = asyncio.create_task(server.sampling.sample({"messages": ASK, "n": 4}))
    await asyncio.sleep(0.05)
    assert server.gate.in_flight == 0 and len(server.engine.running) == 4
    async with server.gate.exclusive(5):
        assert server.engine.running == {}
        with pytest.raises(Superseded):
            await running
        waiting = asyncio.create_task(server.sampling.sample({"messages": ASK}))
        await asyncio.sleep(0.02)
        assert not waiting.done()  # like a user's request, it waits for the version that comes
        server.gate.set_current(ServingVersion("v2", "v2-00000002", server.gate.current.path))
    assert (await waiting)["fingerprint"] == "v2-00000002"


async def test_the_counts_are_what_happened(tmp_path: Path) -> None:
    server = Server(tmp_path)
    registry = CollectorRegistry()
    export_sampling(server.sampling, registry)
    await server.sampling.sample({"messages": ASK, "n": 2, "max_tokens": 3})
    for wrong in ({"messages": ASK, "adapter": "none"}, {"messages": [{"role": "user", "content": "x" * 300}]}):
        with pytest.raises(NoriaError):
            await server.sampling.sample(wrong)
    server.engine.beat_s = 0.02
    running = asyncio.create_task(server.sampling.sample({"messages": ASK}))
    await asyncio.sleep(0.03)
    await server.sampling.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await running
    with pytest.raises(Unavailable, match="shutting down"):
        await server.sampling.sample({"messages": ASK})
    lines = dict(line.rsplit(" ", 1) for line in generate_latest(registry).decode().splitlines() if line[0] != "#")
    assert lines['noria_sampling_groups_total{outcome="done"}'] == "1.0"
    assert lines['noria_sampling_groups_total{outcome="refused"}'] == "2.0"
    assert lines['noria_sampling_groups_total{outcome="ended"}'] == "2.0"
    assert lines["noria_sampling_samples_total"] == "2.0" and float(lines["noria_sampling_tokens_total"]) > 6
    assert lines["noria_sampling_running"] == lines["noria_sampling_adapters"] == "0.0"


async def test_the_gate_tells_of_users_alone() -> None:
    gate = VersionGate(ServingVersion("v1", "v1-1", Path("v1")))
    seen: list[int] = []
    gate.on_users(seen.append)
    user, whole, background = Trace("a", streaming=True), Trace("b"), Trace("c", streaming=True, background=True)
    for trace in (background, user, whole):
        await gate.admit(trace)
    assert gate.in_flight == 2 and seen == [1, 2]
    gate.release(user)
    gate.release(whole)
    assert seen == [1, 2, 1]  # a whole answer keeps its place until it is over
    gate.finish(whole)
    gate.release(background)
    assert seen == [1, 2, 1, 0] and gate.in_flight == 0
