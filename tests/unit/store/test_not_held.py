"""What no database column can hold is the caller's mistake, not a bug."""

from __future__ import annotations

import pytest

from noria.errors import InvalidRequest, NotFound
from noria.records import Side
from noria.store import Store
from tests.unit.store.samples import completion


@pytest.mark.parametrize("index", [2**63, 2**64 - 1, -(2**63) - 1])
def test_an_index_beyond_64_bits_is_refused(store: Store, index: int) -> None:
    """It names no choice, whichever way the database says so."""
    store.add_completions([completion("c-1")])
    with pytest.raises(InvalidRequest):
        store.add_preference(Side("c-1", index), Side("c-1", 0))
    with pytest.raises(InvalidRequest):
        store.add_feedback("c-1", index, thumb="up")


def test_an_id_that_no_column_can_hold_names_nothing(store: Store) -> None:
    """NUL and halves of surrogate pairs are in no id."""
    for id_ in ("pref_\x00", "pref_\ud800"):
        with pytest.raises((InvalidRequest, NotFound)):
            store.get_preference(id_)
