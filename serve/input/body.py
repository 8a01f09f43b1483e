"""JSON as bytes to values, so that whatever parses it afterwards meets no surprise.

Comes in: a body's bytes. Goes out: its values, or `Fault`. Must not import vllm.

What is not let in: text that is not UTF-8, halves of surrogate pairs, NaN and Infinity, a key that an object has twice
(two readers would see two requests), what nests or branches beyond the limits. Unknown fields are the routes' matter.
"""

from __future__ import annotations

from typing import Any

import jiter

from noria.settings import InputSettings
from serve.input.tree import Fault, check_tree

COUNTED_FROM = 2**20  # bytes: a smaller body cannot hold so many values that its memory matters
COMMA, BRACKET, BRACE, QUOTE = 0x2C, 0x5B, 0x7B, 0x22


def read_body(data: bytes, limits: InputSettings) -> Any:
    """The values of a body, or of a JSON text in a message. Raises Fault."""
    if len(data) > COUNTED_FROM:
        _check_branches(data, limits)
    try:
        value = jiter.from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise Fault("body_json", f"this is not JSON: {error}", ()) from error
    check_tree(value, limits)
    return value


def _check_branches(data: bytes, limits: InputSettings) -> None:
    """Before the parser makes an object of each: a value follows a comma or opens a list or an object.

    Those inside of texts count at first; only a body that would have too many then is looked at again without texts.
    """
    if _branches(data) > limits.max_elements and _branches(_without_texts(data)) > limits.max_elements:
        said = f"the body has more than {limits.max_elements} values (input.max_elements)"
        raise Fault("body_elements", said, ())


def _branches(data: bytes) -> int:
    import numpy as np

    letters = np.frombuffer(data, dtype=np.uint8)
    return int(sum(np.count_nonzero(letters == letter) for letter in (COMMA, BRACKET, BRACE)))


def _without_texts(data: bytes) -> bytes:
    """What stands outside of quotes, escapes taken into account, and zeros for what stands inside."""
    import numpy as np

    letters = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), dtype=np.uint8)
    inside = np.logical_xor.accumulate(letters == QUOTE)
    return bytes(letters * ~inside)
