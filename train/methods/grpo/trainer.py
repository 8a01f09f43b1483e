"""TRL's GRPOTrainer over groups from elsewhere: the loss is TRL's, its batches are ours.

Comes in: a model whose policies are applied, something that gives the groups of each update. Goes out: gradient steps
and figures of each. Must not import `serve`.

What is overridden, and why. `_generate_and_score_completions`: groups come from the serving engine with recorded ids
and log-probabilities. `_get_per_token_logps_and_entropies`: prompts are shared, see `layout`; the policy of sampling is
what the first pass over a batch computes, so that no pass of its own is needed for it. `training_step`: an update's
micro-batches are run here, since groups that teach nothing are left out and their number differs. `_compute_loss`, all
its loss types and its figures are TRL's, untouched; TRL divides by what is in a micro-batch, `share` makes it a part of
the whole update.

Shapes: B answers in a micro-batch, C tokens of the longest.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from noria.errors import LeaseLost, TrainingError
from noria.methods.grpo import GrpoSettings
from noria.records import Json
from train.heartbeat import SHUTDOWN
from train.methods.checkpoints import WHOLE, CheckpointedTrainer
from train.methods.grpo.forward import AnswerForward
from train.methods.grpo.groups import Group, advantages
from train.methods.grpo.layout import Layout, Layouts, Row
from train.methods.grpo.ratios import Distance, weights
from train.methods.policies import Applied
from train.stages.trainer import StageWatch, non_finite

PROGRESS = "grpo.json"  # in a checkpoint, beside what trains
_BY_TOKENS = ("dapo", "cispo", "vespo")  # losses that TRL divides by the whole batch's tokens
_FIGURES = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clipped",
    "cispo_clip_ratio": "clipped",
}
"""TRL's figures of an update, and what they are called here."""


@dataclass(frozen=True)
class Update:
    """What one batch of groups is trained on, and its figures, as they are logged."""

    groups: tuple[Group, ...]
    figures: dict[str, float]


class Feed(Protocol):
    """What gives the trainer its groups; `progress` is kept in checkpoints and given back to `restore`."""

    def next(self, update: int) -> Update:
        """The groups of the next update; `update` are done."""
        ...

    def progress(self) -> Json:
        """Where it is."""
        ...

    def restore(self, progress: Json) -> None:
        """Goes on from there."""
        ...


Pictures = Callable[[Group], dict[str, torch.Tensor]]
"""A prompt's pictures as the model's own processor makes them; empty without any."""


