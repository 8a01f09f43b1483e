"""Our own export (`noria prefs export`): lines of pictures, completions and preferences, each on lines above it.

Comes in: lines in their order. Goes out: a conversation for each preference with a direction; pictures are kept as they
come, and completions remembered for whether an answer was cut. These conversations are users': a picture that one of
them named and that was not stored is never fetched. Must not import torch, transformers or `serve`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import replace
from typing import Any

from noria.errors import InvalidRequest
from noria.records import BLOB_SCHEME, Json, image_references
from train.data.formats.pictures import Pictures, Place
from train.data.formats.turns import Conversation, conversation, read_turns

FRAME = ("header", "end", "feedback")  # say nothing of a preference's texts
KINDS = ("image", "completion", "preference", *FRAME)
FORMATS = (1, 2)  # from 2 on the header alone names it


class ExportReader:
    """Reads the lines of one file; holds what later lines refer to."""

    def __init__(self) -> None:
        self._cut: set[tuple[str, int]] = set()

    def parse(self, row: Json, place: Place) -> list[Conversation]:
        """What a line gives: nothing for pictures, completions and preferences without a direction.

        Raises InvalidRequest on a line of another version, damaged bytes, a pair without its texts or stored pictures.
        """
        if row.get("kind") not in KINDS or row.get("format", FORMATS[-1]) not in FORMATS:
            raise InvalidRequest(f"kind {row.get('kind')!r} in format {row.get('format')!r} is no line of an export")
        if row["kind"] == "image":
            self._keep(row, place)
        elif row["kind"] == "completion":
            self._remember(row)
        elif row.get("verdict") == "chosen":
            return [self._pair(row, place)]
        return []

    def _keep(self, row: Json, place: Place) -> None:
        try:
            data = base64.b64decode(row["data"], validate=True)
        except (KeyError, TypeError, binascii.Error) as error:
            raise InvalidRequest(f"the picture's bytes cannot be read: {error!r}") from error
        found = hashlib.sha256(data).hexdigest()
        if found != row.get("sha256"):
            raise InvalidRequest(f"the picture's bytes have sha256 {found}, the line says {row.get('sha256')}")
        place.stored[found] = place.keep_image(data, str(row.get("media_type") or "application/octet-stream"))

    def _remember(self, row: Json) -> None:
        for choice in row.get("choices") or ():
            if choice.get("finish_reason") == "length":
                self._cut.add((str(row.get("id")), int(choice.get("index", 0))))

    def _pair(self, row: Json, place: Place) -> Conversation:
        pair = row.get("pair")
        if not isinstance(pair, dict) or not all(
            isinstance(pair.get(f"{s}_text"), str) for s in ("chosen", "rejected")
        ):
            raise InvalidRequest("the preference's texts are not in the line")
        prompt = read_turns(pair.get("messages"), Pictures(place, None))
        if any(not one.startswith(BLOB_SCHEME) for one in image_references(pair["messages"])):
            raise InvalidRequest("the conversation shows a picture that was not stored, and it is not fetched now")
        found = conversation(prompt, pair["chosen_text"], pair["rejected_text"])
        return replace(
            found, answer_cut=self._was_cut(row.get("chosen")), rejected_cut=self._was_cut(row.get("rejected"))
        )

    def _was_cut(self, side: Any) -> bool:
        return isinstance(side, dict) and (side.get("completion_id"), side.get("index")) in self._cut
