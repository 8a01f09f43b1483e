"""A stage's precision: what it computes in, that it stays near float32, and where it is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import TrainingError
from noria.records import Json
from tests.unit.stages.material import stage, write_data
from train.stages.run import Listener, precision, train_supervised
from train.stages.spec import StageRun, Step

LOSS_TOLERANCE = 0.02  # of the loss; bfloat16 keeps 8 bits, so that one rounding is 0.4 %


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def run(
    master: Path, data: Path, out: Path, kind: str, wanted: str, **more: Any
) -> tuple[Json, list[Step], dict[str, torch.Tensor]]:
    """Trains four steps; also what was trained."""
    steps: list[Step] = []
    out.mkdir()
    one = stage(data, kind, precision=wanted, **more)
    told = train_supervised(StageRun(master, (), one, out), Listener(on_step=steps.append))
    trained: dict[str, torch.Tensor] = {}
    for path in (out / "delta").glob("*.safetensors"):
        trained |= load_file(path)
    return told, steps, trained


@pytest.mark.parametrize(("kind", "packed"), [("vision", False), ("align", False), ("sft", False), ("sft", True)])
def test_bfloat16_learns_as_float32_does(tiny_vlm: Path, data: Path, tmp_path: Path, kind: str, packed: bool) -> None:
    """Losses within 2 % at every step, and other numbers: it was no float32. What trains is float32 all the same."""
    more = {"packing": True, "micro_batch_size": 1} if packed else {}
    _, exact, full = run(tiny_vlm, data, tmp_path / "f", kind, "float32", **more)
    told, near, trained = run(tiny_vlm, data, tmp_path / "b", kind, "bfloat16", **more)
    assert [one.loss for one in near] == pytest.approx([one.loss for one in exact], rel=LOSS_TOLERANCE)
    assert [one.loss for one in near] != [one.loss for one in exact]
    assert trained.keys() == full.keys()
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert told["settings"]["precision"] == "bfloat16"


def test_nothing_said_is_float32_on_a_cpu(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    found = precision(StageRun(tiny_vlm, (), stage(data, "sft"), tmp_path))
    if torch.cuda.is_available():
        assert (found.dtype, found.autocast) == (torch.bfloat16, False)
    else:
        assert (found.dtype, found.attention, found.autocast) == (torch.float32, None, False)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"dtype": "float32"}, r"stages\.one\.precision='bfloat16' would be ignored: dtype='float32' decides"),
        ({"base": "gptq"}, r"precision='bfloat16' would be ignored: train\.base='gptq' decides"),
        ({"accelerate_config": Path("fsdp.yaml")}, r"would be ignored: train\.accelerate_config='fsdp\.yaml' decides"),
    ],
)
def test_a_precision_that_would_be_ignored_is_refused(
    tiny_vlm: Path, data: Path, tmp_path: Path, more: dict[str, Any], told: str
) -> None:
    one = StageRun(tiny_vlm, (), stage(data, "sft", precision="bfloat16"), tmp_path)
    with pytest.raises(TrainingError, match=told):
        precision(replace(one, **more))
    precision(replace(one, stage=stage(data, "sft"), **more))


def test_a_vision_stage_trains_on_the_master_whatever_the_base(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    one = StageRun(tiny_vlm, (), stage(data, "vision", precision="bfloat16"), tmp_path, base="gptq")
    assert precision(one) == precision(replace(one, base="master"))
