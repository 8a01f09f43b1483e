"""vLLM as sampling needs it: the raw engine behind the gate, and vLLM's own chat handler for the prompt.

Comes in: messages, tokens, adapters. Goes out: pieces of samples. vLLM is imported inside functions only.

What a log-probability is. vLLM 0.31 has one `--logprobs-mode` for the whole engine. Noria leaves it at `raw_logprobs`,
for users' answers and for the probe: log softmax of the model's logits, before temperature, penalties, top_k and top_p.
At temperature 1 that is the policy's own log-probability. At another temperature T the worker is taught, for sampling's
requests alone, to divide the logits by T first (`serve.engine.worker.tempered`), where it can; `tempered` says whether.
top_k and top_p never count: the number is of the whole distribution.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from noria.errors import NoriaError, Unavailable, UnsupportedModel
from noria.records import Json
from serve.api.chat import engine_error, invalid_chat
from serve.sampling.ports import Draw, LoadedAdapter, Piece, Prepared

log = logging.getLogger("noria.sampling")
BELOW_USERS = 2**62  # vLLM's priority: lower is earlier, users have 0
TOKENS_A_PIECE = 16  # nobody reads along, and each piece costs the loop on which users are answered
LEAST = Draw(temperature=1.0, top_p=1.0, top_k=0, max_tokens=1, seed=None)
IMPOSSIBLE = -9999.0  # in place of -inf, which JSON has not


class VllmSamplingEngine:
    """Satisfies `serve.sampling.ports.SamplingEngine`."""

    def __init__(self, engine: Any, state: Any, *, tempered: bool) -> None:
        """`engine` is the raw `AsyncLLM`; `state` is `app.state`, read at each call."""
        self._engine, self._state = engine, state
        self.tempered = tempered
        self.context_tokens: int = engine.model_config.max_model_len

    async def prepare(self, messages: Sequence[Json]) -> Prepared:
        """As vLLM's chat handler renders a chat: same template, same processor."""
        from pydantic import ValidationError
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.serve.engine.protocol import ErrorResponse

        handler = self._state.openai_serving_chat
        if handler is None:
            raise UnsupportedModel("the served model does not answer chats")
        try:
            request = ChatCompletionRequest.model_validate({"messages": list(messages)})
            rendered = await handler.render_chat_request(request)
        except ValidationError as error:
            raise invalid_chat(error) from error
        except NoriaError:
            raise
        except Exception as error:  # vLLM's own table knows which of its errors is whose fault
            raise _as_ours(error) from error
        if isinstance(rendered, ErrorResponse):
            raise engine_error(rendered.model_dump()["error"])
        _, (payload,) = rendered
        if payload["type"] == "multimodal":
            await self._deliver(payload)
        return Prepared(tuple(payload["prompt_token_ids"]), payload)

    async def _deliver(self, payload: Any) -> None:
        """Hands the engine a prompt's pictures now: its samples may wait for their turns, or never come.

        vLLM keeps processed images in two halves that mirror each other (0.31). Ours has these by now, and a user who
        asks about one of them would have only its hash sent; were the engine not to know it, that request would fail.
        """
        request_id = f"sample-pictures-{uuid.uuid4().hex}"
        try:
            await self._engine.add_request(request_id, payload, _parameters(LEAST), priority=BELOW_USERS)
            await self._engine.abort(request_id)
        except Exception as error:  # as above
            raise _as_ours(error) from error

    async def sample(
        self, prepared: Prepared, said: Sequence[int], draw: Draw, request_id: str, adapter: LoadedAdapter | None
    ) -> AsyncGenerator[Piece, None]:
        """One sample, piece by piece, from where it stands."""
        prompt = {**prepared.payload, "prompt_token_ids": [*prepared.prompt_token_ids, *said]}
        outputs = self._engine.generate(
            prompt, _parameters(draw), request_id, lora_request=_lora(adapter), priority=BELOW_USERS
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield _piece(output.outputs[0])
        except NoriaError:
            raise
        except Exception as error:  # as above
            raise _as_ours(error) from error

    async def abort(self, request_id: str) -> None:
        """Ends a request; its generator gives what is left."""
        await self._engine.abort(request_id)

    async def load(self, adapter: LoadedAdapter) -> None:
        """Has the worker read the folder now."""
        try:
            await self._engine.add_lora(_lora(adapter))
        except Exception as error:  # whatever vLLM's loader says
            raise _as_ours(error) from error

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Has the worker forget it."""
        await self._engine.remove_lora(adapter.number)

    def decode(self, token_ids: Sequence[int]) -> str:
        """By the model's tokenizer, special tokens left out."""
        return str(self._engine.tokenizer.decode(list(token_ids), skip_special_tokens=True))


async def sampling_engine(engine: Any, state: Any) -> VllmSamplingEngine:
    """Over a running engine; finds out whether its worker can give log-probabilities at a temperature."""
    tempered = all(await engine.collective_rpc("temper_logprobs"))
    if not tempered:
        log.info("logprobs_at_temperature_1_only")
    return VllmSamplingEngine(engine, state, tempered=tempered)


def _parameters(draw: Draw) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=draw.temperature,
        top_p=draw.top_p,
        top_k=draw.top_k,
        max_tokens=draw.max_tokens,
        seed=draw.seed,
        logprobs=0,  # the sampled token's, and no others
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        stream_interval=TOKENS_A_PIECE,
    )


def _lora(adapter: LoadedAdapter | None) -> Any:
    if adapter is None:
        return None
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=adapter.name, lora_int_id=adapter.number, lora_path=str(adapter.path))


def _piece(part: Any) -> Piece:
    if part.finish_reason == "error":
        raise Unavailable("the engine could not go on with the sample; ask for the group again")
    token_ids = tuple(part.token_ids)
    logprobs = tuple(_finite(entry[token].logprob) for token, entry in zip(token_ids, part.logprobs or [], strict=True))
    return Piece(token_ids, logprobs, part.finish_reason)


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else IMPOSSIBLE


def _as_ours(error: Exception) -> NoriaError:
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    found = engine_error(create_error_response(error).model_dump()["error"])
    return Unavailable(found.message) if type(found) is NoriaError else found  # the engine's fault: once more may do
