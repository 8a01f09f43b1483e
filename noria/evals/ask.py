"""Asks a server all questions of a set, several at a time, over `/v1/chat/completions`.

Comes in: where a server is, the version that must answer, questions. Goes out: one `Reply` a question, in order. What
is asked is never kept: every request says `store: false`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import httpx

from noria.client import error_of
from noria.errors import Conflict, InvalidRequest, Unavailable, UnsupportedModel
from noria.evals.questions import Question, content_of
from noria.records import Json
from noria.tls import Trust

PAUSES_S = (1.0, 4.0)  # before the second and the third try of a request that found nobody
LONGEST_WAIT_S = 60.0  # a server that asks for more has to be asked again by whoever started the evaluation
TIMEOUT_S = 600.0  # one answer, its wait in the queue included


@dataclass(frozen=True)
class Target:
    """A server, and the version that is to answer. `through` is `live` for the home's server, `aside` for our own."""

    url: str
    version: str
    through: str
    api_key: str | None = None
    trust: Trust = Trust()  # noqa: RUF009  frozen

    @property
    def verify(self) -> Any:
        """httpx's `verify`. Raises SettingsError for files of `trust` that cannot be used."""
        return self.trust.context() if self.url.startswith("https:") else True


@dataclass(frozen=True)
class Reply:
    """What came back: the text, or the reason for which the server refused this question (too long, for example)."""

    text: str = ""
    finish_reason: str | None = None
    tokens: int | None = None
    error: str | None = None
    fingerprint: str | None = None


def ask_all(
    target: Target, questions: Sequence[Question], sampling: Json, *, concurrency: int, tick: Callable[[], None]
) -> list[Reply]:
    """Every question's reply; `sampling` is sent with each; `tick` is called once a reply.

    Raises Conflict when another version answers, Unavailable when nobody does; what was under way is dropped then.
    """
    headers = {"authorization": f"Bearer {target.api_key}"} if target.api_key else {}
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    pool = ThreadPoolExecutor(concurrency, thread_name_prefix="eval")
    client = httpx.Client(base_url=target.url, headers=headers, timeout=TIMEOUT_S, limits=limits, verify=target.verify)

    def one(question: Question) -> Reply:
        reply = _ask(client, target, question, sampling)
        tick()
        return reply

    try:
        futures = [pool.submit(one, question) for question in questions]
        for future in as_completed(futures):
            future.result()  # the first that fails ends the rest
        return [future.result() for future in futures]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        client.close()


def _ask(client: httpx.Client, target: Target, question: Question, sampling: Json) -> Reply:
    body = {"messages": [{"role": "user", "content": content_of(question)}], **sampling, "store": False, "n": 1}
    try:
        answer = _post(client, body)
    except (InvalidRequest, UnsupportedModel) as error:
        return Reply(error=" ".join(error.message.split()))
    fingerprint = str(answer.get("system_fingerprint") or "")
    if fingerprint.partition("-")[0] != target.version:
        raise Conflict(
            f"{fingerprint.partition('-')[0] or 'another model'} answered in place of {target.version}: it went live "
            "meanwhile; ask for the evaluation again",
            code="version_changed",
        )
    try:
        choice = answer["choices"][0]
        text = choice["message"].get("content") or ""
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Unavailable(f"{target.url} answered without a choice: is it a Noria server?") from error
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return Reply(text, choice.get("finish_reason"), tokens, fingerprint=fingerprint)


def _post(client: httpx.Client, body: Json) -> Json:
    """The answer's JSON; nobody there, 5xx and 429 are tried twice more, in time. Raises the NoriaError they gave."""
    for pause_s in PAUSES_S:
        try:
            return _once(client, body)
        except Unavailable as error:
            wait_s = error.retry_after_s or 0.0
            if wait_s > LONGEST_WAIT_S:
                raise
            time.sleep(max(pause_s, wait_s))
    return _once(client, body)


def _once(client: httpx.Client, body: Json) -> Json:
    try:
        response = client.post("/v1/chat/completions", json=body)
    except httpx.HTTPError as error:
        reason = f"{type(error).__name__}: {error}"
        raise Unavailable(f"the server at {client.base_url} does not answer: {reason}") from error
    try:
        answer: Any = response.json()
    except ValueError:
        answer = {}
    if response.is_success and isinstance(answer, dict):
        return answer
    refusal = error_of(response.status_code, answer, response.headers.get("retry-after"))
    busy = response.status_code >= 500 or response.status_code == 429
    raise Unavailable(refusal.message, code=refusal.code, retry_after_s=refusal.retry_after_s) if busy else refusal
