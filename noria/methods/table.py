"""The one table of job methods: which part of the settings belongs to each, and what each learns from.

Comes in: a method's name. Goes out: its row, or a refusal of settings that it would ignore.
Must not import torch or pydantic: the command line reads it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from noria.errors import SettingsError

PreferenceMethod = Literal["dpo", "simpo", "orpo", "cpo", "kto", "mpo"]
JobMethod = Literal[PreferenceMethod, "grpo"]
Judgements = Literal["preferences", "thumbs"]
Reads = Literal[Judgements, "prompts"]
PREFERENCE_KINDS: tuple[PreferenceMethod, ...] = get_args(PreferenceMethod)  # of a recipe's stages, too
LABELLED_KINDS: tuple[Literal["vision", "words"], ...] = ("vision", "words")
"""Kinds of a recipe's stages that read pictures with labels, and no conversations."""
_OF_JUDGEMENTS = ("preferences", "min_pairs")  # keys under `train`: which of the store's, and how many at least


@dataclass(frozen=True)
class MethodRow:
    """`sections`: those under `train` that this method alone reads. `reads`: what it learns from.

    Judgements are of the store, and each trains once unless asked for again. Prompts may be anybody's; their answers
    are sampled and rewarded, and nothing is used up.
    """

    sections: tuple[str, ...]
    reads: Reads = "preferences"

    @property
    def keys(self) -> tuple[str, ...]:
        """What it reads under `train` and not every method does."""
        return self.sections if self.reads == "prompts" else (*self.sections, *_OF_JUDGEMENTS)


METHODS: Mapping[str, MethodRow] = {
    "dpo": MethodRow(("dpo",)),
    "simpo": MethodRow(("simpo",)),
    "orpo": MethodRow(("orpo",)),
    "cpo": MethodRow(("cpo",)),
    "kto": MethodRow(("kto",), reads="thumbs"),
    "mpo": MethodRow(("mpo",)),
    "grpo": MethodRow(("grpo", "reward"), reads="prompts"),
}


def reads_of(method: str) -> Reads | None:
    """What a job of this method learns from; nothing for one that has no row, as `recipe`."""
    row = METHODS.get(method)
    return None if row is None else row.reads


def started_by(method: str) -> Judgements:
    """The unused judgements of which enough start an automatic job: those it reads, or preferences if it reads none."""
    return "thumbs" if reads_of(method) == "thumbs" else "preferences"


def refuse_foreign(method: str, settings: Iterable[str]) -> None:
    """Raises SettingsError, naming both keys, for a key of a job's settings that only other methods read."""
    for key in settings:
        readers = [name for name, row in METHODS.items() if key in row.keys]
        if readers and method not in readers:
            own = " and ".join(f"settings.{section}" for section in METHODS[method].sections)
            raise SettingsError(
                f"settings.{key} would be ignored: method={method!r} reads {own}; drop it, or ask for "
                f"method={' or '.join(map(repr, readers))}",
                param=f"settings.{key}",
            )