class GroupTrainer(CheckpointedTrainer, GRPOTrainer):
    """Runs the updates of one training."""

    def __init__(
        self,
        applied: Applied,
        args: GRPOConfig,
        grpo: GrpoSettings,
        feed: Feed,
        pictures: Pictures,
        processor: Any,
        watch: StageWatch,
        check: Callable[[], None],
    ) -> None:
        rows = Dataset.from_dict({"prompt": [""] * args.max_steps})  # one an update: what is asked comes from the feed
        super().__init__(
            model=applied.model,
            reward_funcs=_elsewhere,
            args=args,
            train_dataset=rows,
            processing_class=processor,
            callbacks=[watch],
        )
        applied.set_dropout()
        self.beta = grpo.beta  # given to TRL it would load a reference model; here the adapter is switched off
        self.use_vllm = True  # "multiply the loss by importance_sampling_ratio"
        self.vllm_importance_sampling_correction = grpo.importance_sampling != "none"
        self.watch = watch
        watch.trainer = self
        self.optimizer: Any
        self._applied = applied
        self._grpo = grpo
        self._feed = feed
        self._pictures = pictures
        self._check = check
        self._layouts = Layouts(applied.model, pad_id=self._tokenizer.pad_token_id, share_prompts=grpo.share_prompts)
        self._answers = AnswerForward(applied.model, self._layouts.image_id)
        self._micros: list[dict[str, Any]] = []
        self._passes = 0
        self._update: Update | None = None
        self._distance = Distance()
        self._now: dict[str, Any] = {}
        self._seconds = 0.0
        self._trained = [(name, one) for name, one in applied.model.named_parameters() if one.requires_grad]
        self.remove_callback(transformers.PrinterCallback)

    def get_train_dataloader(self) -> Any:
        """One empty row an update."""
        return torch.utils.data.DataLoader(range(self.args.max_steps), batch_size=1, collate_fn=list)

    def create_optimizer(self, model: Any = None) -> Any:
        """The optimiser that the arguments ask for, over the policies' own groups."""
        if self.optimizer is None:
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            options = {key: value for key, value in options.items() if key not in ("lr", "weight_decay")}
            self.optimizer = self._applied.optimizer(make, **options)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The gradient of one update. Raises TrainingError: a loss that is not finite, engine and trainer apart."""
        model.train()
        total = torch.zeros((), device=self.accelerator.device)
        micros, began = self._prepare_inputs(inputs), time.monotonic()
        for micro in micros:
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, micro)
            if not bool(torch.isfinite(loss.detach())):
                raise non_finite(f"loss {float(loss.detach())}", micro["sources"])
            self.accelerator.backward(loss)
            total += loss.detach()
            self._check_unless_stopping()
        if not self._passes:
            self._distance.require(self._grpo)
        self._passes += 1
        self._seconds = time.monotonic() - began
        return total

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A micro-batch's part of the update's loss."""
        self._now = inputs
        if self.beta and "ref_per_token_logps" not in inputs:
            with torch.no_grad(), self._applied.reference():
                inputs["ref_per_token_logps"] = self._logps(inputs, entropy=False)[0]
        return super().compute_loss(model, inputs, return_outputs) * inputs["share"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the update's figures before they are told."""
        if "loss" in logs and self._update is not None:
            found = self._metrics["train"]
            figures = {ours: _mean(found[theirs]) for theirs, ours in _FIGURES.items() if found.get(theirs)}
            figures |= self._update.figures | self._distance.figures() | {"training_s": round(self._seconds, 3)}
            figures["staleness"] = figures.get("staleness", 0.0) + self._passes - 1
            self.watch.measured(sum(int(micro["completion_mask"].sum()) for micro in self._micros), figures)
        super().log(logs, start_time)

    def save_now(self) -> None:
        """A checkpoint of this very update, unless there is one."""
        done = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}" / WHOLE
        if self.state.global_step and not done.is_file():
            super().save_now()

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted."""
        return 0

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: TRL would write one beside every checkpoint."""

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The update's micro-batches: new ones, or those of the last update where a batch has several."""
        if not self._micros or self._passes >= self._grpo.iterations:
            self._micros, self._passes = self._generate_and_score_completions(generation_batch), 0
        return self._micros

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        try:
            self._update = self._feed.next(int(self.state.global_step))
        except LeaseLost as stop:
            if stop.code == SHUTDOWN:  # nothing of this update has happened: what was learnt before is kept
                self.save_now()
            raise
        self._distance = Distance()
        return self._split(self._update.groups)

    def _split(self, groups: Sequence[Group]) -> list[dict[str, Any]]:
        """Micro-batches of at most `micro` answers that train; those of one group side by side."""
        scaled = advantages(groups, self._grpo.scale_rewards)
        micros: list[list[tuple[Group, list[int], list[float]]]] = [[]]
        room = self._grpo.micro
        for group, values in zip(groups, scaled, strict=True):
            left = [number for number, one in enumerate(group.answers) if one.trains]
            while left:
                if not room:
                    micros.append([])
                    room = self._grpo.micro
                some, left = left[:room], left[room:]
                micros[-1].append((group, some, values))
                room -= len(some)
        answers = sum(len(group.answers) for group in groups)
        tokens = sum(len(one.token_ids) for group in groups for one in group.answers if one.trains)
        made = [self._micro(rows) for rows in micros]
        for micro in made:
            micro["num_items_in_batch"] = torch.tensor(float(tokens), device=self.accelerator.device)
            micro["share"] = self._share(len(micro["advantages"]), answers, len(made))
        return made

    def _share(self, rows: int, answers: int, micros: int) -> float:
        """What makes TRL's loss of a micro-batch a part of that of all `answers`, those that do not train included."""
        if self._grpo.loss_type in _BY_TOKENS:
            return 1.0
        return 1.0 / micros if self._grpo.loss_type == "bnpo" else rows / answers

    def _micro(self, rows: Sequence[tuple[Group, list[int], list[float]]]) -> dict[str, Any]:
        device = self.accelerator.device
        layout = self._layouts.lay_out(
            [
                Row(group.prompt_token_ids, tuple(group.answers[n].token_ids for n in some), self._pictures(group))
                for group, some, _ in rows
            ]
        )
        recorded = [group.answers[number].logprobs for group, some, _ in rows for number in some]
        longest = layout.ids_BC.shape[1]
        padded = torch.tensor([[*one, *[0.0] * (longest - len(one))] for one in recorded])
        nothing = torch.zeros(len(recorded), 0, dtype=torch.long, device=device)  # prompts are in the layout
        return {
            "prompt_ids": nothing,
            "prompt_mask": nothing,
            "completion_ids": layout.ids_BC.to(device),
            "completion_mask": layout.mask_BC.to(device),
            "advantages": torch.tensor([values[number] for _, some, values in rows for number in some], device=device),
            "sampling_per_token_logps": padded.to(device),
            "layout": _moved(layout, device),
            "features": {},
            "sources": [group.prompt.source for group, _, _ in rows],
        }

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any
    ) -> Any:
        """The log-probabilities of the micro-batch at hand; on its first pass they are also those of the old policy."""
        micro = self._now
        logps_BC, entropies_BC = self._logps(micro, entropy=compute_entropy)
        if "old_per_token_logps" not in micro:
            old_BC, mask_BC = logps_BC.detach(), micro["completion_mask"]
            log_r_BC = (old_BC - micro["sampling_per_token_logps"]) * mask_BC
            micro["old_per_token_logps"] = old_BC
            micro["importance_sampling_ratio"] = weights(log_r_BC, mask_BC, self._grpo)
            self._distance.add(log_r_BC, mask_BC, self._grpo)
        return logps_BC, entropies_BC, None

    def _logps(self, micro: dict[str, Any], *, entropy: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        with self.accelerator.autocast():
            return self._answers(micro["layout"], micro["features"], ", ".join(micro["sources"]), entropy=entropy)

    def _check_unless_stopping(self) -> None:
        """A machine that is asked to stop ends its update first; every other reason ends the work at once."""
        try:
            self._check()
        except LeaseLost as stop:
            if stop.code != SHUTDOWN:
                raise

    def _clip_grad_norm(self, model: Any) -> Any:
        """Raises TrainingError before the optimiser step when a gradient is not finite."""
        trained = [(name, one) for name, one in self._trained if one.grad is not None]
        norm = torch.nn.utils.get_total_norm([one.grad for _, one in trained])
        if not bool(torch.isfinite(norm)):
            worst = next((n for n, p in trained if not bool(torch.isfinite(p.grad).all())), "all parameters")
            raise non_finite(f"gradient of {worst}", [name for micro in self._micros for name in micro["sources"]])
        torch.nn.utils.clip_grads_with_norm_([one for _, one in trained], self.args.max_grad_norm, norm)
        return norm

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / PROGRESS).write_text(json.dumps(self._feed.progress()) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._feed.restore(json.loads((Path(resume_from_checkpoint) / PROGRESS).read_text()))


def _elsewhere(**columns: Any) -> list[float | None]:
    """Stands where TRL wants a reward; the feed's groups have theirs."""
    raise TrainingError("rewards should have come with the groups")


def _moved(layout: Layout, device: Any) -> Layout:
    inputs = {name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in layout.inputs.items()}
    return Layout(inputs, layout.ids_BC.to(device), layout.mask_BC.to(device), layout.places_BC.to(device))


def _mean(values: Sequence[float]) -> float:
    known = [one for one in values if one == one]
    return sum(known) / len(known) if known else 0.0
