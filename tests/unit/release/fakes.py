"""A small engine that satisfies `serve.release.ports.Engine`, and versions whose weights are a few numbers.

Comes in: a registry. Goes out: published versions with a probe, and an engine whose scores follow what is loaded.
Must not import torch or vllm.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from noria.registry import ManifestDraft, Registry

# one red pixel
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
LINEAR = "language_model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "text_config": {"hidden_size": 32},
    "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
}


def write_serving(folder: Path, value: float) -> dict[str, np.ndarray[Any, Any]]:
    """A GPTQ-like checkpoint in `folder`; `value` is what its norm holds. Returns the tensors."""
    folder.mkdir(parents=True)
    tensors: dict[str, np.ndarray[Any, Any]] = {
        f"{LINEAR}.qweight": np.full((4, 32), 7, dtype=np.int32),
        f"{LINEAR}.scales": np.full((1, 32), 0.5, dtype=np.float16),
        "language_model.model.norm.weight": np.full((32,), value, dtype=np.float32),
        "vision_tower.patch.weight": np.ones((3, 5), dtype=np.float32),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    return tensors


def publish(registry: Registry, value: float, *, expected: float | None = None, probe: bool = True) -> str:
    """Publishes a version whose every log-probability is -`value`; `expected` is what its probe says instead."""
    staging = registry.begin("fake")
    write_serving(staging / "serving", value)
    if probe:
        logprobs = [-(value if expected is None else expected)] * 2
        prompts = [
            {"prompt_token_ids": [1, 2, 3, 4], "answer_token_ids": [3, 4], "logprobs": logprobs, "image_png": image}
            for image in (None, PNG)
        ]
        (staging / "probe.json").write_text(json.dumps({"tolerance_nats": 0.25, "prompts": prompts}))
    return registry.publish(staging, ManifestDraft(method="test")).id


@dataclass
class FakeEngine:
    """An engine that knows which folder is loaded, what was called, and what is to go wrong.

    `faults` maps a call (`reload v2`, `pause wait`, `zero`) to an error text the worker returns, or an exception.
    """

    loaded: Path
    calls: list[str] = field(default_factory=list)
    faults: dict[str, str | BaseException] = field(default_factory=dict)
    paused: bool = False
    hang_on_pause: bool = False
    nan: bool = False

    async def pause_generation(self, *, mode: Any = "abort", clear_cache: bool = True) -> None:
        assert not clear_cache, "requests at the gate rely on the cache of processed images"
        self._call(f"pause {mode}")
        self.paused = True
        if self.hang_on_pause:
            await asyncio.Event().wait()

    async def resume_generation(self) -> None:
        self._call("resume")
        self.paused = False

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        if method == "zero_kv_cache":
            self._call("zero")
            self.nan = False
            return [None]
        path = Path(args[0])
        assert method == "reload_version" and self.paused, "weights move only under a paused scheduler"
        error = self._call(f"reload {path.parent.name}")
        if error is None:
            self.loaded = path
        return [{"error": error, "seconds": 0.0}]

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        return self._call("reset prefix") is None

    async def reset_encoder_cache(self) -> None:
        self._call("reset encoder")

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str) -> AsyncIterator[Any]:
        self._call("probe image" if "multi_modal_data" in prompt else "probe text")
        assert not self.paused and sampling_params == "scoring"
        ids = prompt["prompt_token_ids"]
        if "multi_modal_data" in prompt:  # the placeholder becomes as many tokens as the image has
            assert prompt["multi_modal_data"]["image"].size == (1, 1)
            ids = [ids[0], 9, 9, 9, *ids[1:]]
        logprob = math.nan if self.nan else -self.weight()
        entries = [None, *({token: SimpleNamespace(logprob=logprob)} for token in ids[1:])]
        yield SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=entries, finished=True)

    def weight(self) -> float:
        """The number that the loaded version's norm holds."""
        return float(load_file(self.loaded / "model.safetensors")["language_model.model.norm.weight"][0])

    def _call(self, name: str) -> str | None:
        self.calls.append(name)
        fault = self.faults.get(name)
        if isinstance(fault, BaseException):
            raise fault
        return fault
