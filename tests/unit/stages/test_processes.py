"""Two processes with gloo give what one gives: the losses step by step, and the weights; and one that dies ends all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from noria.errors import LeaseLost, TrainingError
from noria.records import Json
from tests.unit.stages.material import stage, write_data
from train.stages.job import run_stage
from train.stages.processes import command
from train.stages.run import Listener, train_supervised
from train.stages.spec import StageRun, Step

ACCELERATE = sorted((Path(__file__).parents[3] / "deploy/settings/accelerate").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def made(master: Path, data: Path, out: Path, kind: str, processes: int) -> StageRun:
    """`align` reads row by row: then some micro-batches show no picture, and give no gradient."""
    out.mkdir(parents=True)
    more = {"micro_batch_size": 1} if kind == "align" else {}
    return StageRun(master, (), stage(data, kind, **more), out, dtype="float32", processes=processes)


@pytest.mark.parametrize("kind", ["vision", "align", "sft"])
def test_two_processes_give_the_single_process_loss(tiny_vlm: Path, data: Path, tmp_path: Path, kind: str) -> None:
    one: list[Step] = []
    two: list[Step] = []
    tables: list[str] = []
    train_supervised(made(tiny_vlm, data, tmp_path / "one", kind, 1), Listener(on_step=one.append))
    told: Json = run_stage(made(tiny_vlm, data, tmp_path / "two", kind, 2), Listener(two.append, tables.append))
    assert [step.loss for step in two] == pytest.approx([step.loss for step in one], abs=1e-5)
    assert [step.grad_norm for step in two] == pytest.approx([step.grad_norm for step in one], abs=1e-4)
    assert [step.step for step in two] == [1, 2, 3, 4]
    assert told["steps"] == 4
    assert "vision_tower" in tables[0]
    for path in (tmp_path / "one" / "delta").glob("*.safetensors"):
        mine, theirs = load_file(path), load_file(tmp_path / "two" / "delta" / path.name)
        assert mine.keys() == theirs.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], atol=1e-5, rtol=0, msg=name)


def test_what_fails_in_a_process_is_told_here(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    run = made(tiny_vlm, data, tmp_path / "out", "vision", 2)
    run = replace(run, stage=run.stage.model_copy(update={"micro_batch_size": 4}))
    with pytest.raises(TrainingError, match="1 micro-batches a step cannot be shared by 2 processes") as error:
        run_stage(run, Listener())
    assert error.value.code == "processes"


def test_stopping_ends_the_processes(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    asked = iter(range(100))

    def check() -> None:
        if next(asked) == 3:
            raise LeaseLost("stop", code="cancelled")

    with pytest.raises(LeaseLost):
        run_stage(made(tiny_vlm, data, tmp_path / "out", "vision", 2), Listener(check=check))
    assert not (tmp_path / "out" / "delta").exists()


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_shipped_configurations_are_accelerates(tiny_vlm: Path, data: Path, tmp_path: Path, path: Path) -> None:
    """accelerate reads each of them, knows every key, and would start as many processes as the settings ask for."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.compute_environment.value == "LOCAL_MACHINE"
    run = replace(made(tiny_vlm, data, tmp_path / "out", "sft", 4), accelerate_config=path)
    words = command(run)
    asked = launch_command_parser().parse_args(words[3:])
    assert (asked.config_file, asked.num_processes, asked.module) == (str(path), 4, True)
    assert asked.training_script == "train.stages.processes"
    assert asked.training_script_args == [str(tmp_path / "out" / "run.json")]


def test_a_run_crosses_to_another_process_whole(tiny_vlm: Path, data: Path, tmp_path: Path) -> None:
    run = replace(
        made(tiny_vlm, data, tmp_path / "out", "sft", 2), deltas=(tmp_path,), serving=tmp_path, blobs="file:///b"
    )
    assert StageRun.from_json(run.to_json()) == run
