"""The demo's users: they ask through the OpenAI client library, and one of them never stops asking.

Comes in: a server's URL and questions. Goes out: answers with the versions that gave them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from noria.client.errors import error_of
from noria.evals.questions import Question, content_of

if TYPE_CHECKING:
    from openai import OpenAI

CLIENTS = 8
MAX_TOKENS = 64
PAUSE_S = 4.0  # between two questions of the background user, who shares two cores with the training


@dataclass(frozen=True)
class Answered:
    """One question with its n answers; `version` is the id in the fingerprint."""

    question: Question
    completion_id: str
    version: str
    texts: tuple[str, ...]


def connect(url: str) -> OpenAI:
    """An OpenAI client on the server at `url`. It does not retry: a failed request is counted as one."""
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="demo", max_retries=0, timeout=300)


def ask(client: OpenAI, question: Question, *, n: int, seed: int, user: str, max_tokens: int = MAX_TOKENS) -> Answered:
    """Asks one question for n answers at temperature 0.6. Raises openai.OpenAIError when the server refuses."""
    message: Any = {"role": "user", "content": content_of(question)}
    answer = client.chat.completions.create(
        model="noria",
        messages=[message],
        n=n,
        seed=seed,
        temperature=0.6,
        max_tokens=max_tokens,
        user=user,
    )
    version = (answer.system_fingerprint or "").split("-")[0]
    return Answered(question, answer.id, version, tuple(choice.message.content or "" for choice in answer.choices))


def ask_all(
    client: OpenAI, questions: Sequence[Question], *, n: int, seed: int, tick: Callable[[], None]
) -> list[Answered]:
    """Asks every question, eight at a time; the answers come in the questions' order. `tick` is called for each.

    Raises NoriaError when the server refuses one.
    """
    from openai import APIStatusError

    def one(numbered: tuple[int, Question]) -> Answered:
        index, question = numbered
        try:
            answered = ask(client, question, n=n, seed=seed + index, user=f"demo-user-{index % CLIENTS}")
        except APIStatusError as refused:
            raise error_of(refused.status_code, {"error": refused.body}) from refused
        tick()
        return answered

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, enumerate(questions)))


@dataclass
class BackgroundUser:
    """A user who asks one question after another until stopped, and counts what happens to it.

    `slowest_s` is the longest that one request took, a swap's queueing included.
    """

    client: OpenAI
    questions: Sequence[Question]
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    slowest_s: float = 0.0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="background-user", daemon=True)

    def __enter__(self) -> BackgroundUser:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        from openai import OpenAIError

        turn = 0
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                question = self.questions[turn % len(self.questions)]
                answer = ask(self.client, question, n=1, seed=turn, user="background", max_tokens=16)
            except OpenAIError as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            else:
                self.answered += 1
                self.versions[answer.version] = self.versions.get(answer.version, 0) + 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            turn += 1
            self._stop.wait(PAUSE_S)
