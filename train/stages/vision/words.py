"""Stage `words` as a task: the aligner alone, held against the language model's own embeddings of what patches show.

Comes in: samples whose boxes say words, a model whose policies are applied, its processor. Goes out: a `Task` for the
trainer. Must not import `serve`.

What an aligner learns through a frozen language model need not look like words: the embedded model's put out vectors
53 times as long as an embedding and at right angles to that of the word they stood for, and circuits that the language
model has for words (finding a word again, saying what stood beside it) did not answer to them. Here a patch in a box
is to be the embedding of the box's word, and a patch that shows nothing that of a line's end. The language model never
runs.
Shape suffixes: B pictures, N patches of each, O boxes, W words, H the width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from noria.errors import TrainingError, UnsupportedModel
from noria.modules import Architecture
from noria.records import Json
from train.methods.policies import Applied
from train.stages.vision.heads import assign, dense_patches
from train.stages.vision.task import LabelledTask
from train.stages.vision.views import Views

NOTHING = "\n"
"""What a patch says that shows nothing."""
_NOTHING_WEIGHT = 0.15  # most patches show nothing; what they say matters less


class WordsTask(LabelledTask):
    """The aligner over a frozen tower, against words."""

    def _model(self, processor: Any) -> nn.Module:
        words = self.vocabulary.words
        if not words:
            raise TrainingError(
                f"stage {self._stage.name!r}: no box says a word; it needs objects in its rows", code="no_data"
            )
        tokenizer = getattr(processor, "tokenizer", processor)
        return AlignerAgainstWords(self._applied, self._views, *embeddings(self._applied.model, tokenizer, words))

    def report(self) -> Json:
        """Which words were taught."""
        return {"words": list(self.vocabulary.words)}


class AlignerAgainstWords(nn.Module):
    """A whole model of which the tower and the aligner run."""

    words_WH: torch.Tensor
    nothing_H: torch.Tensor

    def __init__(self, applied: Applied, views: Views, words_WH: torch.Tensor, nothing_H: torch.Tensor) -> None:
        super().__init__()
        self.model = applied.model
        self._views = views
        self._path = aligner_path(applied.architecture)
        self.register_buffer("words_WH", words_WH, persistent=False)
        self.register_buffer("nothing_H", nothing_H, persistent=False)

    def forward(
        self, pixels: Mapping[str, torch.Tensor], true: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The squared distance to the embeddings, in variances of one: a mean over patches, summed over pictures.

        `accuracy/words`: of the patches with a word, those that are nearest to its embedding by cosine.
        """
        boxes_BO4, words_BOW = true["boxes"], true["words"]
        dense = dense_patches(self._views.patches(pixels), len(boxes_BO4))
        said_BNH = self.model.get_submodule(self._path)(dense.features_BND).float()
        if said_BNH.shape[:2] != dense.features_BND.shape[:2] or said_BNH.shape[-1] != len(self.nothing_H):
            raise UnsupportedModel(f"{self._path} does not give one vector a patch: kind 'words' cannot train it")
        owner_BN = assign(dense.centres_BN2, dense.there_BN, boxes_BO4)
        picture_B1 = torch.arange(len(owner_BN), device=owner_BN.device)[:, None]
        shows_BN = owner_BN >= 0
        share_BNW = functional.normalize(words_BOW[picture_B1, owner_BN.clamp(min=0)], p=1, dim=-1)
        true_BNH = torch.where(shows_BN[..., None], share_BNW @ self.words_WH, self.nothing_H)
        each_BN = (said_BNH - true_BNH).square().mean(-1) / self.words_WH.var()
        asked_BN = dense.there_BN & shows_BN.any(1, keepdim=True)  # a picture without boxes says nothing of its patches
        weight_BN = torch.where(shows_BN, 1.0, _NOTHING_WEIGHT) * asked_BN
        loss = (each_BN * weight_BN / dense.there_BN.sum(1, keepdim=True)).sum()
        with torch.no_grad():
            known = functional.normalize(torch.cat([self.words_WH, self.nothing_H[None]]), dim=-1)
            nearest = (functional.normalize(said_BNH[shows_BN], dim=-1) @ known.T).argmax(-1)
            right = share_BNW[shows_BN].argmax(-1) == nearest
        return loss, {"accuracy/words": float(right.float().mean())} if len(right) else {}


def embeddings(model: Any, tokenizer: Any, words: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, H) and (H,): each word as the language model reads it inside a sentence, and a patch without one.

    A word of several tokens is their mean; the blank before it is left out where that makes fewer.
    """
    table = model.get_input_embeddings().weight.detach().float()

    def read(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rows = [table[min((read(f" {word}"), read(word)), key=len)].mean(0) for word in words]
    return torch.stack(rows), table[read(NOTHING)].mean(0)


def aligner_path(architecture: Architecture) -> str:
    """The aligner's place in the model. Raises UnsupportedModel where it is not one submodule."""
    subtrees = [prefix.rstrip(".") for prefix in architecture.prefixes("aligner", "hf") if prefix.endswith(".")]
    if len(subtrees) != 1:
        raise UnsupportedModel(f"{architecture.name}: its aligner is {len(subtrees)} subtrees: kind 'words' needs one")
    return subtrees[0]
