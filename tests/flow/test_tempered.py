"""vLLM's own sampler, taught: sampling's rows at their temperature, users' rows and all draws as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from serve.engine.worker.tempered import temper

IDS = ["chatcmpl-1-ab", "sample-x-0-0-cd", "sample-x-1-0-ef", "sample-y-0-0-01", "cmpl-sample-2"]
TEMPERATURES = [0.3, 0.5, 1.0, 0.0, 2.0]
VOCABULARY = 50


def runner(mode: Any = "raw_logprobs", **more: Any) -> Any:
    """What the hook reads of a model runner: five requests, three of sampling's."""
    requests = {
        id_: SimpleNamespace(sampling_params=SimpleNamespace(temperature=t))
        for id_, t in zip(IDS, TEMPERATURES, strict=True)
    }
    batch = SimpleNamespace(req_ids=list(IDS))
    return SimpleNamespace(sampler=Sampler(mode), input_batch=batch, requests=requests, **more)


def metadata(rows: int) -> SamplingMetadata:
    """Seeded rows with nucleus sampling, the log-probability of the sampled token asked for."""
    penalties = torch.zeros(rows)
    return SamplingMetadata(
        temperature=torch.tensor(TEMPERATURES[:rows]),
        all_greedy=False,
        all_random=False,
        top_p=torch.full((rows,), 0.9),
        top_k=None,
        generators={row: torch.Generator().manual_seed(row) for row in range(rows)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=penalties,
        presence_penalties=penalties,
        repetition_penalties=penalties + 1,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def drawn(sampler: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampled tokens and their log-probabilities."""
    out = sampler(logits=logits.clone(), sampling_metadata=metadata(len(logits)))
    return out.sampled_token_ids[:, 0].long(), out.logprobs_tensors.logprobs[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_sampling_s_rows_are_taken_at_their_temperature(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(0))).to(dtype)
    plain = drawn(runner().sampler, logits)
    taught = runner()
    assert temper(taught) and temper(taught)  # the second time changes nothing
    tokens, logprobs = drawn(taught.sampler, logits)
    assert torch.equal(tokens, plain[0])
    for row, temperature in enumerate((1.0, 0.5, 1.0, 1.0, 1.0)):  # greedy is told at 1, users are raw
        expected = torch.log_softmax(logits[row].float() / temperature, dim=-1)[tokens[row]]
        assert float(logprobs[row]) == pytest.approx(float(expected), abs=1e-5)
    for row in (0, 2, 3, 4):
        assert float(logprobs[row]) == pytest.approx(float(plain[1][row]), abs=1e-6)


def test_a_batch_without_them_and_a_scored_prompt_stay_as_they_are() -> None:
    taught = runner()
    temper(taught)
    logits = torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn(taught.sampler, logits)[1], drawn(runner().sampler, logits)[1])
    scored = torch.randn(7, VOCABULARY)
    assert torch.equal(taught.sampler.compute_logprobs(scored), Sampler.compute_logprobs(scored))


def test_what_cannot_be_taught_says_so() -> None:
    assert not temper(runner("processed_logprobs"))
    assert not temper(runner(speculative_config=object()))
    assert not temper(SimpleNamespace())
    assert not temper(SimpleNamespace(sampler=lambda: None))  # the newer runner's is another class
