"""Looks over the values of a request, whichever wire they came by: how deep, how many, which numbers, which media.

Comes in: plain JSON values. Goes out: nothing, or `Fault` naming the place. Must not import vllm.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from noria.settings import InputSettings

MOST_INT = 2**64  # exclusive, either side; what is larger fits no field of any route
NOT_MEDIA = frozenset({"tools", "functions", "response_format", "structured_outputs", "metadata", "extra_body"})
MEDIA_URLS = ("image_url", "video_url", "audio_url")
MEDIA = frozenset({*MEDIA_URLS, "image_pil", "input_audio", "image_embeds", "audio_embeds", "video_embeds"})  # vLLM's
Path = tuple[str | int, ...]


class Fault(Exception):
    """What is wrong with a value. `reason` is a word for programs, `param` the value's place."""

    def __init__(self, reason: str, message: str, path: Path) -> None:
        super().__init__(message)
        self.reason = reason
        self.param = dotted(path)


def check_tree(root: Any, limits: InputSettings) -> None:
    """Raises Fault for the first value that is not let in. Bytes (gRPC's pictures) count as one value."""
    elements = pictures = 0
    waiting: list[tuple[Path, Any]] = [((), [root])]  # lists and objects alone: a prompt may be 100,000 token ids
    while waiting:
        path, holder = waiting.pop()
        elements += len(holder)
        if elements > limits.max_elements:
            said = f"the body has more than {limits.max_elements} values (input.max_elements)"
            raise Fault("body_elements", said, ())
        if isinstance(holder, dict) and not NOT_MEDIA.intersection(path[1:2]):
            pictures += _check_part(path[1:], holder)
        if pictures > limits.images.max_count:
            said = f"the request has more than {limits.images.max_count} pictures (input.images.max_count)"
            raise Fault("image_count", said, path[1:2])
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, dict | list):
                waiting.append(((*path, key), value))
                if len(path) >= limits.max_depth:
                    said = f"the body nests deeper than {limits.max_depth} (input.max_depth)"
                    raise Fault("body_depth", said, path[1:5])
            elif isinstance(value, float | int):
                _check_number((*path[1:], key), value)
            elif isinstance(value, str) and "\0" in value:
                place = (*path[1:], key)
                raise Fault("body_text", f"{dotted(place)} holds a NUL, which no store keeps", place)
            if isinstance(key, str) and "\0" in key:
                raise Fault("body_text", "a key holds a NUL, which no store keeps", path[1:])


def _check_number(path: Path, value: float) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise Fault("body_number", f"{dotted(path)} is no finite number", path)
    if isinstance(value, int) and not -MOST_INT < value < MOST_INT:
        raise Fault("body_number", f"{dotted(path)} does not fit into 64 bits", path)


def walk(root: Any) -> Iterator[tuple[Path, Any]]:
    """Every value with its place, in the order of the text; without recursion, so that depth cannot end it."""
    waiting: list[tuple[Path, Any]] = [((), root)]
    while waiting:
        path, value = waiting.pop()
        yield path, value
        if isinstance(value, Mapping):
            waiting += [((*path, key), inner) for key, inner in reversed(list(value.items()))]
        elif isinstance(value, list):
            waiting += [((*path, index), inner) for index, inner in reversed(list(enumerate(value)))]


def is_picture(part: Mapping[str, Any]) -> bool:
    """Whether an object is a picture in a conversation, in any of the shapes that OpenAI's and Anthropic's APIs have.

    A JSON schema with a property of that name is none: its value is an object without `url`.
    """
    if part.get("type") == "image":
        return isinstance(part.get("source"), Mapping)
    if "image_url" not in part:
        return part.get("type") == "input_image" or isinstance(part.get("image"), Mapping)  # the latter is gRPC's
    url = part["image_url"]
    return url is None or isinstance(url, str) or (isinstance(url, Mapping) and "url" in url)


def place_of(root: Any, url: str) -> str | None:
    """Where in a body a picture's URL stands; Anthropic's base64 stands without the head of the URL. None: nowhere."""
    for path, value in walk(root):
        if isinstance(value, str) and value and (value == url or url.endswith(f",{value}")):
            return dotted(path)
    return None


def dotted(path: Path) -> str:
    """`messages.0.content.1`. Keys are the client's: they are cut, and a letter that is none to look at becomes `?`."""
    said = ".".join(str(part)[:64] for part in path)
    return "".join(letter if letter.isprintable() else "?" for letter in said) or "body"


def _check_part(path: Path, part: Mapping[str, Any]) -> int:
    """How many pictures this object is: 1 or 0."""
    if "mm_hashes" in part:
        raise Fault("media_tensors", f"{dotted(path)} brings a picture as tensors: send the picture", path)
    picture = is_picture(part)
    if part.get("uuid") is not None and (picture or any(part[key] is None for key in MEDIA & part.keys())):
        said = f"{dotted(path)}: uuid names what others may have sent, and is not taken: send the picture"
        raise Fault("media_uuid", said, path)
    if len(path) == 4 and path[::2] == ("messages", "content"):
        kinds = [key for key in MEDIA_URLS if part.get(key) is not None]
        kind = part.get("type") or "".join(kinds)
        if kinds and (len(kinds) > 1 or kind not in (*kinds, "input_image")):
            said = f"{dotted(path)} is of type {str(kind)[:64]!r} and has {' and '.join(kinds)}: it must be one thing"
            raise Fault("media_kind", said, path)
    return int(picture)
