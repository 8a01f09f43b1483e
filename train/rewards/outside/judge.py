"""Reward `judge`: a mark that another model gives, over any OpenAI-compatible address.

Comes in: samples, a rubric. Goes out: marks on a scale from 0 to 1; a failure where nobody answered in time, or the
answer is not exactly what was asked for. Must not import torch or `serve`. Neither the key nor any text is ever logged.

Single-answer grading by a rubric (Zheng et al. 2023, https://arxiv.org/abs/2306.05685, section 3.1). What is judged was
written by the model in training, which is paid for high marks: it stands between lines that it cannot forge, and the
judge is told that nothing in there is said to it. That is a request and no proof: look at samples (`noria sample`).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from noria.errors import NoriaError, SettingsError
from noria.records import Json
from noria.rewards import JudgeOptions
from train.rewards.outside.prompt import mark_of, messages_of, response_format
from train.rewards.protocol import Backing, Failure, Sample, Value

BUSY = frozenset({408, 409, 429})  # and 5xx: another try may help
_RETRIED = (Failure("timeout"), Failure("unavailable"))


class JudgeReward:
    """Asks for one mark a sample, several at a time. Raises SettingsError where the key's variable is not set."""

    name = "judge"

    def __init__(self, options: JudgeOptions, backing: Backing) -> None:
        self._options = options
        self._load_image = backing.load_image
        self._headers: dict[str, str] = {}
        if options.api_key_env is not None:
            key = os.environ.get(options.api_key_env)
            if not key:
                told = f"reward judge: the environment variable {options.api_key_env} holds no key"
                raise SettingsError(told, param="api_key_env")
            self._headers["authorization"] = f"Bearer {key}"

    def __call__(self, samples: Sequence[Sample]) -> list[Value]:
        """0 to 1 each."""
        with ThreadPoolExecutor(1, thread_name_prefix="judge") as aside:  # the caller may be inside a loop of its own
            return aside.submit(asyncio.run, self._all(samples)).result()

    async def _all(self, samples: Sequence[Sample]) -> list[Value]:
        gate = asyncio.Semaphore(self._options.concurrency)
        async with httpx.AsyncClient(headers=self._headers, timeout=None) as client:  # noqa: S113 - bounded as a whole, in _try

            async def one(sample: Sample) -> Value:
                async with gate:
                    return await self._one(client, sample)

            return list(await asyncio.gather(*map(one, samples)))

    async def _one(self, client: httpx.AsyncClient, sample: Sample) -> Value:
        try:
            body = self._body(sample)
        except NoriaError:
            return Failure("unreadable picture")
        pause_s = self._options.backoff_s
        for tries_left in range(self._options.retries, -1, -1):
            answer = await self._try(client, body)
            if answer not in _RETRIED or not tries_left:
                break
            await asyncio.sleep(pause_s)
            pause_s *= 2
        return answer if isinstance(answer, Failure) else mark_of(answer, self._options)

    async def _try(self, client: httpx.AsyncClient, body: Json) -> str | Failure:
        """What the judge wrote."""
        try:
            async with asyncio.timeout(self._options.timeout_s):  # httpx's own limits are for each read, not for all
                response = await client.post(f"{self._options.url.rstrip('/')}/chat/completions", json=body)
        except TimeoutError:
            return Failure("timeout")
        except httpx.HTTPError:
            return Failure("unavailable")
        if response.status_code in BUSY or response.status_code >= 500:
            return Failure("unavailable")
        if not response.is_success:
            return Failure(f"refused {response.status_code}")
        try:
            text: Any = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return Failure("no completion")
        return text if isinstance(text, str) else Failure("no completion")

    def _body(self, sample: Sample) -> Json:
        """The request. Raises TrainingError for a picture that cannot be read."""
        options = self._options
        return {
            "model": options.model,
            "messages": messages_of(sample, options, self._load_image),
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            **response_format(options),
        }
