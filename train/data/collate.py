"""Batches of samples for supervised training.

Comes in: samples and an `Encoder`. Goes out: the tensors of a model's forward, labels included.
Must not import `serve`.

Shapes: B samples, T tokens of the longest, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from noria.errors import TrainingError
from train.data.encode import IGNORED, Encoded, Encoder
from train.data.samples import Sample

_PER_ROW = "pixel_attention_mask"  # Idefics3 and SmolVLM hold pictures as (row, number in the row, ...)


class SupervisedCollator:
    """Encodes and pads a batch. Samples that are dropped are counted by the encoder and missing from the batch."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `labels` (B, T) and the pictures' tensors under the processor's names.

        Raises TrainingError when no sample of the batch can be used: measure the data first and train on what is kept.
        """
        return pad(encode_all(self._encoder, samples), self._encoder.pad_id)


def encode_all(encoder: Encoder, samples: Sequence[Sample]) -> list[Encoded]:
    """What is left of a batch. Raises TrainingError when that is nothing."""
    found = [one for one in map(encoder.encode, samples) if one is not None]
    if not found:
        names = ", ".join(sample.source for sample in samples[:5])
        raise TrainingError(f"no sample of a batch can be trained on: {names}", code="no_data")
    return found


def pad(batch: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    """A padded batch of encoded samples."""
    longest = max(map(len, batch))
    tensors: dict[str, Any] = {
        "input_ids": _rows([one.input_ids_T for one in batch], longest, pad_id),
        "attention_mask": _rows([torch.ones_like(one.input_ids_T) for one in batch], longest, 0),
        "labels": _rows([one.labels_T for one in batch], longest, IGNORED),
    }
    if any(one.token_types_T is not None for one in batch):
        tensors["mm_token_type_ids"] = _rows([token_types(one) for one in batch], longest, 0)
    return tensors | join_pictures([one.picture_tensors for one in batch], rows=True)


def token_types(one: Encoded) -> torch.Tensor:
    """(T,): 1 on a picture's tokens, 0 on text."""
    return one.token_types_T if one.token_types_T is not None else torch.zeros_like(one.input_ids_T)


def join_pictures(tensors: Sequence[dict[str, torch.Tensor]], *, rows: bool) -> dict[str, torch.Tensor]:
    """The samples' picture tensors as one batch's: one after the other, sizes filled up with zeros.

    Where a family holds pictures by rows, each sample is a row (`rows`), or all of them are one row, as in a pack.
    """
    names = list(dict.fromkeys(name for one in tensors for name in one))
    if _PER_ROW not in names:
        return {name: _concatenated([one[name] for one in tensors if name in one]) for name in names}
    joined = {}
    for name in names:
        example = next(one[name] for one in tensors if name in one)
        held = [one[name][0] if name in one else example[0, :0] for one in tensors]
        if rows:
            most = max(len(one) for one in held)
            joined[name] = _concatenated([_filled(one, (most, *one.shape[1:]))[None] for one in held])
        else:
            joined[name] = _concatenated([one for one in held if len(one)])[None]
    return joined


def _concatenated(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One after the other along the first axis; the other axes are filled with zeros up to the largest."""
    shape = [max(tensor.shape[axis] for tensor in tensors) for axis in range(1, tensors[0].ndim)]
    return torch.cat([_filled(tensor, (tensor.shape[0], *shape)) for tensor in tensors])


def _filled(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    filled = tensor.new_zeros(shape)
    filled[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return filled


def _rows(tensors: Sequence[torch.Tensor], longest: int, value: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(one, (0, longest - one.shape[0]), value=value) for one in tensors])
