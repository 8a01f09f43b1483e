"""Checkpoints that hold what trains and nothing else, and a training that ends in order when it is told to.

Comes in: a transformers trainer, a folder. Goes out: `checkpoint-N/` folders, of which only a whole one is believed.
Must not import `serve`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from noria.errors import LeaseLost, TrainingError
from train.heartbeat import SHUTDOWN

TRAINABLE = "trainable.safetensors"
WHOLE = "whole"  # a checkpoint's last file: all processes have written theirs
CHECKPOINT_EVERY = 100
_KEPT = 2


class CheckpointedTrainer(transformers.Trainer):
    """A trainer whose checkpoints are small; to be named before any other kind of trainer among the bases."""

    def begin_step(self) -> None:
        """A new optimiser step is about to begin."""

    def save_now(self) -> None:
        """A checkpoint of this very step."""
        self._save_checkpoint(self.model, trial=None)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trainables(self.model, state_dict), folder / TRAINABLE, metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / WHOLE).touch()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        kept = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        held = {plain_name(name): p for name, p in self.model.named_parameters() if p.requires_grad}
        if kept.keys() != held.keys():
            odd = sorted(kept.keys() ^ held.keys())[0]
            raise TrainingError(f"the checkpoint {resume_from_checkpoint} is of another stage: {odd} is in one only")
        with torch.no_grad():
            for name, parameter in held.items():
                parameter.copy_(kept[name])


class StopWatch(transformers.TrainerCallback):
    """Asks `check` between micro-batches whether to stop.

    A machine that is asked to stop (LeaseLost, code `shutdown`) ends its step, and saves it, where checkpoints are kept
    (`keeps`); then `stopped` says why the training ended. Any other reason ends the work at once.
    """

    def __init__(self, check: Callable[[], None], *, keeps: bool = True) -> None:
        self._check = check
        self._keeps = keeps
        self.trainer: CheckpointedTrainer | None = None
        self.stopped: LeaseLost | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A new optimiser step. Nothing of it has happened yet, so a machine that is asked to stop can still save."""
        try:
            self._check()
        except LeaseLost as stop:
            if self._waits(stop) and self.trainer is not None and state.global_step:
                self.trainer.save_now()
            raise
        if self.trainer is not None:
            self.trainer.begin_step()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch that is not the step's last."""
        try:
            self._check()
        except LeaseLost as stop:
            if not self._waits(stop):
                raise

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser has stepped."""
        with self.stopping(control):
            self._check()

    @contextmanager
    def stopping(self, control: Any) -> Iterator[None]:
        """Around what may say stop once a step is done: the step is saved first, and the training ends after."""
        try:
            yield
        except LeaseLost as stop:
            if not self._waits(stop):
                raise
            self.stopped = stop
            control.should_save = control.should_training_stop = True

    def _waits(self, stop: LeaseLost) -> bool:
        return self._keeps and stop.code == SHUTDOWN


def saving(out: Path, every: int | None) -> dict[str, Any]:
    """Checkpoints each so many steps (none: CHECKPOINT_EVERY), in transformers' words."""
    steps = every or CHECKPOINT_EVERY
    return {"output_dir": str(out), "save_strategy": "steps", "save_steps": steps, "save_total_limit": _KEPT}


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole checkpoint; what was cut off is removed."""
    found = sorted(out.glob("checkpoint-*"), key=step_of)
    for path in found:
        if not (path / WHOLE).is_file():
            shutil.rmtree(path, ignore_errors=True)
    whole = [path for path in found if path.is_dir()]
    return whole[-1] if whole else None


def step_of(checkpoint: Path) -> int:
    """The number of the last step that is in a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def trainables(model: Any, state: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
    """What trains, by name, on the CPU; `state` has the values where the model holds shards of them."""
    named = [(plain_name(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    plain = {plain_name(name): value for name, value in (state or {}).items()}
    return {name: plain.get(name, parameter).detach().cpu().contiguous() for name, parameter in named}


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP, DDP or compilation put around it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "").removeprefix("module.")
