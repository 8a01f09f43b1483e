"""In vLLM's worker: log-probabilities of sampling's requests at the temperature that they are drawn at.

Comes in: the worker's model runner. Goes out: whether its sampler could be taught. Only the worker's extension imports
this. Must not import anything of Noria.

vLLM 0.31's `Sampler.forward` takes raw log-probabilities of the logits before anything is done to them. Its `forward`
is wrapped so that `compute_logprobs` sees the rows of sampling's requests divided by their temperature; users' rows
stay as they are to the bit, as does what is sampled. The newer model runner (V2, by default on a GPU) has another
sampler, which is left alone; so is one with speculative decoding, whose rows are not requests.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.sample.sampler import Sampler

PREFIX = "sample-"  # of our request ids; vLLM's handlers give users' requests prefixes of their own
LEAST_TEMPERATURE = 1e-5  # below it vLLM takes the most probable token


def temper(runner: Any) -> bool:
    """Teaches the runner's sampler; False where that is not possible. Done once: a second call changes nothing."""
    sampler: Any = getattr(runner, "sampler", None)
    if type(sampler) is not Sampler or sampler.logprobs_mode != "raw_logprobs":
        return False
    if getattr(runner, "speculative_config", None) is not None:
        return False
    if "forward" not in vars(sampler):
        _wrap(sampler, runner)
    return True


def temperatures(runner: Any, rows: int) -> torch.Tensor | None:
    """What each row's logits are to be divided by, (rows, 1) float32; None where that is 1 for all."""
    ids = runner.input_batch.req_ids[:rows]
    ours = {row: _temperature(runner, id_) for row, id_ in enumerate(ids) if id_ is not None and id_.startswith(PREFIX)}
    if not any(temperature != 1.0 for temperature in ours.values()):
        return None
    by_row = torch.ones(rows, 1, dtype=torch.float32)
    for row, temperature in ours.items():
        by_row[row] = temperature
    return by_row


def _temperature(runner: Any, request_id: str) -> float:
    temperature = float(runner.requests[request_id].sampling_params.temperature)
    return temperature if temperature >= LEAST_TEMPERATURE else 1.0


def _wrap(sampler: Any, runner: Any) -> None:
    plain, compute = sampler.forward, sampler.compute_logprobs
    divisors: list[torch.Tensor] = []  # one while a batch is sampled, none while a prompt is scored

    def compute_logprobs(logits: torch.Tensor) -> torch.Tensor:
        if divisors:
            logits = logits.to(torch.float32) / divisors[0].to(logits.device)
        return compute(logits)

    def forward(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        by_row = temperatures(runner, logits.shape[0])
        if by_row is None:
            return plain(logits, *args, **kwargs)
        divisors.append(by_row)
        try:
            return plain(logits, *args, **kwargs)
        finally:
            divisors.clear()

    sampler.compute_logprobs = compute_logprobs
    sampler.forward = forward
