"""What an error says fits into gRPC's metadata."""

from __future__ import annotations

import pytest

from serve.api.grpc.calls import MOST_MESSAGE_BYTES, shortened


@pytest.mark.parametrize("text", ["a" * 5000, "\U0001f600" * 2000, "\x00" * 3000, "\ud800" * 3000])
def test_a_long_message_is_cut_in_its_middle(text: str) -> None:
    """Its beginning and its end stay, within the limit, whatever the letters."""
    cut = shortened(text, MOST_MESSAGE_BYTES)
    assert len(cut.encode()) <= MOST_MESSAGE_BYTES + len(" [..] ")
    assert cut.count(" [..] ") == 1


def test_an_ordinary_message_stays() -> None:
    """Nothing of it is touched."""
    assert shortened("temperature: must be at most 2", MOST_MESSAGE_BYTES) == "temperature: must be at most 2"
