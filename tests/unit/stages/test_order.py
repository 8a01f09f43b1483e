"""The order of samples: drawn from the seed, the same for any number of processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from noria.errors import TrainingError
from noria.recipes import RecipeStage
from tests.unit.stages.material import stage
from train.stages.order import plan
from train.stages.spec import Step, curve, read_steps, write_steps


@pytest.fixture
def four(tmp_path: Path) -> RecipeStage:
    return stage(tmp_path, "sft", steps=3)


def seen(found: tuple[tuple[tuple[int, ...], ...], ...]) -> list[int]:
    return [number for micro in found for unit in micro for number in unit]


def test_every_sample_comes_once_a_pass_and_passes_differ(four: RecipeStage) -> None:
    made = plan(four, range(6))
    assert (made.steps, made.per_step, len(made.micro_batches)) == (3, 2, 6)
    order = seen(made.micro_batches)
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    assert made == plan(four, range(6))
    assert made != plan(four.model_copy(update={"seed": 1}), range(6))


def test_epochs_count_passes(tmp_path: Path) -> None:
    made = plan(stage(tmp_path, "sft", epochs=1.5), range(8))
    assert made.steps == 3  # 12 samples in batches of 4
    assert sorted(seen(made.micro_batches)[:8]) == list(range(8))
    assert plan(stage(tmp_path, "sft", epochs=1), range(7)).steps == 2  # the last batch is filled from the next pass


def test_processes_share_a_steps_samples(four: RecipeStage) -> None:
    made = plan(four, range(6))
    mine, yours = made.share(0, 2), made.share(1, 2)
    for step in range(made.steps):
        together = sorted([mine[step], yours[step]])
        assert together == sorted(made.micro_batches[2 * step : 2 * step + 2])
    with pytest.raises(TrainingError, match="2 micro-batches a step cannot be shared by 3 processes"):
        made.share(0, 3)


def test_samples_of_like_length_meet(tmp_path: Path) -> None:
    lengths = {number: 1 + number % 10 for number in range(64)}
    made = plan(stage(tmp_path, "sft", epochs=1, group_by_length=True), range(64), lengths=lengths)
    apart = [abs(lengths[micro[0][0]] - lengths[micro[1][0]]) for micro in made.micro_batches]
    assert sum(apart) < 10  # 32 pairs; without grouping some three tokens a pair
    assert sorted(seen(made.micro_batches)) == list(range(64))
    firsts = [lengths[micro[0][0]] for micro in made.micro_batches]
    assert firsts != sorted(firsts)


def test_packs_are_taken_as_they_are(tmp_path: Path) -> None:
    asked: list[int] = []

    def pack(number: int) -> list[tuple[int, ...]]:
        asked.append(number)
        return [(0, 1), (2,), (3, 4, 5)]

    made = plan(stage(tmp_path, "sft", steps=3, batch_size=2, packing=True, micro_batch_size=None), range(6), pack=pack)
    assert asked == [0, 1]
    assert made.micro_batches == (((0, 1),), ((2,),), ((3, 4, 5),)) * 2


def test_nothing_to_train_on_is_said(four: RecipeStage) -> None:
    with pytest.raises(TrainingError, match="stage 'one' has no sample"):
        plan(four, [])


def test_a_curve_has_at_most_200_points_and_keeps_the_means(tmp_path: Path) -> None:
    steps = [Step(n, 1000, float(n), 1.0, 1e-4, 10, 0.1, {"accuracy": n / 1000}) for n in range(1, 1001)]
    points = curve(steps)
    assert len(points) == 200
    assert points[0] == {
        "step": 5,
        "loss": 3.0,
        "grad_norm": 1.0,
        "learning_rate": pytest.approx(1e-4),
        "accuracy": 0.003,
    }
    assert points[-1]["step"] == 1000
    assert sum(point["loss"] for point in points) / 200 == pytest.approx(500.5)
    log = tmp_path / "log.jsonl"
    write_steps(log, steps[:3])
    with log.open("a") as file:
        file.write('{"step": 4, "st')
    assert read_steps(log) == steps[:3]
