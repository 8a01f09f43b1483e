"""The manifest: what one published version is, and the hash of every file in its folder.

Comes in: what the pipeline knows of a version. Goes out: `Manifest` values and their exact bytes.
Must not import torch, vllm, fastapi or the store.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from noria.errors import IntegrityError
from noria.records import Json, VersionState
from noria.records import Version as VersionRecord

MANIFEST = "manifest.json"


class _Part(BaseModel):
    """Frozen, and open to fields that a later Noria adds."""

    model_config = ConfigDict(extra="allow", frozen=True)


class Base(_Part):
    """The full-precision checkpoint at the root of the lineage."""

    name: str
    path: str
    """Folder, relative to NORIA_HOME: `masters/NAME`."""
    sha256: str | None = None
    kind: Literal["master", "dequantised"] = "master"
    """`dequantised` where the user had only a quantised base."""


class FileEntry(_Part):
    """One file of the version's folder."""

    sha256: str
    size: int
    """Bytes."""


class ManifestDraft(_Part):
    """What the pipeline says of a version; the registry adds id, time and files."""

    parent: str | None = None
    base: Base | None = None
    method: str
    job: str | None = None
    snapshot: str | None = None
    modules: dict[str, Any] = Field(default_factory=dict)
    """Module -> its policy in training; of several stages, the last under which it trained."""
    stages: list[Json] = Field(default_factory=list)
    """Of a recipe: each stage's name, policies, settings, data with their hash, and curve."""
    architecture: str | None = None
    quantization: Json = Field(default_factory=dict)
    """Bits, group size and the rest of the GPTQ checkpoint's settings."""
    calibration: Json = Field(default_factory=dict)
    """Recipe, completion ids and hashes."""
    metrics: Json = Field(default_factory=dict)
    gate: Json | None = None
    frozen: dict[str, str] = Field(default_factory=dict)
    """Module that training left as the parent's -> `sha256:..` over its serving tensors."""


class Manifest(ManifestDraft):
    """A published version."""

    format: Literal[1] = 1
    id: str
    created_at: float
    files: dict[str, FileEntry]
    """Path relative to the folder -> hash and size; the manifest itself is not among them."""
    _raw: bytes | None = PrivateAttr(None)

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Self:
        """Reads a manifest's bytes and keeps them. Raises IntegrityError, naming `where`."""
        try:
            made = cls.model_validate(json.loads(raw))
        except (ValueError, ValidationError) as error:
            raise IntegrityError(f"{where}: not a manifest: {error}") from error
        made._raw = raw
        return made

    def raw(self) -> bytes:
        """The bytes as they stand in manifest.json: as read, or as they will be written."""
        if self._raw is not None:
            return self._raw
        return (json.dumps(self.model_dump(mode="json"), indent=2, sort_keys=True) + "\n").encode()

    def sha256(self) -> str:
        """The hash of manifest.json; it covers the hash of every file."""
        return hashlib.sha256(self.raw()).hexdigest()

    def record(self, state: VersionState = "candidate") -> VersionRecord:
        """The version's row in the store."""
        return VersionRecord(
            id=self.id,
            parent=self.parent,
            state=state,
            method=self.method,
            job=self.job,
            created_at=self.created_at,
            metrics=dict(self.metrics),
            frozen=dict(self.frozen),
        )


def fingerprint(manifest: Manifest) -> str:
    """What answers are signed with: the id and the start of the manifest's hash, `v7-1a2b3c4d`."""
    return f"{manifest.id}-{manifest.sha256()[:8]}"
