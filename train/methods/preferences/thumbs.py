"""The trainer of KTO: TRL's KTOTrainer over answers with a thumb, in an order that is drawn whole (`order`).

Comes in: TextThumbs, a model whose policies are applied. Goes out: gradient steps. Must not import `serve`.

KTO (Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, section 4.1), per answer y to a prompt x:
    w_up (1 - sigmoid(beta (r - z))) for a thumb up, w_down (1 - sigmoid(beta (z - r))) for a thumb down,
with r the log ratio of policy to reference over the whole answer, and z the KL of policy to reference, through which no
gradient goes. z is estimated as there: each prompt of a micro-batch with the answer of another row of it, and not below
0. Loss, KL and metrics are TRL's, untouched. Ours is what TRL leaves to its user or refuses for pictures: which rows
share a micro-batch, and the reference's values, kept.

Shapes: B answers in a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from trl import KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForVisionUnpairedPreference

from train.data.pairs import TextThumb
from train.data.samples import LoadImage
from train.methods.policies import Applied
from train.methods.preferences.guarded import ROWS, GuardedTrainer
from train.methods.preferences.order import Order


class ThumbCollator:
    """Batches by row number; TRL's own vision collator does the work, as for pairs."""

    def __init__(self, thumbs: Sequence[TextThumb], processor: Any, load_image: LoadImage) -> None:
        self._thumbs = thumbs
        self._load_image = load_image
        self._collate = DataCollatorForVisionUnpairedPreference(processor=processor, max_length=None)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Tensors of the answers and, as `KL_*`, of prompts with another's answer; `label` and ROWS (B,)."""
        rows = [int(example["row"]) for example in examples]
        texts = []
        for thumb in (self._thumbs[row] for row in rows):
            pictures = [self._load_image(one) for one in thumb.images]
            texts.append({"prompt": thumb.prompt, "completion": thumb.answer, "label": thumb.up, "images": pictures})
        batch = dict(self._collate(texts))
        batch[ROWS] = torch.tensor(rows)
        return batch


class ThumbTrainer(GuardedTrainer, KTOTrainer):
    """KTOTrainer that keeps what the reference says, of answers by their row, of the KL's by prompt's and answer's row.

    Its data set is an `Order`, row by row: TRL wants KTO's data in sequence.
    """

    def __init__(
        self, *args: Any, applied: Applied, judgements: Sequence[TextThumb], order: Order, **kwargs: Any
    ) -> None:
        super().__init__(*args, applied=applied, judgements=judgements, **kwargs)
        self.passes = len(order.rows) / len(judgements)
        self._order = order
        self._ups = sum(one.up for one in judgements)
        self._reference: dict[int, torch.Tensor] = {}
        self._unrelated: dict[tuple[int, int], torch.Tensor] = {}

    def learnt_from(self) -> dict[str, int]:
        """How many answers, with which thumbs, and how many of their KLs are over alike prompts."""
        count = len(self._judgements)
        return {"answers": count, "up": self._ups, "down": count - self._ups, "alike": self._order.alike}

    def _add_reference(self, model: Any, inputs: dict[str, Any], rows: list[int]) -> None:
        crossed = list(zip(rows, [rows[-1], *rows[:-1]], strict=True))
        with torch.no_grad(), self.accelerator.autocast(), self._applied.reference():
            if any(row not in self._reference for row in rows):
                for row, logps in zip(rows, self._logps(model, inputs), strict=True):
                    self._reference.setdefault(row, logps)
            if any(one not in self._unrelated for one in crossed):
                for one, logps in zip(crossed, self._compute_kl_logps(model, inputs), strict=True):
                    self._unrelated.setdefault(one, logps)
        inputs["ref_logps"] = torch.stack([self._reference[row] for row in rows])
        inputs["ref_KL_logps"] = torch.stack([self._unrelated[one] for one in crossed])

    def _logps(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        own = {key: value for key, value in inputs.items() if not key.startswith("KL_")}
        completion_BT, _ = own.pop("completion_mask"), own.pop("label")
        labels_BT = own["input_ids"].masked_fill(completion_BT == 0, -100)
        outputs = model(**own, labels=labels_BT, use_cache=False, fused_lm_head=True)
        return outputs.log_probs.sum(dim=1)

    def _whole(self, loss: Any, outputs: Any, inputs: dict[str, Any]) -> Any:
        metrics = self._metrics["train" if self.model.training else "eval"]
        ratios_B = outputs.log_probs.detach().sum(dim=1) - inputs["ref_logps"]
        is_over_B = ratios_B > metrics["kl"][-1]
        metrics["rewards/accuracies"].append(float((is_over_B == inputs["label"].bool()).float().mean()))
        return loss

    def _batches(self) -> list[list[int]]:
        size, rows = self.args.per_device_train_batch_size, self._order.rows
        return [list(rows[first : first + size]) for first in range(0, len(rows), size)]

    def _kept(self) -> dict[str, torch.Tensor]:
        return {
            "rows": torch.tensor(list(self._reference)),
            "logps": torch.stack(list(self._reference.values())).cpu(),
            "crossed": torch.tensor(list(self._unrelated)),
            "unrelated": torch.stack(list(self._unrelated.values())).cpu(),
        }

    def _restore(self, kept: dict[str, torch.Tensor]) -> None:
        self._reference = {int(row): logps for row, logps in zip(kept["rows"], kept["logps"], strict=True)}
        crossed = [(int(prompt), int(answer)) for prompt, answer in kept["crossed"]]
        self._unrelated = dict(zip(crossed, kept["unrelated"], strict=True))
