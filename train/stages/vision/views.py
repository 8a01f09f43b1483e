"""What the tower makes of a picture: one vector a patch, and where in the picture each patch lies.

Comes in: pictures, a loaded model, its processor. Goes out: pixels, and `Patches`. Must not import `serve`.

Towers come in two kinds. *Flat* ones (CLIP, SigLIP, InternViT, Idefics) see a square of fixed size; here the whole
picture in one view, without the tiles that some processors cut. *Gridded* ones (Qwen) see every patch of a picture of
any size, in the order of their merge blocks and windows. The vectors are those that the aligner would read.
Shape suffixes: B pictures, P patches of all of them, D the tower's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image as Pillow

from noria.errors import TrainingError, UnsupportedModel
from noria.modules import Architecture

Window = tuple[float, float, float, float]
WHOLE_PICTURE: Window = (0.0, 0.0, 1.0, 1.0)
_ONE_VIEW = {"crop_to_patches": False, "do_image_splitting": False}  # InternVL's and Idefics3's words for no tiles


@dataclass(frozen=True)
class Patches:
    """`features_PD`; `picture_P` is the number of the picture of each patch; `centres_P2` are x and y in 0..1."""

    features_PD: torch.Tensor
    picture_P: torch.Tensor
    centres_P2: torch.Tensor


class Views:
    """Pictures as one model's tower takes them."""

    def __init__(self, model: Any, architecture: Architecture, processor: Any) -> None:
        self._config = model.config
        self._tower = tower_of(model, architecture)
        self._images: Any = getattr(processor, "image_processor", None)
        if self._images is None:
            raise TrainingError(f"{type(processor).__name__} has no image processor", code="no_processor")

    @property
    def width(self) -> int:
        """D, the length of a patch's vector."""
        with torch.no_grad():
            pixels = self.pixels([Pillow.new("RGB", (64, 64))])
            where = next(self._tower.parameters())
            found = self.patches({name: value.to(where.device) for name, value in pixels.items()})
        return int(found.features_PD.shape[1])

    def pixels(self, pictures: Sequence[Pillow.Image]) -> dict[str, torch.Tensor]:
        """What the tower eats, as the model's own image processor makes it."""
        asked = {name: value for name, value in _ONE_VIEW.items() if hasattr(self._images, name)}
        nested = "do_image_splitting" in asked
        given: Any = [[one] for one in pictures] if nested else list(pictures)
        made = self._images(images=given, return_tensors="pt", **asked)
        if "image_grid_thw" in made:
            return {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        pixels = made["pixel_values"]
        return {"pixel_values": pixels[:, 0] if pixels.ndim == 5 else pixels}  # tiled: the first is the whole picture

    def window(self, picture: Pillow.Image) -> Window:
        """The part of the picture that the tower sees, as shares of its width and height; may reach beyond it."""
        cuts = getattr(self._images, "do_center_crop", False) and not hasattr(self._images, "image_grid_pinpoints")
        crop = getattr(self._images, "crop_size", None) if cuts else None
        size = getattr(self._images, "size", None) or {}
        if not crop or not _get(size, "shortest_edge"):
            return WHOLE_PICTURE
        scale = _get(size, "shortest_edge") / min(picture.size)
        half_x = _get(crop, "width") / (2 * picture.width * scale)
        half_y = _get(crop, "height") / (2 * picture.height * scale)
        return (0.5 - half_x, 0.5 - half_y, 0.5 + half_x, 0.5 + half_y)

    def patches(self, pixels: Mapping[str, torch.Tensor]) -> Patches:
        """Runs the tower."""
        weight = next(self._tower.parameters())
        values = pixels["pixel_values"].to(dtype=weight.dtype if weight.is_floating_point() else None)
        if "image_grid_thw" in pixels:
            return self._gridded(values, pixels["image_grid_thw"])
        return self._flat(values)

    def _flat(self, pixels: torch.Tensor) -> Patches:
        layer = getattr(self._config, "vision_feature_layer", None)
        output = self._tower(pixel_values=pixels, output_hidden_states=layer is not None, return_dict=True)
        if layer is None or (layer == -1 and self._config.model_type == "internvl"):
            hidden = output.last_hidden_state
        else:
            layers = [layer] if isinstance(layer, int) else list(layer)
            hidden = torch.cat([output.hidden_states[one] for one in layers], dim=-1)
        side = _patch_side(self._config.vision_config)
        rows, columns = pixels.shape[-2] // side, pixels.shape[-1] // side
        features_BND = hidden[:, -rows * columns :]  # without the class token, which comes first
        count, _, width = features_BND.shape
        y, x = torch.meshgrid(_middles(rows), _middles(columns), indexing="ij")
        centres = torch.stack([x.flatten(), y.flatten()], dim=-1).repeat(count, 1)
        picture = torch.arange(count).repeat_interleave(rows * columns)
        device = hidden.device
        return Patches(features_BND.reshape(-1, width), picture.to(device), centres.to(device))

    def _gridded(self, pixels: torch.Tensor, grid_B3: torch.Tensor) -> Patches:
        from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

        tower = self._tower
        hidden_PD = tower(pixels, grid_thw=grid_B3, return_dict=True).last_hidden_state
        merge = int(tower.spatial_merge_size)
        position_P2 = get_vision_position_ids(grid_B3, merge)
        size_P2 = grid_B3[:, 1:].repeat_interleave(grid_B3.prod(-1), dim=0)
        centres = ((position_P2 + 0.5) / size_P2).flip(-1)
        picture = torch.arange(len(grid_B3), device=grid_B3.device).repeat_interleave(grid_B3.prod(-1))
        if hasattr(tower, "window_size"):  # Qwen2.5-VL hands on its patches in the order of its windows
            index, _ = get_vision_window_index(grid_B3, merge, tower.window_size, tower.patch_size)
            block = merge * merge
            order = (index[:, None] * block + torch.arange(block, device=index.device)).flatten()
            centres, picture = centres[order], picture[order]
        return Patches(hidden_PD, picture.to(hidden_PD.device), centres.to(hidden_PD.device).float())


def tower_of(model: Any, architecture: Architecture) -> Any:
    """The submodule that is the tower: the longest path that all of the tower's parts share."""
    prefixes = [prefix.rstrip(".").split(".") for prefix in architecture.prefixes("vision_tower", "hf")]
    shared = prefixes[0] if len(prefixes) == 1 else _shared(prefixes)
    if len(shared) < 2:
        raise UnsupportedModel(f"{architecture.name}: its vision tower is no one subtree", param="vision_tower")
    return model.get_submodule(".".join(shared))


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    found: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        found.append(parts[0])
    return found


def _middles(count: int) -> torch.Tensor:
    return (torch.arange(count) + 0.5) / count


def _patch_side(vision_config: Any) -> int:
    side = vision_config.patch_size
    return int(side[0] if isinstance(side, (list, tuple)) else side)


def _get(size: Any, name: str) -> int:
    """A side of a processor's size, which is a mapping or an object; 0 where it is not said."""
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return int(value or 0)
