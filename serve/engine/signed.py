"""vLLM's own serving objects, made to sign their answers with the version that gave them.

Comes in: the objects that vLLM's `init_app_state` built. Goes out: the same objects, of a subclass of ours. vLLM
computes one fingerprint and one model root when it starts and never again; after a swap both would be wrong.
Must not import vllm.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

from serve.engine.versions import ServingVersion, VersionGate, current_trace

DATA = "data: {"
FIELD = '"system_fingerprint":'


def adopt(serving: Any, *mixins: type, **attributes: Any) -> None:
    """Puts the mixins in front of the object's class, and sets attributes on it.

    vLLM names its serving classes inside the function that builds them (0.31), so that a subclass cannot be passed
    in; taking the finished object keeps its construction vLLM's own, whatever arguments a later release adds.
    """
    cls = type(serving)
    serving.__class__ = type(f"Noria{cls.__name__}", (*mixins, cls), {})
    for name, value in attributes.items():
        setattr(serving, name, value)


class Signed:
    """Answers carry the fingerprint of the version that the request was admitted to."""

    noria_gate: VersionGate

    @property
    def system_fingerprint(self) -> str:
        """What vLLM's handlers write into responses and last chunks."""
        trace = current_trace.get()
        return (trace.fingerprint if trace else None) or self.noria_gate.current.fingerprint

    @system_fingerprint.setter
    def system_fingerprint(self, value: str | None) -> None:
        """vLLM's own, made of its version and the parallel layout, is not used."""

    def sign_chunk(self, chunk: str) -> str:
        """The server-sent event with the fingerprint in it; `[DONE]`, errors and signed chunks pass as they are.

        A key inside generated text has its quotes escaped, so the search finds only the chunk's own.
        """
        if not chunk.startswith(DATA) or FIELD in chunk or chunk.startswith('data: {"error"'):
            return chunk
        return f'{DATA}{FIELD}"{self.system_fingerprint}",{chunk[len(DATA) :]}'


class SignedCompletions(Signed):
    """Text completions: every streamed chunk is signed, not only the last."""

    async def completion_stream_generator(self, *args: Any, **kwargs: Any) -> AsyncGenerator[str, None]:
        """As vLLM's, signed."""
        chunks = cast(Any, super()).completion_stream_generator(*args, **kwargs)
        try:
            async for chunk in chunks:
                yield self.sign_chunk(chunk)
        finally:
            await chunks.aclose()


def follow_models(models: Any, name: str, gate: VersionGate) -> None:
    """Keeps `/v1/models` true: `name` and the live version's id are served, and their root is that version."""
    path_cls = type(models.base_model_paths[0])

    def rename(version: ServingVersion) -> None:
        paths = [path_cls(name=served, model_path=version.id) for served in dict.fromkeys((name, version.id))]
        models.base_model_paths[:] = paths
        if models.registry.base_model_paths is not models.base_model_paths:
            models.registry.base_model_paths[:] = paths

    rename(gate.current)
    gate.on_change(rename)
