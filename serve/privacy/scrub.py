"""Makes records fit to be kept: patterns redacted, metadata cut to the allowed keys, all of it counted.

Comes in: completions from capture's writer thread, what people write in feedback. Goes out: the same without what is
not to be kept. Never on the event loop: it takes milliseconds for a long text. Must not import vllm.

A choice that changed is stored without its token ids and log-probabilities, and a changed prompt without its token
ids: those would give the text back. Training reads the text.
"""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from typing import Any

from noria.records import BLOB_SCHEME, Choice, Completion
from noria.settings import PrivacySettings
from serve.capture.record import prompt_hash
from serve.privacy.redact import Redactor, redactor_of

AS_IT_IS = frozenset({"type", "role", "id", "tool_call_id"})
"""Keys whose values, where they are text, say nothing of anybody, and must stay what they are."""
PICTURE = re.compile(BLOB_SCHEME + r"[0-9a-f]{64}|data:[\w/+.;=-]*;base64,[A-Za-z0-9+/=]*")


class Scrubber:
    """Applies `privacy.redact` and `privacy.metadata_keys`. Safe from several threads."""

    def __init__(self, settings: PrivacySettings, redactor: Redactor | None = None) -> None:
        """Raises SettingsError where redaction is asked for and its library is not installed."""
        self._redactor = redactor or redactor_of(settings)
        self._keys = None if settings.metadata_keys is None else frozenset(settings.metadata_keys)
        self._lock = threading.Lock()
        self._redacted: Counter[str] = Counter(dict.fromkeys(settings.redact, 0))
        self._dropped = 0

    @property
    def redacted(self) -> dict[str, int]:
        """How many of each kind were replaced since the start."""
        with self._lock:
            return dict(self._redacted)

    @property
    def metadata_dropped(self) -> int:
        """How many pairs of metadata were not kept since the start."""
        with self._lock:
            return self._dropped

    def completion(self, completion: Completion) -> Completion:
        """The record as it may be stored; its prompt's hash is that of what is stored."""
        metadata = self.metadata(completion.metadata)
        if self._redactor is None:
            return dataclasses.replace(completion, metadata=metadata)
        messages = self._any(completion.messages)
        params = self._any(completion.params)
        changes: dict[str, Any] = {}
        if messages != completion.messages or params.get("tools") != completion.params.get("tools"):
            changes = {"prompt_hash": prompt_hash(list(messages), params.get("tools")), "prompt_token_ids": ()}
        return dataclasses.replace(
            completion,
            messages=messages,
            params=params,
            choices=tuple(map(self._choice, completion.choices)),
            metadata=metadata,
            **changes,
        )

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """The allowed pairs, their values redacted."""
        kept = {key: value for key, value in metadata.items() if self._keys is None or key in self._keys}
        with self._lock:
            self._dropped += len(metadata) - len(kept)
        return {key: self._words(value) for key, value in kept.items()}

    def words(self, text: str | None) -> str | None:
        """What somebody wrote, redacted."""
        return None if text is None else self._words(text)

    def _choice(self, choice: Choice) -> Choice:
        text, said = self._words(choice.text), choice.message.get("content") == choice.text
        message = self._any({key: one for key, one in choice.message.items() if not (said and key == "content")})
        if said:
            message = {key: text if key == "content" else message[key] for key in choice.message}  # counted once
        if text == choice.text and message == choice.message:
            return choice
        return dataclasses.replace(choice, text=text, message=message, token_ids=(), logprobs=())

    def _any(self, value: Any) -> Any:
        """The same JSON with every text in it redacted; references to pictures are no text."""
        if isinstance(value, str):
            return value if PICTURE.fullmatch(value) else self._words(value)
        if isinstance(value, dict):
            return {key: self._under(key, one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(map(self._any, value))
        return value

    def _under(self, key: str, value: Any) -> Any:
        if isinstance(value, str) and key in AS_IT_IS:
            return value
        return self._arguments(value) if isinstance(value, str) and key == "arguments" else self._any(value)

    def _arguments(self, text: str) -> str:
        """A tool call's, JSON as text: its values first, for a pattern in the text may begin inside an escape."""
        try:
            said = json.loads(text)
            redacted = self._any(said)
        except (ValueError, RecursionError):
            return self._words(text)
        changed = json.dumps(redacted, ensure_ascii=False, separators=(",", ":"))
        return self._words(text if redacted == said else changed)

    def _words(self, text: str) -> str:
        if self._redactor is None or not text:
            return text
        redacted, found = self._redactor.redact(text)
        if found:
            with self._lock:
                self._redacted.update(found)
        return redacted
