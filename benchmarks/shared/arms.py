"""What measurements of training share: arms that start from copies of one home, and a job that is followed to its end.

Comes in: a home that nobody uses meanwhile, a job's settings. Goes out: copies, and what became of the job.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from noria.client import NoriaClient
from noria.errors import TrainingError
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from train.models.add import make_live
from train.models.embedded.build import build_embedded

UNSEEN = {"NORIA_CAPTURE__DEFAULT": "false"}  # or GRPO would be asked the held-out questions, too
ENGINE = {**UNSEEN, "NORIA_ENGINE__POLICY_ADAPTERS": "1", "NORIA_ENGINE__MAX_MODEL_LEN": "512"}
PANELS = {
    "reward": ("reward",),
    "KL to v1, nats a token": ("kl",),
    "ratio of trainer to engine": ("ratio_mean", "ratio_max"),
    "tokens of an answer": ("length",),
}
_LEFT = ("server.json", "*.log", "policy-adapters", "jobs")  # of a home that is copied: what belongs to its processes


@dataclass(frozen=True)
class Trained:
    """A job that succeeded. `updates` are its steps as the job told of them, `stages` seconds by name.

    `seconds` are those from the request to the version that answers.
    """

    version: str
    metrics: dict[str, object]
    updates: tuple[dict[str, float], ...]
    stages: dict[str, float]
    seconds: float


def home_of(given: Path | None, to: Path) -> Path:
    """A home with a live version at `to`: the copy of another's, or the embedded model, built (some minutes)."""
    if given is not None:
        shutil.copytree(given, to, ignore=shutil.ignore_patterns(*_LEFT))
        return to
    to.mkdir(parents=True)
    settings = Settings(home=to)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        make_live(registry, build_embedded(registry, settings, lambda stage, share: None))
    return to


def follow(noria: NoriaClient, method: str, settings: dict[str, object]) -> Trained:
    """Starts a job whose version goes live, and waits for its end. Raises TrainingError where it fails."""
    began = time.monotonic()
    job = noria.create_job(method=method, settings=settings, rollout="direct")
    updates: list[dict[str, float]] = []
    stages: list[tuple[str, float]] = []
    for event in noria.watch_job(job["id"]):
        if event["kind"] == "stage" and not event["data"].get("finished"):
            stages.append((event["data"]["stage"], event["at"]))
        if event["kind"] == "metrics" and "loss" in event["data"]:
            updates.append(event["data"])
    ended = noria.job(job["id"])
    if ended["state"] != "succeeded" or ended["finished_at"] is None or ended["version"] is None:
        raise TrainingError(f"job {ended['id']} {ended['state']} at stage {ended['stage']}: {ended['error']}")
    stages.append(("end", ended["finished_at"]))
    spent = {name: until - at for (name, at), (_, until) in pairwise(stages)}
    return Trained(ended["version"], ended["metrics"], tuple(updates), spent, time.monotonic() - began)


def draw_curves(path: Path, arms: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    """Writes a picture: a panel of each title, over the updates; an arm is a colour, a panel's keys are strokes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7))
    for axis, (title, keys) in zip(axes.flat, PANELS.items(), strict=True):
        for colour, (arm, updates) in enumerate(arms.items()):
            for stroke, key in zip(("-", ":", "--"), keys, strict=False):
                known = [one for one in updates if key in one]
                label = arm if len(keys) == 1 else f"{arm}, {key}"
                axis.plot(
                    [one["step"] for one in known], [one[key] for one in known], stroke, color=f"C{colour}", label=label
                )
        axis.set(title=title, xlabel="update")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
