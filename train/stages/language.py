"""Stages `align`, `sft` and `finetune` as a task: conversations in, cross-entropy of the answers' tokens out.

Where the stage keeps the language, conversations without pictures give the distance to the model before it instead.

Comes in: samples, a model whose policies are applied, its processor. Goes out: a `Task` for the trainer.
Must not import `serve`.

Shapes: B rows, T tokens, N of all of them whose next token is learnt, K of them whose next token is kept, V the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from noria.errors import TrainingError
from noria.recipes import RecipeStage
from noria.records import Json
from train.data import packing
from train.data.collate import SupervisedCollator
from train.data.encode import IGNORED, Encoder
from train.data.packing import PackedCollator
from train.data.samples import LoadImage, Sample
from train.methods.policies import Applied
from train.pipeline.files import once
from train.stages.order import Plan, Unit, plan

_TEXT_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")


class LanguageTask:
    """A whole model that reads conversations and learns their answers. `measured` is what `measure` told."""

    def __init__(
        self,
        applied: Applied,
        processor: Any,
        samples: Sequence[Sample],
        load_image: LoadImage,
        stage: RecipeStage,
        measured: Json,
    ) -> None:
        self.model = applied.model
        self._applied = applied
        self._samples = samples
        encoder = Encoder(processor, load_image, stage.max_length)
        self._counts = measured
        self.plan = self._plan(stage)
        self._packed = stage.packing
        self._keep = stage.keep_language
        self._collate = PackedCollator(encoder, applied.model) if stage.packing else SupervisedCollator(encoder)
        applied.model.register_forward_hook(_anchored)

    def groups(self, model: Any) -> list[dict[str, Any]]:
        """The groups of the applied policies."""
        return self._applied.groups

    def collate(self, units: list[Unit]) -> dict[str, Any]:
        """The model's inputs; an item is a token of an answer, and each token of a conversation that is kept."""
        rows = [tuple(self._samples[number] for number in unit) for unit in units]
        alone = [sample for row in rows for sample in row]
        inputs = self._collate(rows if self._packed else alone)  # type: ignore[arg-type]
        labels = inputs.pop("labels")
        mask = inputs.get("attention_mask")
        kept_BT = torch.zeros_like(labels, dtype=torch.bool)
        if self._keep is not None:
            plain_B = torch.tensor([not sample.images for sample in alone])
            kept_BT[plain_B] = inputs["attention_mask"][plain_B].bool()
            labels[plain_B] = IGNORED
        return {
            "inputs": inputs,
            "labels": labels,
            "kept": kept_BT,
            "items": int((labels[:, 1:] != IGNORED).sum() + kept_BT.sum()),
            "tokens": int(mask.sum()) if mask is not None else int(labels.numel()),
            "sources": [sample.source for sample in alone],
        }

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, float]]:
        """-sum log p(token) over the answers' tokens, in nats, and what keeping adds.

        The output layer runs on their positions alone.
        """
        targets_BT = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
        kept_BT = batch["kept"]
        asked_BT = (targets_BT != IGNORED) | kept_BT
        with output_layer_at(self.model, asked_BT):
            logits_NV = model(**{"use_cache": False, **batch["inputs"]}).logits.float()
        learnt_N = ~kept_BT[asked_BT]
        loss = functional.cross_entropy(logits_NV[learnt_N], targets_BT[asked_BT][learnt_N], reduction="sum")
        if self._keep is None or not bool(kept_BT.any()):
            return loss, {}
        before_KV = self._before(batch["inputs"], kept_BT)
        apart = functional.kl_div(logits_NV[~learnt_N].log_softmax(-1), before_KV, log_target=True, reduction="sum")
        return loss + self._keep * apart, {"language_kl": float(apart.detach() / len(before_KV))}

    @torch.no_grad()
    def _before(self, inputs: dict[str, Any], kept_BT: torch.Tensor) -> torch.Tensor:
        """(K, V): log-probabilities at these positions of the model without its LoRA; their rows have no pictures."""
        rows_B = kept_BT.any(1)
        plain = {name: inputs[name][rows_B] for name in _TEXT_INPUTS if name in inputs}
        with self._applied.reference(), output_layer_at(self.model, kept_BT[rows_B]):
            logits_KV = self.model(**{"use_cache": False, **plain}).logits
        return logits_KV.float().log_softmax(-1)

    def report(self) -> Json:
        """What became of the samples, in counts."""
        return {"encoded": self._counts["counts"], "bad_pictures": self._counts["bad"]}

    def _plan(self, stage: RecipeStage) -> Plan:
        kept, lengths = self._counts["kept"], self._counts["lengths"]
        if not kept:
            why = ", ".join(f"{n} {reason}" for reason, n in self._counts["counts"]["dropped"].items())
            raise TrainingError(f"stage {stage.name!r}: no sample can be trained on ({why})", code="no_data")
        if stage.packing:
            return plan(stage, kept, pack=lambda number: _packs(stage, kept, lengths, number))
        by_number = dict(zip(kept, lengths, strict=True))
        return plan(stage, kept, lengths=by_number if stage.group_by_length else None)


@contextmanager
def output_layer_at(model: Any, learnt_BT: torch.Tensor) -> Iterator[None]:
    """The output layer, which is a fifth of a small model, runs on these positions alone: logits are (N, V) inside.

    By a hook and not by `logits_to_keep`, which keeps the same columns for every row.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][learnt_BT],))
    try:
        yield
    finally:
        hook.remove()


def _anchored(model: Any, args: Any, output: Any) -> Any:
    """Text alone, where only the tower or the aligner trains, has no gradient: it is given one of zeros.

    Inside the model's forward, because that is where DistributedDataParallel looks for what was used.
    """
    if torch.is_grad_enabled() and not output.logits.requires_grad:
        nothing = 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
        output.logits = output.logits + (nothing.full_tensor() if hasattr(nothing, "full_tensor") else nothing)
    return output


def _packs(stage: RecipeStage, kept: list[int], lengths: list[int], number: int) -> list[Unit]:
    found = packing.plan(lengths, stage.max_length, seed=stage.seed + 2 * number)
    return [tuple(kept[place] for place in pack) for pack in found]


def measure(
    processor: Any,
    samples: Sequence[Sample],
    load_image: LoadImage,
    stage: RecipeStage,
    receipt: Path,
    tick: Callable[[int], None] = lambda done: None,
) -> Json:
    """How long each sample is and which are left out, found once for all attempts and processes and kept in a file."""

    def produce() -> Json:
        encoder = Encoder(processor, load_image, stage.max_length)
        found = encoder.measure(samples, tick)
        counts = encoder.counts
        return {
            "kept": found.kept,
            "lengths": found.lengths,
            "bad": [str(one) for one in found.bad[:100]],
            "counts": asdict(counts),
        }

    return once(receipt, produce)
