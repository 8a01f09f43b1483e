"""The one table of job methods: which part of the settings belongs to each, and what each reads of the store.

Comes in: a method's name. Goes out: its row, or a refusal of settings that it would ignore.
Must not import torch or pydantic: the command line reads it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from noria.errors import SettingsError

PreferenceMethod = Literal["dpo", "simpo", "orpo", "cpo", "kto", "mpo"]
JobMethod = PreferenceMethod
Reads = Literal["preferences", "thumbs"]
PREFERENCE_KINDS: tuple[PreferenceMethod, ...] = get_args(PreferenceMethod)  # of a recipe's stages, too
LABELLED_KINDS: tuple[Literal["vision", "words"], ...] = ("vision", "words")
"""Kinds of a recipe's stages that read pictures with labels, and no conversations."""


@dataclass(frozen=True)
class MethodRow:
    """`sections`: those under `train` that this method alone reads. `reads`: what it learns from in the store."""

    sections: tuple[str, ...]
    reads: Reads = "preferences"


METHODS: Mapping[str, MethodRow] = {
    "dpo": MethodRow(("dpo",)),
    "simpo": MethodRow(("simpo",)),
    "orpo": MethodRow(("orpo",)),
    "cpo": MethodRow(("cpo",)),
    "kto": MethodRow(("kto",), reads="thumbs"),
    "mpo": MethodRow(("mpo",)),
}


def reads_of(method: str) -> Reads | None:
    """What a job of this method takes from the store; nothing for one that has no row, as `recipe`."""
    row = METHODS.get(method)
    return None if row is None else row.reads


def refuse_foreign(method: str, settings: Iterable[str]) -> None:
    """Raises SettingsError, naming both keys, for a section of a job's settings that only another method reads."""
    own = METHODS[method].sections
    owners = {section: name for name, row in METHODS.items() for section in row.sections if section not in own}
    for key in settings:
        if key in owners:
            raise SettingsError(
                f"settings.{key} would be ignored: method={method!r} reads {' and '.join(f'settings.{s}' for s in own)}"
                f"; drop it, or ask for method={owners[key]!r}",
                param=f"settings.{key}",
            )
