"""What people say of answers: preferences and feedback, recorded, listed, deleted.

Comes in: request bodies as dicts, from either wire. Goes out: wire dicts, or a NoriaError.
The store is synchronous: every call to it runs in a thread. Must not import vllm, fastapi or grpc.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from noria.blobs import Blobs
from noria.errors import Unavailable
from noria.records import Feedback, Json, Preference
from noria.store import Store
from serve.api.ports import Capture, KeyLimits
from serve.api.schemas import FeedbackBody, FeedbackPage, OrderedPage, PreferenceBody, SideBody, listing, parse
from serve.privacy.scrub import Scrubber

FLUSH_S = 15.0  # far above one commit: only a store that hangs takes so long


class Judgements:
    """Handlers of preferences, feedback and the deletion of what one end user left behind."""

    def __init__(self, store: Store, blobs: Blobs, capture: Capture, limits: KeyLimits, scrubber: Scrubber) -> None:
        self._store = store
        self._limits = limits
        self._blobs = blobs
        self._capture = capture
        self._scrubber = scrubber

    async def record_preference(self, body: Mapping[str, Any]) -> tuple[Json, bool]:
        """Stores a preference, durable on return; False when the same annotator said the same of the pair before.

        Raises NotFound (unknown completion), InvalidRequest (index out of range, chosen equal to rejected,
        different prompts, both sides text), RateLimited.
        """
        asked = parse(PreferenceBody, body)

        def record() -> tuple[Preference, bool]:
            words = self._scrubber.words
            chosen, rejected = (replace(one.side(), text=words(one.text)) for one in (asked.chosen, asked.rejected))
            return self._store.add_preference(
                chosen, rejected, verdict=asked.verdict, annotator=asked.annotator, comment=words(asked.comment)
            )

        async with self._limits.recording() as recording:
            await self._answers_stored(asked.chosen, asked.rejected)
            preference, recording.new = await asyncio.to_thread(record)
        return preference.to_wire(), recording.new

    async def list_preferences(self, query: Mapping[str, Any]) -> Json:
        """A page of preferences, newest first."""
        page = parse(OrderedPage, query)
        rows = await asyncio.to_thread(
            self._store.list_preferences,
            after=page.after,
            limit=page.limit + 1,
            order=page.order,
            annotator=page.annotator,
        )
        return listing([row.to_wire() for row in rows], page.limit)

    async def get_preference(self, preference_id: str) -> Json:
        """One preference. Raises NotFound."""
        return (await asyncio.to_thread(self._store.get_preference, preference_id)).to_wire()

    async def delete_preference(self, preference_id: str) -> Json:
        """Deletes one preference. Raises NotFound."""
        await asyncio.to_thread(self._store.delete_preference, preference_id)
        return {"id": preference_id, "object": "preference.deleted", "deleted": True}

    async def record_feedback(self, body: Mapping[str, Any]) -> Json:
        """Stores feedback on one choice; an edit also makes a preference, named in `preference_id`."""
        asked = parse(FeedbackBody, body)

        def record() -> Feedback:
            return self._store.add_feedback(
                asked.completion_id,
                asked.index,
                rating=asked.rating,
                thumb=asked.thumb,
                edit=self._scrubber.words(asked.edit),
                comment=self._scrubber.words(asked.comment),
                annotator=asked.annotator,
            )

        async with self._limits.recording():
            await self._flush(asked.completion_id)
            feedback = await asyncio.to_thread(record)
        return feedback.to_wire()

    async def limits(self) -> Json:
        """The caller's own limits and what is used of them."""
        return await self._limits.describe()

    async def list_feedback(self, query: Mapping[str, Any]) -> Json:
        """A page of feedback, newest first."""
        page = parse(FeedbackPage, query)
        rows = await asyncio.to_thread(
            self._store.list_feedback,
            after=page.after,
            limit=page.limit + 1,
            order=page.order,
            annotator=page.annotator,
            completion_id=page.completion_id,
        )
        return listing([row.to_wire() for row in rows], page.limit)

    async def delete_feedback(self, feedback_id: str) -> Json:
        """Deletes one feedback. Raises NotFound."""
        await asyncio.to_thread(self._store.delete_feedback, feedback_id)
        return {"id": feedback_id, "object": "feedback.deleted", "deleted": True}

    async def forget_end_user(self, user: str) -> Json:
        """Deletes everything that one end user (`user` of the requests) left: answers, judgements, own pictures.

        Returns how many of each, and in `lineage` which versions learnt from it; zeros when nothing was there, so that
        asking twice is no error.
        """
        await self._flush(None)
        counts = dict(await asyncio.to_thread(self._store.forget_end_user, user))
        pictures = counts.pop("images")
        dropped = await asyncio.to_thread(self._store.drop_pictures, pictures, self._blobs.delete)
        return {"id": user, "object": "end_user.deleted", "deleted": True, **counts, "images": dropped}

    async def _answers_stored(self, *sides: SideBody) -> None:
        """An answer that was just given may still wait for its commit: let it, so that it can be judged at once."""
        for completion_id in {side.completion_id for side in sides if side.completion_id}:
            await self._flush(completion_id)

    async def _flush(self, completion_id: str | None) -> None:
        try:
            async with asyncio.timeout(FLUSH_S):
                await self._capture.flush(completion_id)
        except TimeoutError:
            raise Unavailable(f"the store took no answer within {FLUSH_S:g} s; try again") from None
