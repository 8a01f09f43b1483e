"""Makes a stored completion of what was taken down.

Comes in: a `Captured`. Goes out: a `noria.records.Completion`, its pictures in the blobs. Runs in the writer thread,
because it decodes base64, hashes and serialises. Must not import vllm.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from noria.records import Choice, Completion, Json
from serve.capture.images import BlobSink, strip_images
from serve.capture.tape import Captured, ChoiceTape

APART = {"messages", "model", "user", "metadata", "store", "request_id"}  # kept in fields of their own, or not at all


def to_completion(captured: Captured, blobs: BlobSink) -> Completion:
    """The record of one answer. Raises what the blobs raise; nothing is written to the store here."""
    body = captured.request.model_dump(mode="json", by_alias=True, exclude_unset=True)
    messages, images = strip_images(body.get("messages") or [], blobs, captured.replaced)
    metadata = body.get("metadata")
    version = captured.trace.version
    choices = _choices(captured)
    return Completion(
        id=captured.id,
        created_at=captured.created_at,
        model=captured.model,
        model_version=version.id if version else "",
        messages=tuple(messages),
        params={key: value for key, value in body.items() if key not in APART},
        prompt_hash=prompt_hash(messages, body.get("tools")),
        choices=choices,
        images=tuple(images),
        prompt_token_ids=tuple(captured.prompt_token_ids),
        end_user=body.get("user"),
        metadata={str(key): str(value) for key, value in metadata.items()} if isinstance(metadata, dict) else {},
        usage=_usage(captured, choices),
        system_fingerprint=captured.trace.fingerprint,
        ttft_s=captured.ttft_s,
        duration_s=captured.duration_s,
        finished=captured.finished,
        key_id=captured.key_id,
    )


def prompt_hash(messages: list[Json], tools: Any = None) -> str:
    """SHA-256 (hex) of the canonical JSON of messages and tools: equal for equal questions, whatever the sampling.

    Canonical: keys sorted, no spaces, UTF-8. Pictures count by content, for the messages hold their hashes.
    """
    canonical = json.dumps(
        {"messages": messages, "tools": tools or None}, sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    return hashlib.sha256(canonical.encode()).hexdigest()


def _choices(captured: Captured) -> tuple[Choice, ...]:
    answered: dict[int, Json] = {}
    if captured.response is not None:
        for one in captured.response.model_dump(mode="json", include={"choices"})["choices"]:
            answered[one["index"]] = one
    elif captured.chunks is not None:
        answered = _assemble(captured.chunks)
    return tuple(_choice(tape, answered.get(index, {})) for index, tape in sorted(captured.choices.items()))


def _choice(tape: ChoiceTape, answered: Json) -> Choice:
    text = "".join(tape.texts)
    message = {key: value for key, value in (answered.get("message") or {}).items() if value not in (None, [])}
    message = {"role": "assistant", "content": None if message.get("tool_calls") else text, **message}
    content = message["content"]
    return Choice(
        index=tape.index,
        text=content if isinstance(content, str) else text,
        message=message,
        token_ids=tuple(tape.token_ids),
        logprobs=_logprobs(tape),
        finish_reason=answered.get("finish_reason") or tape.finish_reason,
    )


def _logprobs(tape: ChoiceTape) -> tuple[float, ...]:
    """The chosen tokens' log-probabilities in nats, or none at all where one is missing."""
    if len(tape.logprobs) != len(tape.token_ids):
        return ()
    values = []
    for token_id, entry in zip(tape.token_ids, tape.logprobs, strict=True):
        chosen = entry.get(token_id) if entry is not None else None
        if chosen is None:
            return ()
        values.append(chosen.logprob if math.isfinite(chosen.logprob) else -9999.0)
    return tuple(values)


def _usage(captured: Captured, choices: tuple[Choice, ...]) -> Json:
    usage = getattr(captured.response, "usage", None)
    if usage is not None:
        dumped: Json = usage.model_dump(mode="json", exclude_none=True)
        return dumped
    prompt, completion = len(captured.prompt_token_ids), sum(len(choice.token_ids) for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _assemble(chunks: list[str]) -> dict[int, Json]:
    """Puts the deltas of streamed events together into one message for each choice."""
    choices: dict[int, Json] = {}
    for chunk in chunks:
        payload = chunk.removeprefix("data: ").strip()
        if not payload.startswith("{"):
            continue
        for part in json.loads(payload).get("choices") or []:
            choice = choices.setdefault(part["index"], {"message": {"role": "assistant", "content": ""}})
            choice["finish_reason"] = part.get("finish_reason") or choice.get("finish_reason")
            _merge(choice["message"], part.get("delta") or {})
    for choice in choices.values():
        if choice["message"].get("tool_calls") and not choice["message"]["content"]:
            choice["message"]["content"] = None
    return choices


def _merge(message: Json, delta: Json) -> None:
    for key in ("content", "reasoning", "refusal"):
        if delta.get(key):
            message[key] = (message.get(key) or "") + delta[key]
    for call in delta.get("tool_calls") or []:
        calls = message.setdefault("tool_calls", [])
        while len(calls) <= call["index"]:
            calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        entry, function = calls[call["index"]], call.get("function") or {}
        entry["id"] = call.get("id") or entry["id"]
        entry["function"]["name"] += function.get("name") or ""
        entry["function"]["arguments"] += function.get("arguments") or ""
