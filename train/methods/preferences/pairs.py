"""The trainer of the pair methods: TRL's DPOTrainer, with whatever of the loss TRL does not have added behind it.

Comes in: TextPairs, an `Objective`, a model whose policies are applied. Goes out: gradient steps. A snapshot may have
pairs with pictures and pairs without. Must not import `serve`.

Shapes: B pairs in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from train.data.pairs import TextPair
from train.data.samples import LoadImage
from train.methods.policies import Applied
from train.methods.preferences.guarded import ROWS, GuardedTrainer
from train.methods.preferences.objective import Answers, Objective


class PairCollator:
    """Batches by row number.

    TRL's own vision collator does the work; it takes rendered text as it is, and a row without pictures beside rows
    that have some. (DPOTrainer hands text-only *datasets* to another collator, so one snapshot with both kinds needs
    every row on the vision path.)
    """

    def __init__(self, pairs: Sequence[TextPair], processor: Any, load_image: LoadImage) -> None:
        self._pairs = pairs
        self._load_image = load_image
        self._collate = DataCollatorForVisionPreference(processor=processor, max_length=None)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of [chosen_B, rejected_B] stacked, and ROWS (B,)."""
        rows = [int(example["row"]) for example in examples]
        texts = []
        for pair in (self._pairs[row] for row in rows):
            pictures = [self._load_image(one) for one in pair.images]
            texts.append({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, "images": pictures})
        batch = dict(self._collate(texts))
        batch[ROWS] = torch.tensor(rows)
        return batch


class PairTrainer(GuardedTrainer, DPOTrainer):
    """DPOTrainer with one method's objective: TRL's losses, and what the objective adds to them."""

    def __init__(
        self, *args: Any, applied: Applied, judgements: Sequence[TextPair], objective: Objective, **kwargs: Any
    ) -> None:
        super().__init__(*args, applied=applied, judgements=judgements, **kwargs)
        self._objective = objective
        self.has_reference = objective.has_reference
        self._reference: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def learnt_from(self) -> dict[str, int]:
        """How many pairs."""
        return {"pairs": len(self._judgements)}

    def _add_reference(self, model: Any, inputs: dict[str, Any], rows: list[int]) -> None:
        if not self.has_reference:  # "log ratios" are then the policy's log-probabilities
            nothing_B = torch.zeros(len(rows), device=inputs["input_ids"].device)
            inputs["ref_chosen_logps"] = inputs["ref_rejected_logps"] = nothing_B
            return
        if any(row not in self._reference for row in rows):
            with self._applied.reference():
                chosen_B, rejected_B = self.compute_ref_log_probs(model, inputs)
            for row, chosen, rejected in zip(rows, chosen_B, rejected_B, strict=True):
                self._reference.setdefault(row, (chosen, rejected))
        inputs["ref_chosen_logps"] = torch.stack([self._reference[row][0] for row in rows])
        inputs["ref_rejected_logps"] = torch.stack([self._reference[row][1] for row in rows])

    def _whole(self, loss: Any, outputs: Any, inputs: dict[str, Any]) -> Any:
        answers = self._answers(outputs, inputs)
        if self._objective.per_token:
            self._measure(answers)
        if self._objective.term is None:
            return loss
        return loss + self._objective.term(answers).mean()

    def _answers(self, outputs: Any, inputs: dict[str, Any]) -> Answers:
        tokens_BT = inputs["completion_mask"][:, 1:]
        logps_BT = outputs.log_probs[:, -tokens_BT.shape[1] :]  # 0 outside the answers
        chosen_B, rejected_B = logps_BT.sum(dim=1).chunk(2)
        chosen_tokens_B, rejected_tokens_B = tokens_BT.sum(dim=1).chunk(2)
        return Answers(
            chosen_B=chosen_B,
            rejected_B=rejected_B,
            reference_chosen_B=inputs["ref_chosen_logps"],
            reference_rejected_B=inputs["ref_rejected_logps"],
            chosen_tokens_B=chosen_tokens_B,
            rejected_tokens_B=rejected_tokens_B,
        )

    def _measure(self, answers: Answers) -> None:
        """TRL has reported sums; these methods' rewards are means."""
        chosen_B, rejected_B = (self._objective.beta * mean_B.detach() for mean_B in answers.mean_ratios_B)
        told = {"chosen": chosen_B, "rejected": rejected_B, "accuracies": (chosen_B > rejected_B).float()}
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, value_B in {**told, "margins": chosen_B - rejected_B}.items():
            metrics[f"rewards/{name}"][-1] = float(value_B.mean())

    def _batches(self) -> list[list[int]]:
        size = self.args.per_device_train_batch_size
        rows = list(range(len(self._judgements)))
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    def _kept(self) -> dict[str, torch.Tensor]:
        chosen_N, rejected_N = (torch.stack(one).cpu() for one in zip(*self._reference.values(), strict=True))
        kept = {"rows": torch.tensor(list(self._reference)), "chosen": chosen_N, "rejected": rejected_N}
        if (shift := self._objective.shift) is not None:
            kept["shift"] = torch.tensor([shift.mean, shift.batches], dtype=torch.float64)
        return kept

    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        for row, chosen, rejected in zip(kept["rows"], kept["chosen"], kept["rejected"], strict=True):
            self._reference[int(row)] = (chosen, rejected)
        if (shift := self._objective.shift) is not None:
            shift.mean, batches = kept["shift"].tolist()
            shift.batches = int(batches)
