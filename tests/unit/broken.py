"""Models that go wrong in training: a weight that is no number, a gradient without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from train.methods.policy_model import load_policy


def with_nan(tiny_vlm: Path, folder: Path) -> Path:
    """The tiny model with one weight of its last layer that is no number."""
    folder.mkdir()
    for path in tiny_vlm.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def poisoned(*args: Any, **more: Any) -> Any:
    """In place of `load_policy`: the loss is finite and its gradient is not, by a factor on the way back only."""
    model = load_policy(*args, **more)
    norm = model.model.language_model.norm
    norm.register_full_backward_hook(lambda module, grads, _: tuple(g * float("inf") for g in grads))
    return model
