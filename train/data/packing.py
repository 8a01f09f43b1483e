"""Many samples in one sequence, as if each were alone: no padding, the same loss.

Comes in: samples, their lengths, the model that will read the packs. Goes out: packs, and batches of one row.
Must not import `serve`.

A packed row has no attention mask and positions that start again at every sample; transformers reads the borders from
them (`masking_utils.find_packed_sequence_indices`, and FlashAttention's variable lengths), so that no token attends to
another sample. That works only without a key-value cache, so the batch says `use_cache=False`. Models with multimodal
rotary positions (Qwen-VL) get four rows of positions: the text's, which mark the borders, and the three that the model
itself computes for each sample alone. The first label of every sample is ignored: what comes before it is another one.

Shapes: T tokens of the row, over all samples in it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, overload

import torch

from noria.errors import SettingsError
from train.data.collate import encode_all, join_pictures, token_types
from train.data.encode import Encoded, Encoder
from train.data.samples import Sample

_WINDOW = 1024  # samples that are fitted together; larger fills better and mixes less


def plan(lengths: Sequence[int], budget: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Which samples share a row of at most `budget` tokens: every sample once, in a seeded random mixture.

    First-fit decreasing over windows of the shuffled samples. Raises SettingsError when a sample is longer than a row.
    """
    if lengths and max(lengths) > budget:
        longest = max(lengths)
        raise SettingsError(f"a pack holds {budget} tokens and a sample has {longest}: raise it", param="max_length")
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)  # noqa: S311 - an order, no secret
    packs: list[tuple[int, ...]] = []
    for start in range(0, len(order), _WINDOW):
        packs += _fit(order[start : start + _WINDOW], lengths, budget)
    random.Random(seed + 1).shuffle(packs)  # noqa: S311
    return packs


class PackedData(Sequence[tuple[Sample, ...]]):
    """The samples as packs: what a data loader draws from, one pack an item."""

    def __init__(self, samples: Sequence[Sample], packs: Sequence[tuple[int, ...]]) -> None:
        """`packs` are numbers of samples, as `plan` gives them for the lengths of these very samples."""
        self._samples = samples
        self._packs = packs

    def __len__(self) -> int:
        """How many packs there are."""
        return len(self._packs)

    @overload
    def __getitem__(self, index: int) -> tuple[Sample, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Sample, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Sample, ...] | list[tuple[Sample, ...]]:
        """A pack's samples, or several packs'."""
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return tuple(self._samples[number] for number in self._packs[index])


class PackedCollator:
    """Encodes packs into one row. Several packs at once make one longer row: a batch size of 1 is meant."""

    def __init__(self, encoder: Encoder, model: Any) -> None:
        """`model` may be wrapped (peft, DDP); only its way to number positions is used."""
        self._encoder = encoder
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


def _fit(numbers: Sequence[int], lengths: Sequence[int], budget: int) -> list[tuple[int, ...]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for number in sorted(numbers, key=lambda one: -lengths[one]):
        place = next((index for index, left in enumerate(room) if left >= lengths[number]), None)
        if place is None:
            packs.append([])
            room.append(budget)
            place = len(packs) - 1
        packs[place].append(number)
        room[place] -= lengths[number]
    return [tuple(pack) for pack in packs]
