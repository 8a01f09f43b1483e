"""Tiny random models of every family of the module map, and one batch that shows each of them a picture.

Comes in: a family of `tests.tiny_families`. Goes out: a model of two blocks and two layers on the CPU, and the
tensors of its forward, image placeholders counted by the model itself. Nothing is downloaded, no processor is needed.
"""

from __future__ import annotations

from typing import Any

from noria.modules import Architecture, architecture_of
from tests.tiny_families import FAMILIES, random_model

IMAGE_ID = 5  # the placeholder's id in the tiny vocabulary of 64
TOKEN_IDS = {
    "image_token_id": IMAGE_ID,
    "image_token_index": IMAGE_ID,
    "video_token_id": 6,
    "video_token_index": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}

__all__ = ["FAMILIES", "architecture", "batch", "tiny"]


def tiny(family: str, seed: int = 0, **changes: Any) -> Any:
    """A family's tiny model, its weights drawn from `seed`, its tokens inside the tiny vocabulary."""
    import torch

    torch.manual_seed(seed)
    model = random_model(family, **changes)
    for name, value in TOKEN_IDS.items():
        if hasattr(model.config, name):
            setattr(model.config, name, value)
    return model


def architecture(model: Any) -> Architecture:
    """The model's row of the map."""
    return architecture_of({**model.config.to_dict(), "architectures": [type(model).__name__]})


def batch(family: str, model: Any, seed: int = 0) -> dict[str, Any]:
    """Two rows, each a picture and eight words; `labels` are -100 up to the last four."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    pictures = _pictures(family, generator)
    with torch.no_grad():
        features = model.model.get_image_features(**pictures).pooler_output
    each = (
        sum(len(one) for one in features) if isinstance(features, (list, tuple)) else features.flatten(0, -2).shape[0]
    )
    tokens = torch.randint(10, 64, (2, 8), generator=generator)
    placeholders = torch.full((2, each // 2), IMAGE_ID)
    ids = torch.cat([tokens[:, :2], placeholders, tokens[:, 2:]], dim=1)
    labels = ids.clone()
    labels[:, :-4] = -100
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **pictures}
    if family.startswith("qwen"):
        made["mm_token_type_ids"] = (ids == IMAGE_ID).long()
    return made


def _pictures(family: str, generator: Any) -> dict[str, Any]:
    import torch

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    if family.startswith("qwen"):
        return {"pixel_values": draw(2 * 16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    if family in ("llava_next", "llava_onevision"):
        return {"pixel_values": draw(2, 3, 3, 16, 16), "image_sizes": torch.tensor([[16, 16]] * 2)}  # whole, two tiles
    if family in ("idefics3", "smolvlm"):
        return {"pixel_values": draw(2, 1, 3, 16, 16), "pixel_attention_mask": torch.ones(2, 1, 16, 16).bool()}
    return {"pixel_values": draw(2, 3, 16, 16)}
