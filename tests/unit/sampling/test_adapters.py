"""Uploads and their validation, leases by a clock of the test's, and what is left on the disk."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from noria.errors import Conflict, InvalidRequest, NotFound, Superseded
from serve.engine.versions import ServingVersion, VersionGate
from serve.sampling.adapters.shelf import AdapterShelf, own_folder
from serve.sampling.adapters.upload import receive
from serve.sampling.adapters.validate import CONFIG, WEIGHTS, Linears, check_adapter, linears_of
from serve.sampling.ports import LoadedAdapter
from tests.contract.fake_sampling import FakeSamplingEngine
from tests.unit.sampling.adapters import DOWN, SHAPES, Q, config, factors, pieces, upload, write_serving

LINEARS = Linears(SHAPES)
Tensors = dict[str, np.ndarray[Any, Any]]
A, B = f"base_model.model.{Q}.lora_A.weight", f"base_model.model.{Q}.lora_B.weight"


def test_the_linears_of_a_served_checkpoint_by_transformers_names(tmp_path: Path) -> None:
    """Packed by GPTQ or not; the tower's are not among them."""
    linears = linears_of(write_serving(tmp_path))
    assert dict(linears.shapes) == SHAPES
    assert linears.most_bytes(4) >= 4 * 4 * sum(a + b for a, b in SHAPES.values())


