"""Rewards of samples, by `python -m train rewards`: rows in, scores out.

Comes in: one row a sample. Goes out: one score a row, `{"total", "parts", "failed"}`. Must not import train: it runs in
a process of its own.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence

from noria.cli.context import Place
from noria.cli.run import environment_of, python_m
from noria.errors import WIRE, NoriaError, TrainingError
from noria.records import Json


def score(here: Place, rows: Sequence[Json], rewards: Sequence[str], version: str) -> list[Json]:
    """A score a row. `version` is the one that a reward looks through where it needs a model.

    Raises the kind of NoriaError that the scoring ended with.
    """
    asked = [word for reward in rewards for word in ("--reward", reward)]
    command = python_m("train", ["rewards", *asked, "--model", version])
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    done = subprocess.run(  # noqa: S603 - our own interpreter and module
        command, input=lines, env=environment_of(here), capture_output=True, text=True, check=False
    )
    if done.returncode:
        kinds = [kind for kind, wire in WIRE.items() if wire.exit_code == done.returncode]
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].removeprefix("noria train: ")
        raise (kinds[0] if kinds else NoriaError)(f"the rewards could not be told: {said}")
    scores = [json.loads(line) for line in done.stdout.splitlines() if line.strip()]
    if len(scores) != len(rows):
        raise TrainingError(f"{len(rows)} samples were to be scored, and {len(scores)} scores came back")
    return scores
