"""What is taken out before anything is kept, and how long what is kept stays.

Comes in: a tree. Goes out: `PrivacySettings`, frozen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator

from noria.module_settings import Section

RedactKind = Literal["email", "phone", "card", "key"]


class PrivacySettings(Section):
    """What is taken out before anything is kept, and how long what is kept stays (docs/privacy.md)."""

    retention_days: float | None = Field(None, gt=0)
    """Completions older than this are deleted with everything that hangs on them, in days. None keeps them."""
    retention_count: int | None = Field(None, ge=1)
    """Completions past the newest so many are deleted in the same way. None keeps them."""
    keep_judged: bool = True
    """Keep completions that a preference or feedback refers to, whatever their age; they do not count towards
    retention_count either. False lets retention take judgements too: what they taught stays in the weights."""
    prune_every_s: float = Field(300.0, gt=0)
    """How often the server looks for what is past retention, in seconds."""
    prune_batch: int = Field(100, ge=1, le=1000)
    """Most completions that one transaction deletes: capture waits no longer than that takes."""
    sweep_every_s: float = Field(21600.0, gt=0)
    """How often the server looks for pictures that nothing refers to (a crash may leave one), in seconds."""
    sweep_grace_s: float = Field(3600.0, ge=60)
    """Such a picture is left alone for so long: whoever put it there may be about to refer to it. In seconds."""
    redact: tuple[RedactKind, ...] = ()
    """Patterns replaced by `<EMAIL>`, `<PHONE>`, `<CARD>`, `<KEY>` before anything is stored: any of email, phone,
    card, key. Needs `pip install 'noria[privacy]'`. A changed answer is stored without token ids."""
    phone_regions: tuple[str, ...] = ("US", "GB", "DE", "FR", "IN")
    """Countries (ISO 3166) whose national phone numbers are recognised; those with `+` are in any. Each costs time."""
    metadata_keys: tuple[Annotated[str, StringConstraints(min_length=1, max_length=64)], ...] | None = None
    """Keys of `metadata` that are kept; others are dropped and counted. None keeps all, an empty list none."""

    @field_validator("phone_regions")
    @classmethod
    def _countries(cls, regions: tuple[str, ...]) -> tuple[str, ...]:
        for region in regions:
            if len(region) != 2 or not region.isascii() or not region.isupper():
                raise ValueError(f"{region!r} is no country code such as DE")
        return regions
