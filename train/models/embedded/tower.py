"""How the embedded model's tower begins: not trained, but made so that it learns fast.

Comes in: a tensor's name. Goes out: its first values, the same on every machine.
Two of them are not random. A patch is embedded as its lowest frequencies, each scaled to about unit variance: raw
pixels are mostly brightness, under which edges are lost. Positions are sines and cosines of row and column, as in
Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), in two dimensions. Together they took left and right on
held-out scenes from 62 % to 99 % within the same 1000 steps.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PICTURE_SIZE, PATCH_SIZE, TOWER_WIDTH, TOWER_LAYERS, TOWER_HEADS = 96, 16, 192, 6, 3
PATCHES = (PICTURE_SIZE // PATCH_SIZE) ** 2
HIDDEN_ACT = "quick_gelu"
TOWER = "vision_tower.vision_model."
ONES = -1.0
"""The standard deviation of what is not random but one."""
_INNER = 4 * TOWER_WIDTH
_RESIDUAL = 0.3  # what a layer adds to the stream at first, beside a plain linear
_POSITION = 0.7  # amplitude of the position's waves
# Brightness, red against green, yellow against blue: standard deviation of a coefficient at frequency 0, after CLIP's
# normalisation; it falls with the frequency. Fitted on drawn scenes.
_OPPONENTS = (((1.0, 1.0, 1.0), 10.0), ((1.0, -1.0, 0.0), 3.0), ((1.0, 1.0, -2.0), 5.0))
_FALL, _NOISE_FLOOR = 1.65, 0.1


def random_shapes() -> list[tuple[str, tuple[int, ...], float]]:
    """The tower's random and constant tensors: name, shape, standard deviation (0 for zeros, `ONES` for ones)."""
    width = TOWER_WIDTH
    rows: list[tuple[str, tuple[int, ...], float]] = [(TOWER + "embeddings.class_embedding", (width,), 1.0)]
    norms = [TOWER + "pre_layrnorm", TOWER + "post_layernorm"]
    for layer in range(TOWER_LAYERS):
        prefix = f"{TOWER}encoder.layers.{layer}."
        norms += [prefix + "layer_norm1", prefix + "layer_norm2"]
        for name, outputs, inputs, gain in (
            *((f"self_attn.{side}_proj", width, width, 1.0) for side in "qkv"),
            ("self_attn.out_proj", width, width, _RESIDUAL),
            ("mlp.fc1", _INNER, width, 1.0),
            ("mlp.fc2", width, _INNER, _RESIDUAL),
        ):
            rows += [(f"{prefix}{name}.weight", (outputs, inputs), gain * inputs**-0.5)]
            rows += [(f"{prefix}{name}.bias", (outputs,), 0.0)]
    for norm in norms:
        rows += [(norm + ".weight", (width,), ONES), (norm + ".bias", (width,), 0.0)]
    return rows


def made_tensors() -> dict[str, torch.Tensor]:
    """The patch embedding (width, 3, 16, 16) and the positions (1 + 36, width), the class token's first."""
    return {
        TOWER + "embeddings.patch_embedding.weight": _patch_embedding(),
        TOWER + "embeddings.position_embedding.weight": _positions(),
    }


def _patch_embedding() -> torch.Tensor:
    import torch

    place = torch.arange(PATCH_SIZE, dtype=torch.float64) + 0.5
    waves = [
        torch.cos(math.pi * place * step / PATCH_SIZE) * math.sqrt((2 if step else 1) / PATCH_SIZE)
        for step in range(PATCH_SIZE)
    ]
    pairs = sorted(
        ((row, column) for row in range(PATCH_SIZE) for column in range(PATCH_SIZE)),
        key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair),
    )
    filters = []
    for row, column in pairs[: TOWER_WIDTH // len(_OPPONENTS)]:
        for colours, deviation in _OPPONENTS:
            mix = torch.tensor(colours, dtype=torch.float64)
            expected = deviation * (1 + math.hypot(row, column)) ** -_FALL + _NOISE_FLOOR
            filters.append((mix / mix.norm())[:, None, None] * waves[row][:, None] * waves[column] / expected)
    return torch.stack(filters).float()


def _positions() -> torch.Tensor:
    import torch

    side = PICTURE_SIZE // PATCH_SIZE
    rates = math.pi * torch.logspace(-0.5, math.log10(side / 2), TOWER_WIDTH // 4, dtype=torch.float64)
    middles = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    waves = [wave(axis.reshape(-1, 1) * rates) for axis in (y, x) for wave in (torch.sin, torch.cos)]
    return torch.cat([torch.zeros(1, TOWER_WIDTH), _POSITION * torch.cat(waves, dim=1).float()])
