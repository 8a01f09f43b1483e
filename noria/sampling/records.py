"""What a trainer asks of a sampling engine and what it gets.

Comes in: the wire's JSON. Goes out: frozen values. Must not import httpx or grpc.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noria.records import Json


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn, as `POST /noria/v1/samples` has it. `top_k` 0 and `top_p` 1 keep every token.

    With anything else the recorded log-probabilities are not those of the distribution that was drawn from: they are
    the whole policy's at `temperature`.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_tokens: int = 256
    seed: int | None = None

    def body(self) -> Json:
        """The request's fields; a seed only where there is one."""
        fields = {key: value for key, value in vars(self).items() if value is not None}
        return dict(fields)


@dataclass(frozen=True)
class Sample:
    """One answer. `logprobs` has one number in nats for each of `token_ids`: log p of the sampled token.

    `token_ids` ends with the end-of-turn token where `finish_reason` is `stop`; with `length` it was cut. `turns` is
    how often it was in the engine: more than once where it gave way to users.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    turns: int = 1


@dataclass(frozen=True)
class Group:
    """The samples of one prompt, all from one version (and adapter, where one was named) of one engine.

    `prompt` is the prompt's place among those that were asked. `prompt_token_ids` are the engine's own, the images'
    placeholders expanded. `logprobs_temperature` is the temperature of the samples' log-probabilities. A prompt that
    the engine refuses (too long, a picture that cannot be read) gives a group without samples and an `error`.
    """

    prompt: int
    messages: tuple[Json, ...]
    address: str
    version: str = ""
    fingerprint: str = ""
    adapter: str | None = None
    prompt_token_ids: tuple[int, ...] = ()
    logprobs_temperature: float = 1.0
    samples: tuple[Sample, ...] = ()
    id: str = ""
    error: str | None = None


def group_of(prompt: int, messages: Sequence[Json], address: str, said: Json) -> Group:
    """The group that a server's answer tells of."""
    samples = [
        Sample(
            index=one["index"],
            text=one["text"],
            token_ids=tuple(one["token_ids"]),
            logprobs=tuple(one["logprobs"]),
            finish_reason=one["finish_reason"],
            turns=one["turns"],
        )
        for one in said["samples"]
    ]
    return Group(
        prompt=prompt,
        messages=tuple(messages),
        address=address,
        version=said["version"],
        fingerprint=said["fingerprint"],
        adapter=said["adapter"],
        prompt_token_ids=tuple(said["prompt_token_ids"]),
        logprobs_temperature=said["logprobs_temperature"],
        samples=tuple(samples),
        id=said["id"],
    )