@pytest.mark.parametrize("size", [1, 7, 10_000_000])
async def test_an_upload_in_pieces_of_any_size_is_what_was_sent(tmp_path: Path, size: int) -> None:
    data = upload()
    first = await receive(pieces(data, size), tmp_path, 10**6)
    length = int.from_bytes(data[:8], "little")
    assert (tmp_path / CONFIG).read_bytes() == data[8 : 8 + length]
    assert (tmp_path / WEIGHTS).read_bytes() == data[8 + length :]
    assert check_adapter(tmp_path, LINEARS, 8) == 2
    assert await receive(pieces(data, 99), tmp_path, 10**6) == first
    assert await receive(pieces(upload(factors(value=0.25))), tmp_path, 10**6) != first


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "ended after 0 bytes"),
        (b"\x05\0\0\0\0\0\0\0{}", "ended after 10 bytes"),
        (b"\xff" * 20, "announce"),
        (upload() + b"x" * 3000, "longer than the largest adapter"),
    ],
)
async def test_what_is_no_upload_is_refused(tmp_path: Path, data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await receive(pieces(data), tmp_path, 2000 - 2**20)


def changed(change: Callable[[Tensors], object]) -> Tensors:
    """Good factors that `change` has been at."""
    tensors = factors()
    change(tensors)
    return tensors


BAD: dict[str, tuple[bytes, str]] = {
    "configuration": (upload(configuration=b"[]"), "not peft's configuration"),
    "dora": (upload(configuration=config(use_dora=True)), "use_dora"),
    "ranks": (upload(configuration=config(rank_pattern={"q_proj": 4})), "rank_pattern"),
    "alphas": (upload(configuration=config(alpha_pattern={"q_proj": 4})), "alpha_pattern"),
    "whole modules": (upload(configuration=config(modules_to_save=["lm_head"])), "modules_to_save"),
    "biases": (upload(configuration=config(bias="all")), "plain LoRA"),
    "kind": (upload(configuration=config(peft_type="LOHA")), "plain LoRA"),
    "rank": (upload(factors(16), config(r=16)), r"engine\.policy_rank"),
    "no rank": (upload(configuration=config(r=0)), "not a rank"),
    "alpha": (upload(configuration=config(lora_alpha=0)), "lora_alpha"),
    "targets": (upload(configuration=config(target_modules=[])), "target_modules"),
    "names": (upload(changed(lambda t: t.update(bogus=t.pop(A)))), "no factor of a LoRA"),
    "tower": (
        upload({A.replace(Q, "model.vision_tower.encoder.layers.0.mlp.fc1"): np.zeros((2, 8), dtype=np.float32)}),
        "no linear of the served language model",
    ),
    "head": (upload({"base_model.model.lm_head.lora_A.weight": np.zeros((2, 32), np.float32)}), "no linear of the"),
    "shape": (upload(changed(lambda t: t.update({A: t[A].T.copy()}))), r"has shape \[32, 2\]"),
    "other rank": (upload(factors(4)), "has shape"),
    "half": (upload(changed(lambda t: t.pop(B))), "lora_A alone"),
    "dtype": (upload(changed(lambda t: t.update({A: t[A].astype(np.int32)}))), "I32"),
    "bytes": (upload().replace(b'"F32"', b'"F16"'), "too few or too many"),
    "nested": (upload(configuration=b"[" * 100_000), "not peft's configuration"),
    "nan": (upload(changed(lambda t: t[B].fill(np.nan))), "NaN or infinity"),
    "nothing": (upload({}), "no tensor"),
    "header": (upload()[:-5], "truncated"),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_adapter_is_refused_before_the_engine_sees_it(tmp_path: Path, name: str) -> None:
    data, says = BAD[name]
    await receive(pieces(data), tmp_path, 10**6)
    with pytest.raises(InvalidRequest, match=says):
        check_adapter(tmp_path, LINEARS, 8)


def test_some_of_the_linears_in_half_precision_are_enough(tmp_path: Path) -> None:
    tensors = {name: value.astype(np.float16) for name, value in factors().items() if DOWN in name}
    asyncio.run(receive_into(tmp_path, upload(tensors, config(use_rslora=True))))
    assert check_adapter(tmp_path, LINEARS, 8) == 2


async def receive_into(folder: Path, data: bytes) -> None:
    """Puts an upload there."""
    await receive(pieces(data), folder, 10**6)


class Shelf:
    """A shelf with a clock that the test moves."""

    def __init__(self, tmp_path: Path, most: int = 1) -> None:
        self.now = 1000.0
        self.engine = FakeSamplingEngine()
        serving = write_serving(tmp_path / "serving")
        self.v1, self.v2 = ServingVersion("v1", "v1-1", serving), ServingVersion("v2", "v2-2", serving)
        self.gate = VersionGate(self.v1)
        self.folder = tmp_path / "adapters"
        self.shelf = AdapterShelf(self.engine, self.gate, self.folder, most=most, max_rank=8, clock=lambda: self.now)

    def files(self) -> list[str]:
        """What lies on the disk."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


async def test_a_lease_is_renewed_by_use_and_ends_without(tmp_path: Path) -> None:
    one = Shelf(tmp_path)
    adapter, created = await one.shelf.put("a", "v1", pieces(upload()), 10.0)
    assert created and adapter.expires_at == 1010.0
    one.now = 1009.0
    async with one.shelf.use("a", one.v1) as used:
        assert used is adapter and adapter.expires_at == 1019.0
        one.now = 1100.0
        await one.shelf.expire()  # it is in use
        assert one.shelf.held() == [adapter]
    assert adapter.expires_at == 1110.0
    one.now = 1109.9
    await one.shelf.expire()
    assert len(one.engine.loaded) == 1 and len(one.files()) == 2
    one.now = 1110.0
    await one.shelf.expire()
    assert one.engine.loaded == {} and one.files() == [] and one.shelf.held() == []


async def test_a_refused_upload_leaves_nothing(tmp_path: Path) -> None:
    one = Shelf(tmp_path)
    with pytest.raises(InvalidRequest):
        await one.shelf.put("a", "v1", pieces(BAD["nan"][0]), 10.0)
    assert one.files() == [] and one.engine.names == []
    adapter, _ = await one.shelf.put("a", "v1", pieces(upload()), 10.0)  # the name is still free
    assert adapter.name == "a"


async def test_who_leaves_while_it_is_loaded_leaves_nothing(tmp_path: Path) -> None:
    """The engine may have it by then."""
    one = Shelf(tmp_path)
    load, waits = one.engine.load, asyncio.Event()

    async def slow(adapter: LoadedAdapter) -> None:
        await load(adapter)
        waits.set()
        await asyncio.Event().wait()

    one.engine.load = slow  # type: ignore[method-assign]
    putting = asyncio.create_task(one.shelf.put("a", "v1", pieces(upload()), 10.0))
    await waits.wait()
    putting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await putting
    assert (one.engine.loaded, one.files(), one.shelf.held()) == ({}, [], [])


async def test_one_adapter_at_a_time_where_there_is_room_for_one(tmp_path: Path) -> None:
    one = Shelf(tmp_path)
    await one.shelf.put("a", "v1", pieces(upload()), 10.0)
    with pytest.raises(Conflict, match="a is loaded") as full:
        await one.shelf.put("b", "v1", pieces(upload()), 10.0)
    assert full.value.code == "adapters_full"
    await one.shelf.drop("a")
    await one.shelf.put("b", "v1", pieces(upload()), 10.0)
    assert [name.rpartition("/")[2] for name in one.engine.names] == ["a", "b"]


async def test_an_adapter_waits_for_its_groups_before_it_goes(tmp_path: Path) -> None:
    one = Shelf(tmp_path)
    await one.shelf.put("a", "v1", pieces(upload()), 10.0)
    async with one.shelf.use("a", one.v1):
        dropping = asyncio.create_task(one.shelf.drop("a"))
        await asyncio.sleep(0.01)
        assert len(one.engine.loaded) == 1 and len(one.files()) == 2
        with pytest.raises(NotFound):
            async with one.shelf.use("a", one.v1):
                pass
    assert (await dropping)["deleted"] and one.engine.loaded == {}


async def test_who_leaves_while_it_is_unloaded_leaves_it_to_its_end(tmp_path: Path) -> None:
    """A swap waits for that, too: the engine would look for a folder that is going."""
    one = Shelf(tmp_path)
    await one.shelf.put("a", "v1", pieces(upload()), 10.0)
    async with one.shelf.use("a", one.v1):
        dropping = asyncio.create_task(one.shelf.drop("a"))
        await asyncio.sleep(0.01)
        dropping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dropping
        assert len(one.engine.loaded) == 1
    await one.shelf.drop_all()
    assert (one.engine.loaded, one.files()) == ({}, [])


async def test_an_upload_does_not_slip_past_a_swap(tmp_path: Path) -> None:
    """It was sent for v1, and while it was validated v2 came."""
    one = Shelf(tmp_path)
    async with one.gate.exclusive(1):
        putting = asyncio.create_task(one.shelf.put("a", "v1", pieces(upload()), 10.0))
        await asyncio.sleep(0.1)
        await one.shelf.drop_all()
        one.gate.set_current(one.v2)
    with pytest.raises(Superseded):
        await putting
    assert one.engine.names == [] and one.files() == []
    with pytest.raises(Superseded):
        await one.shelf.put("a", "v1", pieces(upload()), 10.0)


async def test_an_engine_that_is_dead_does_not_keep_the_shelf(tmp_path: Path) -> None:
    one = Shelf(tmp_path)
    await one.shelf.put("a", "v1", pieces(upload()), 10.0)
    one.engine.loaded.clear()  # unloading raises now
    await one.shelf.close()
    assert one.shelf.held() == [] and not one.folder.exists()


def test_what_dead_processes_left_is_removed(tmp_path: Path) -> None:
    """Not what others on other machines, or living ones here, have there."""
    host, shelf = os.uname().nodename, tmp_path / "policy-adapters"
    dead = [shelf / f"{host}-{2**22 + 1}", shelf / f"{host}-{os.getpid()}"]
    kept = [shelf / f"{host}-{os.getppid()}", shelf / "elsewhere-17"]
    for folder in (*dead, *kept):
        (folder / "1-a").mkdir(parents=True)
    assert own_folder(tmp_path) == dead[1]
    assert [folder.exists() for folder in (*dead, *kept)] == [False, False, True, True]
