"""A user's function in a process of its own: what it says, and every way in which it costs its sample and no more."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from noria.errors import SettingsError, TrainingError
from noria.rewards import PythonOptions
from train.rewards import Failure, Sample, combine
from train.rewards.outside.python import PythonReward

GIVEN = "tests.unit.rewards.given"
Make = Callable[..., PythonReward]


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds rewards and ends them."""
    made: list[PythonReward] = []

    def one(function: str, **options: Any) -> PythonReward:
        options = {"timeout_s": 10.0, **options}
        made.append(
            PythonReward(PythonOptions(function=function if ":" in function else f"{GIVEN}:{function}", **options))
        )
        return made[-1]

    yield one
    for reward in made:
        reward.close()


def texts(*said: str) -> list[Sample]:
    return [Sample([], one) for one in said]


def alive(number: int) -> bool:
    """Whether a process runs; one that ended and waits to be collected does not."""
    try:
        state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_it_says_what_the_function_says(make: Make) -> None:
    assert make("length")(texts("abc", "", "ä")) == [3.0, 0.0, 1.0]
    prompt = [{"role": "user", "content": [{"type": "text", "text": "hé"}]}]
    assert make("told")([Sample(prompt, "x", "length", ("a", "b"), {"options": ["c"]}, 7)]) == [1.0]


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("raise", Failure("raised ValueError")),
        ("exit", Failure("raised SystemExit")),
        ("die", Failure("died")),
        ("hang", Failure("timeout")),
        ("hang in C", Failure("timeout")),
        ("hang for good", Failure("timeout")),
        ("close", Failure("timeout")),
        ("none", Failure("unjudged")),
        ("text", Failure("returned str")),
        ("list", Failure("returned list")),
        ("nan", Failure("not finite")),
        ("huge", Failure("not finite")),
        ("true", 1.0),
        ("print", 1.0),
        ("read", 0.0),
    ],
)
def test_what_goes_wrong_costs_that_sample(make: Make, said: str, wanted: Any) -> None:
    found = make("by_text", timeout_s=2.0)(texts("fine", said, "fine"))
    assert found == [1.0, wanted, 1.0]


def test_failures_are_counted_and_stop_the_job(make: Make) -> None:
    with combine([make("by_text", timeout_s=2.0)], max_failure_rate=0.5, window=4) as scorer:
        scores = scorer(texts("fine", "raise", "hang"))
        assert scores.totals == [1.0, None, None]
        assert scorer.counts["python"]["reasons"] == {"raised ValueError": 1, "timeout": 1}
        with pytest.raises(TrainingError) as stopped:
            scorer(texts("die"))
    assert stopped.value.code == "reward_failed"
    assert "with the text in it" not in stopped.value.message


def test_a_process_that_hangs_is_killed_with_what_it_started(make: Make, tmp_path: Path) -> None:
    note = tmp_path / "child"
    assert make("leaves", timeout_s=2.0)(texts(str(note))) == [Failure("timeout")]
    child = int(note.read_text())
    for _ in range(200):
        if not alive(child):
            return
        time.sleep(0.05)
    raise AssertionError(f"{child} still runs")


def test_several_processes_share_the_samples(make: Make) -> None:
    seen = make("process", processes=3)(texts(*"abcdefghi"))
    assert len(set(seen)) == 3
    assert os.getpid() not in seen


def test_closing_ends_the_process_and_another_call_starts_it_again(make: Make) -> None:
    reward = make("process")
    (first,) = reward(texts("a"))
    assert isinstance(first, float)
    reward.close()
    assert not alive(int(first))
    (second,) = reward(texts("a"))
    assert second != first


def test_it_dies_with_whoever_started_it() -> None:
    told = (
        "import os; from noria.rewards import PythonOptions; from train.rewards import Sample; "
        "from train.rewards.outside.python import PythonReward; "
        f"reward = PythonReward(PythonOptions(function='{GIVEN}:process')); "
        "print(int(reward([Sample([], 'a')])[0]), flush=True); os._exit(0)"
    )
    ended = subprocess.run([sys.executable, "-c", told], check=True, capture_output=True, text=True)
    child = int(ended.stdout)
    for _ in range(200):
        if not alive(child):
            return
        time.sleep(0.05)
    raise AssertionError(f"{child} still runs")


def test_a_module_is_found_in_the_folder_that_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "mine_alone.py").write_text(
        "class Marks:\n    @staticmethod\n    def half(sample):\n        return 0.5\n"
    )
    assert make("mine_alone:Marks.half", path=tmp_path)(texts("a")) == [0.5]


@pytest.mark.parametrize(
    ("function", "source", "told"),
    [
        ("nowhere_at_all:f", "", "ModuleNotFoundError"),
        (f"{GIVEN}:nothing", "", "has no attribute 'nothing'"),
        (f"{GIVEN}:THING", "", "is a int, not a function"),
        ("broken_here:f", "raise RuntimeError('at import')", "RuntimeError: at import"),
        ("broken_here:f", "import os; os._exit(1)", "ended while it was imported"),
        ("broken_here:f", "import time; time.sleep(600)", "import took too long"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_at_once(
    make: Make, tmp_path: Path, function: str, source: str, told: str
) -> None:
    (tmp_path / "broken_here.py").write_text(source)
    start = {"start_timeout_s": 5.0} if "sleep" in source else {}
    with pytest.raises(SettingsError, match=told) as refused:
        make(function, path=tmp_path, **start)
    assert refused.value.param == "function"


def test_a_module_that_vanishes_costs_the_samples_after_a_restart(make: Make, tmp_path: Path) -> None:
    module = tmp_path / "vanishing.py"
    module.write_text("import os\ndef f(sample):\n    os._exit(1) if sample.text == 'die' else None\n    return 1\n")
    reward = make("vanishing:f", path=tmp_path)
    assert reward(texts("a", "die")) == [1.0, Failure("died")]
    module.unlink()
    assert reward(texts("a", "b")) == [Failure("did not start")] * 2
