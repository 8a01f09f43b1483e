"""What measurements of training stand on: a control whose rewards are the same ones in other hands, and pictures."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from benchmarks.shared.arms import draw_curves
from benchmarks.shared.shuffled import Shuffled
from train.rewards import Sample


def group(number: int, *texts: str) -> list[Sample]:
    """Answers to one question, whose right answer is its number."""
    return [Sample([{"role": "user", "content": str(number)}], text, answers=(str(number),)) for text in texts]


def test_the_control_pays_what_the_group_before_has_earned() -> None:
    reward = Shuffled()
    groups = [group(1, "1", "2", "1"), group(2, "1", "1", "2"), group(3, "3", "3", "3", "3")]
    assert [[reward(sample) for sample in one] for one in groups] == [[0, 0, 0], [1, 0, 1], [0, 0, 1, 0]]
    assert reward(Sample([{"role": "user", "content": "4"}], "4")) is None  # no right answer is known


def test_curves_are_drawn_where_an_update_lacks_a_figure(tmp_path: Path) -> None:
    arms: dict[str, list[dict[str, float]]] = {
        "exact": [{"step": 1, "reward": 0.1, "kl": 0.0}, {"step": 2}],
        "shuffled": [{"step": 1, "reward": 0.2}],
    }
    draw_curves(tmp_path / "curves.png", arms)
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (1210, 770)
