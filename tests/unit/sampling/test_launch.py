"""How the engine is started for sampling, and what users' requests may not do about it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from noria.settings import Settings, load_settings
from serve.engine import environment, launch
from serve.engine.proxy import EngineProxy
from serve.engine.versions import ServingVersion, VersionGate
from serve.sampling import start
from serve.sampling.start import turns_for


@pytest.fixture(params=[True, False])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With a GPU and without."""
    for module in (environment, launch, start):
        monkeypatch.setattr(module, "has_gpu", lambda: bool(request.param))
    return bool(request.param)


def settings(tmp_path: Path, **sections: Any) -> Settings:
    """Settings of a home of the test's."""
    return load_settings(home=tmp_path, **sections)


def flags(tmp_path: Path, **engine: Any) -> list[str]:
    """vLLM's arguments for them."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return launch.engine_flags(settings(tmp_path, engine=engine), tmp_path, "v1")


def test_users_come_first_and_adapters_cost_nothing_where_there_are_none(tmp_path: Path, gpu: bool) -> None:
    plain = flags(tmp_path)
    assert "--scheduling-policy=priority" in plain
    assert not [flag for flag in plain if "lora" in flag]
    some = flags(tmp_path, policy_adapters=2, policy_rank=32)
    assert {"--enable-lora", "--max-loras=2", "--max-cpu-loras=2", "--max-lora-rank=32"} <= set(some)


def test_the_operator_s_own_arguments_come_last(tmp_path: Path) -> None:
    own = flags(tmp_path, policy_adapters=1, args=["--scheduling-policy=fcfs", "--max-loras=4"])
    assert own[-2:] == ["--scheduling-policy=fcfs", "--max-loras=4"]


def test_how_many_samples_run(tmp_path: Path, gpu: bool) -> None:
    open_ = turns_for(settings(tmp_path), 16)
    assert (open_.alone, open_.beside_users) == (16, 4 if gpu else 1)
    stated = turns_for(settings(tmp_path, sampling={"sequences": 8, "beside_users": 0}), 16)
    assert (stated.alone, stated.beside_users) == (8, 0)
    more = turns_for(settings(tmp_path, sampling={"sequences": 99, "beside_users": 50}), 16)
    assert (more.alone, more.beside_users) == (16, 16)


class Noting:
    """An engine that notes the priority it was given."""

    def __init__(self) -> None:
        self.priorities: list[int | None] = []

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        self.priorities.append(options.get("priority"))
        yield SimpleNamespace(finished=True)


@pytest.mark.parametrize(("keep", "priority"), [(False, None), (True, -5)])
async def test_a_user_s_priority_counts_only_where_the_operator_schedules_by_it(
    keep: bool, priority: int | None
) -> None:
    engine, gate = Noting(), VersionGate(ServingVersion("v1", "v1-1", Path("v1")))
    proxy = EngineProxy(engine, gate, keep_priority=keep)
    async for _ in proxy.generate("a", SimpleNamespace(logprobs=None), "r", priority=-5):
        pass
    assert engine.priorities == [priority]
