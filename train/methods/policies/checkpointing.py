"""Gradient checkpointing of some modules of a model, and not of the others (Chen et al. 2016,
https://arxiv.org/abs/1604.06174).

Comes in: a transformers model, its row of the module map, modules. Goes out: blocks that keep only their inputs and
are computed again on the way back. transformers' own switch is one for the whole model, a frozen tower included, and
hooks input embeddings; this one turns single layers. Must not import `serve`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from noria.modules import Architecture
from noria.records import Module
from train.methods.frozen import roots


def checkpoint_modules(model: Any, architecture: Architecture, modules: Collection[Module]) -> None:
    """Turns checkpointing on for some modules: their blocks, or the whole of what has none (an aligner)."""
    again = partial(checkpoint, use_reentrant=False)  # the other kind wants inputs that require gradients
    for module in modules:
        for _, root in roots(model, architecture, [module]):
            layers = [one for one in root.modules() if isinstance(one, GradientCheckpointingLayer)]
            for layer in layers:
                layer._gradient_checkpointing_func = again
                layer.gradient_checkpointing = True
            if not layers and module == "aligner":
                root.forward = partial(again, root.forward)
            root.train(root.training)  # a frozen root lets only such layers believe that they train


@contextmanager
def checkpointing_off(model: Any) -> Iterator[None]:
    """Nothing is computed again inside: for passes without gradients. Keeps what it found."""
    layers = [
        one for one in model.modules() if isinstance(one, GradientCheckpointingLayer) and one.gradient_checkpointing
    ]
    try:
        for layer in layers:
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True
