"""A small sampling engine: words by a rule, one token a beat, with the adapters that were loaded.

Comes in: what `serve.sampling` asks of an engine. Goes out: the same, told by hash, so that tests know the answer.
It complains where the real one would die: an adapter that is not loaded, or whose folder is gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from noria.errors import InvalidRequest, Unavailable
from noria.records import Json
from serve.sampling.ports import Draw, LoadedAdapter, Piece, Prepared

END = 2  # the token that ends a turn
LONGEST = 24  # tokens of a sample that ends by itself
IMAGE, IMAGE_TOKENS = 4, 3  # a picture's placeholder, and how often it stands for one


@dataclass
class FakeSamplingEngine:
    """An engine whose samples follow from prompt, adapter and seed. `beat_s` is the time of a token.

    `faults` are errors, each of which the next sample meets instead of its first token.
    """

    tempered: bool = True
    context_tokens: int = 200
    beat_s: float = 0.0
    loaded: dict[int, LoadedAdapter] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    running: dict[str, asyncio.Event] = field(default_factory=dict)
    most_running: int = 0
    aborted: list[str] = field(default_factory=list)
    faults: list[Exception] = field(default_factory=list)
    prepared: int = 0

    async def prepare(self, messages: Sequence[Json]) -> Prepared:
        """A token a letter, and each picture's placeholder three times."""
        self.prepared += 1
        ids = [1]
        for message in messages:
            content = message.get("content")
            if not isinstance(content, str | list):
                raise InvalidRequest("messages: content must be text or parts", param="messages")
            parts: list[Json] = [{"type": "text", "text": content}] if isinstance(content, str) else content
            for part in parts:
                picture = part.get("type") == "image_url"
                ids += [IMAGE] * IMAGE_TOKENS if picture else [10 + ord(letter) % 90 for letter in part["text"]]
        return Prepared(tuple(ids), json.dumps(list(messages), sort_keys=True))

    async def sample(
        self, prepared: Prepared, said: Sequence[int], draw: Draw, request_id: str, adapter: LoadedAdapter | None
    ) -> AsyncGenerator[Piece, None]:
        """Token t of a sample is told by the hash of prompt, adapter, seed and t, so that it goes on where it was."""
        if adapter is not None and (self.loaded.get(adapter.number) != adapter or not adapter.path.is_dir()):
            raise AssertionError(f"{adapter.name} is not loaded: the real engine would end")
        if self.faults:
            raise self.faults.pop(0)
        stop = self.running[request_id] = asyncio.Event()
        self.most_running = max(self.most_running, len(self.running))
        try:
            for number in range(len(said), len(said) + draw.max_tokens):
                await asyncio.sleep(self.beat_s)
                if stop.is_set():
                    yield Piece((), (), "abort")
                    return
                token = END if number >= LONGEST else rule(prepared.payload, adapter, draw.seed, number)
                last = number + 1 == len(said) + draw.max_tokens
                reason = "stop" if token == END else "length" if last else None
                yield Piece((token,), (-token / 100 / (draw.temperature or 1.0),), reason)
                if reason:
                    return
        finally:
            del self.running[request_id]

    async def abort(self, request_id: str) -> None:
        """Ends a sample before its next token."""
        self.aborted.append(request_id)
        if request_id in self.running:
            self.running[request_id].set()

    async def load(self, adapter: LoadedAdapter) -> None:
        """Takes it, unless one of that name was ever here."""
        if adapter.name in self.names:
            raise Unavailable(f"{adapter.name} was here before: its keys and values still are")
        self.names.append(adapter.name)
        self.loaded[adapter.number] = adapter

    async def unload(self, adapter: LoadedAdapter) -> None:
        """Forgets it; its folder has to be there still."""
        assert adapter.path.is_dir()
        del self.loaded[adapter.number]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The ids as words, without the end of the turn."""
        return " ".join(str(token) for token in token_ids if token != END)


def rule(payload: str, adapter: LoadedAdapter | None, seed: int | None, number: int) -> int:
    """The token at one place of a sample."""
    name = adapter.name.rpartition("/")[2] if adapter else ""
    digest = hashlib.sha256(json.dumps([payload, name, seed, number]).encode()).digest()
    return 3 + digest[0] % 90
