"""Batches of one row that holds many samples, as if each were alone.

Comes in: packs of samples, the model that will read them. Goes out: the tensors of its forward.
Must not import `serve`.

A packed row has no attention mask and positions that start again at every sample; transformers reads the borders from
them (`masking_utils.find_packed_sequence_indices`, and FlashAttention's variable lengths), so that no token attends to
another sample. That works only without a key-value cache, so the batch says `use_cache=False`. Models with multimodal
rotary positions (Qwen-VL) get four rows of positions: the text's, which mark the borders, and the three that the model
itself computes for each sample alone. The first label of every sample is ignored: what comes before it is another one.

Shapes: T tokens of the row, over all samples in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from train.data.collate import encode_all, join_pictures, token_types
from train.data.encode import Encoded, Encoder
from train.data.packing.attention import attend_by_sample
from train.data.samples import Sample


class PackedCollator:
    """Encodes packs into one row. Several packs at once make one longer row: a batch size of 1 is meant."""

    def __init__(self, encoder: Encoder, model: Any) -> None:
        """`model` may be wrapped (peft, DDP). Its text attention works sample by sample from now on, where it can."""
        self._encoder = encoder
        attend_by_sample(model)
        self._rope_index = next((m.get_rope_index for m in model.modules() if hasattr(m, "get_rope_index")), None)

    def __call__(self, packs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
        """`input_ids`, `labels` (1, T), `position_ids` (1, T) or (4, 1, T), the pictures' tensors, `use_cache`.

        Raises TrainingError when nothing in the packs can be trained on.
        """
        return self.row(encode_all(self._encoder, [sample for pack in packs for sample in pack]))

    def row(self, samples: Sequence[Encoded]) -> dict[str, Any]:
        """One row of encoded samples."""
        positions = torch.cat([self._positions(one) for one in samples], dim=-1)
        tensors: dict[str, Any] = {
            "input_ids": torch.cat([one.input_ids_T for one in samples])[None],
            "labels": torch.cat([one.labels_T for one in samples])[None],
            "position_ids": positions if self._rope_index is None else positions[:, None],
            "use_cache": False,
        }
        return tensors | join_pictures([one.picture_tensors for one in samples], rows=False)

    def _positions(self, one: Encoded) -> torch.Tensor:
        """(1, T) from 0, or (4, T): those, then time, height and width."""
        text_1T = torch.arange(len(one))[None]
        if self._rope_index is None:
            return text_1T
        found_31T, _ = self._rope_index(
            one.input_ids_T[None],
            mm_token_type_ids=token_types(one)[None],
            image_grid_thw=one.picture_tensors.get("image_grid_thw"),
        )
        return torch.cat([text_1T, found_31T[:, 0]])
