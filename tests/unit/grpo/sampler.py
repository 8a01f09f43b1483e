"""A sampler in this process: a plain loop over full logits of the tiny model, an adapter added to its weights.

Comes in: a checkpoint, an adapter's folder. Goes out: groups, as the serving engine would give them. What it computes
is the reference for the trainer's numbers: one sequence at a time, no cache, no padding, prompts tokenised by the
processor with the pictures' placeholders expanded.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from noria.errors import NoriaError, NotFound, Superseded
from noria.records import Json
from noria.sampling.records import Drawing, Group, Sample
from train.data.render import ChatRenderer, decode_image
from train.methods.delta import LORA, LORA_CONFIG
from train.methods.policy_model import load_policy, load_processor, read_architecture

_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids")


class TinySampler:
    """Holds at most one adapter. `fail` is called before each prompt and may raise what a server would.

    `noise` is added to recorded log-probabilities, token by token in turn: another engine's rounding, by so much.
    Samples end after `lengths` tokens in turn, as if they had said that they end: a random model hardly ever does.
    """

    def __init__(
        self,
        checkpoint: Path,
        version: str = "v1",
        *,
        noise: Sequence[float] = (0.0,),
        lengths: Sequence[int] = (3, 99, 1, 4),
        model: Any = None,
    ) -> None:
        self.live = version
        self.noise = noise
        self.lengths = lengths
        self.fail: Callable[[int], None] = lambda prompt: None
        self.loaded: dict[str, dict[str, torch.Tensor]] = {}
        self.names: list[str] = []
        self.given: list[Group] = []
        self.asked: list[tuple[int, Drawing, str | None]] = []
        self.processor = load_processor(checkpoint)
        self.model = model or load_policy(checkpoint, [], read_architecture(checkpoint), torch.float32).eval()
        self._renderer = ChatRenderer(self.processor)
        self._weights = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        self._eos = self.processor.tokenizer.eos_token_id

    def version(self) -> str:
        """What serves."""
        return self.live

    def put_adapter(self, name: str, folder: Path, version: str) -> None:
        """Keeps the adapter's weights."""
        if version != self.live:
            raise Superseded(f"{self.live} serves, not {version}")
        assert name not in self.names, "a name is never used twice"
        assert not self.loaded, "the one before is deleted first"
        assert '"r"' in (folder / LORA_CONFIG).read_text()
        self.names.append(name)
        self.loaded[name] = load_file(folder / LORA)

    def delete_adapter(self, name: str) -> None:
        """Forgets it."""
        self.loaded.pop(name, None)

    def sample(
        self,
        prompts: Iterable[Sequence[Json]],
        drawing: Drawing,
        *,
        adapter: str | None = None,
        version: str | None = None,
    ) -> Iterator[Group]:
        """Groups, the last prompt's first: their order means nothing."""
        if version not in (None, self.live):
            raise Superseded(f"{self.live} serves, not {version}")
        if adapter is not None and adapter not in self.loaded:
            raise NotFound(f"no adapter {adapter!r}", code="adapter_not_found")
        self._set(self.loaded[adapter] if adapter else {})
        for place, messages in reversed(list(enumerate(prompts))):
            self.fail(place)
            self.asked.append((place, drawing, adapter))
            try:
                group = self._group(place, messages, drawing, adapter)
            except NoriaError as error:
                group = Group(place, tuple(messages), "here", error=error.message)
            self.given.append(group)
            yield group

    def logps(self, inputs: dict[str, Any], answer: Sequence[int], temperature: float) -> torch.Tensor:
        """log p of each of an answer's tokens, from full logits of the whole sequence."""
        return answer_logps(self.model, inputs, answer, temperature)

    def inputs(self, messages: Sequence[Json]) -> dict[str, Any]:
        """A prompt's tensors by the processor."""
        pictures = [_decoded(part) for turn in messages for part in _parts(turn) if part["type"] == "image_url"]
        text = self._renderer.prompt(messages)
        return dict(self.processor(text=[text], images=pictures or None, return_tensors="pt", add_special_tokens=False))

    def _group(self, place: int, messages: Sequence[Json], drawing: Drawing, adapter: str | None) -> Group:
        inputs = self.inputs(messages)
        samples = []
        for index in range(drawing.n):
            chance = torch.Generator().manual_seed((drawing.seed or 0) * 1009 + place * 101 + index)
            samples.append(self._sample(index, inputs, drawing, chance))
        ids = tuple(inputs["input_ids"][0].tolist())
        return Group(
            prompt=place,
            messages=tuple(messages),
            address="here",
            version=self.live,
            adapter=adapter,
            prompt_token_ids=ids,
            logprobs_temperature=drawing.temperature,
            samples=tuple(samples),
        )

    def _sample(self, index: int, inputs: dict[str, Any], drawing: Drawing, chance: torch.Generator) -> Sample:
        ids: list[int] = []
        logprobs: list[float] = []
        end = self.lengths[index % len(self.lengths)]
        while len(ids) < min(end, drawing.max_tokens) and (not ids or ids[-1] != self._eos):
            logp = next_logps(self.model, inputs, ids, drawing.temperature)
            token = int(torch.multinomial(logp.exp(), 1, generator=chance))
            ids.append(token)
            logprobs.append(float(logp[token]) + self.noise[(len(ids) - 1) % len(self.noise)])
        reason = "length" if len(ids) == drawing.max_tokens and ids[-1] != self._eos else "stop"
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Sample(index, text, tuple(ids), tuple(logprobs), reason)

    def _set(self, adapter: dict[str, torch.Tensor]) -> None:
        """The checkpoint's weights plus the adapter's B A; alpha is r in what the trainer writes."""
        added = {
            name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): name
            for name in adapter
            if name.endswith(".lora_A.weight")
        }
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self._weights[name])
                a = added.get(name.removesuffix(".weight"))
                if a is not None:
                    parameter.add_(adapter[a.replace("lora_A", "lora_B")] @ adapter[a])


def next_logps(model: Any, inputs: dict[str, Any], said: Sequence[int], temperature: float) -> torch.Tensor:
    """(V,): log-probabilities of the next token."""
    with torch.no_grad():
        return torch.log_softmax(_logits(model, inputs, said)[-1].double() / temperature, dim=-1)


def answer_logps(model: Any, inputs: dict[str, Any], answer: Sequence[int], temperature: float) -> torch.Tensor:
    """(C,): log-probabilities of an answer's tokens, in nats, in float64."""
    with torch.no_grad():
        logits = _logits(model, inputs, answer)[-len(answer) - 1 : -1].double()
    logps = torch.log_softmax(logits / temperature, dim=-1)
    return logps.gather(1, torch.tensor(answer)[:, None])[:, 0]


def _logits(model: Any, inputs: dict[str, Any], said: Sequence[int]) -> torch.Tensor:
    ids = torch.cat([inputs["input_ids"], torch.tensor([list(said)], dtype=torch.long)], dim=1)
    more = {name: value for name, value in inputs.items() if name not in _TOKENS}
    if "mm_token_type_ids" in inputs:
        types = torch.as_tensor(inputs["mm_token_type_ids"])
        more["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, len(said)))
    logits: torch.Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits[0]
    return logits


def _parts(turn: Json) -> list[Json]:
    return turn["content"] if isinstance(turn["content"], list) else []


def _decoded(part: Json) -> Image.Image:
    head, _, body = part["image_url"]["url"].partition(",")
    assert head.startswith("data:image/"), head
    return decode_image(BytesIO(base64.b64decode(body)).getvalue())
