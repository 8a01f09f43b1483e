"""The policy as an adapter beside the live version: made of what trains, put under a fresh name, deleted after.

Comes in: the trained model's LoRA, the LoRAs of the job's earlier stages. Goes out: an adapter that the engine takes.
Must not import `serve`.

The engine serves the job's parent; what a stage before this one learnt is not in it. Two LoRAs on one linear are one of
the sum of their ranks: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2]. So a `grpo` stage behind a `dpo` stage samples
from both. The engine reads one rank and one scale for all linears: scales go into B, and missing rows are zeros.

Shapes: O, I are a linear's output and input features, R a LoRA's rank.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from noria.errors import Conflict, NoriaError, TrainingError
from noria.modules import Architecture
from train.export.gptq_format import to_torch
from train.methods.delta import LORA, LORA_CONFIG, Change, changes
from train.methods.grpo.sampling.patience import Patience
from train.methods.grpo.sampling.protocol import Sampler
from train.methods.policies import ADAPTER, Applied

NAME = "name"
Factors = tuple[torch.Tensor, torch.Tensor]
"""(A of (R, I), B of (O, R)), their scale within B, float32 on the CPU."""


def factors(applied: Applied) -> dict[str, Factors]:
    """What trains now, by linear."""
    found = {}
    for path in applied.scopes["language_model"].linears:
        layer = applied.model.get_submodule(path)
        a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        found[path] = (a_RI.detach().float().cpu(), b_OR.detach().float().cpu() * layer.scaling[ADAPTER])
    return found


def earlier_factors(deltas: Sequence[Path], architecture: Architecture) -> dict[str, Factors]:
    """What the job's earlier stages learnt, by linear. Raises Conflict where that is no LoRA of the language model."""
    found: dict[str, Factors] = {}
    for name, change in changes(deltas, architecture).items() if deltas else ():
        linear = name.removesuffix(".weight")
        if change.full is not None or not architecture.lm_linears([name]):
            raise Conflict(
                f"an earlier stage trained {name}, which the live engine does not have: GRPO samples from an adapter "
                "of the language model beside the live version. Roll that training out first, and run GRPO on it",
                code="not_an_adapter",
            )
        found[linear] = _joined(change)
    return found


def write_adapter(parts: Sequence[Mapping[str, Factors]], folder: Path) -> int:
    """peft's two files for the sum of several LoRAs; returns its rank."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted({name for part in parts for name in part})
    together = {name: _stacked([part[name] for part in parts if name in part]) for name in names}
    rank = max(int(a_RI.shape[0]) for a_RI, _ in together.values())
    tensors = {}
    for name, (a_RI, b_OR) in together.items():
        missing = rank - a_RI.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.nn.functional.pad(a_RI, (0, 0, 0, missing))
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.nn.functional.pad(b_OR, (0, missing))
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / LORA, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": names, "bias": "none"}
    (folder / LORA_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return rank


class Policy:
    """The adapter that is loaded now. Names are `PREFIX-uN`, N the updates that it has seen; a prefix serves one run.

    Its name stands in `folder`/name before it is loaded, so that the next attempt can delete what a killed one left.
    """

    def __init__(
        self,
        sampler: Sampler,
        applied: Applied,
        earlier: Mapping[str, Factors],
        patience: Patience,
        *,
        version: str,
        prefix: str,
        folder: Path,
        tell: Callable[[str], None],
    ) -> None:
        self.version = version
        self.update = 0
        self._name: str | None = None
        self._sampler = sampler
        self._applied = applied
        self._earlier = earlier
        self._patience = patience
        self._prefix = prefix
        self._folder = folder
        self._tell = tell

    @property
    def name(self) -> str:
        """The adapter's name. Raises TrainingError when none is loaded."""
        if self._name is None:
            raise TrainingError("no adapter of the policy is loaded")
        return self._name

    def put(self, update: int) -> None:
        """Loads the weights as they are now, in place of those before; waits for a server."""
        self.delete()
        write_adapter([one for one in (self._earlier, factors(self._applied)) if one], self._folder)
        name = f"{self._prefix}-u{update}"
        (self._folder / NAME).write_text(name)
        self._name, self.update = name, update  # before it is loaded: what fails half-way is deleted, too
        self._patience(lambda: self._sampler.put_adapter(name, self._folder, self.version))

    def delete(self) -> None:
        """Unloads it. A server that is gone holds it no more, one that cannot be reached until its lease ends."""
        name, self._name = self._name, None
        if name is not None:
            self._forget(name)

    def delete_left(self) -> None:
        """Unloads what an attempt that was killed left behind."""
        left = self._folder / NAME
        if left.is_file():
            self._forget(left.read_text().strip())

    def _forget(self, name: str) -> None:
        try:
            self._sampler.delete_adapter(name)
        except NoriaError as error:
            self._tell(f"adapter {name} could not be deleted, its lease will end it: {error.message}")
        shutil.rmtree(self._folder, ignore_errors=True)


def _joined(change: Change) -> Factors:
    pairs = [(to_torch(one.lora_a_RI).float(), to_torch(one.lora_b_OR).float() * one.scale) for one in change.factors]
    return _stacked(pairs)


def _stacked(pairs: Sequence[Factors]) -> Factors:
    return torch.cat([a_RI for a_RI, _ in pairs]), torch.cat([b_OR for _, b_OR in pairs], dim=1)
