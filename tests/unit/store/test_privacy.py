"""Retention, the mark that forgetting leaves, and pictures that two hands reach for at once."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from noria.blobs import Blobs
from noria.records import Image, Side, Snapshot
from noria.store import Store
from noria.store.completions import PictureGone
from noria.store.privacy import Pruned
from tests.unit.store.conftest import Clock
from tests.unit.store.samples import PICTURE, completion, version

DAY = 86_400.0


def aged(store: Store, *days: float, now: float) -> None:
    """Completions `d0`, `d1`, .. of these ages."""
    store.add_completions([completion(f"d{n}", created_at=now - age * DAY) for n, age in enumerate(days)])


def ids(store: Store) -> list[str]:
    return [one.id for one in store.list_completions(limit=100)]


def test_retention_by_age_takes_the_oldest_first_in_batches(store: Store, clock: Clock) -> None:
    clock.now = 1_000 * DAY
    aged(store, 40, 31, 30.5, 29, 1, now=clock.now)
    limits = store.limits(30, None, True)
    assert store.count_expired(limits) == Pruned(3)
    assert store.prune(limits, 2) == Pruned(2)
    assert ids(store) == ["d2", "d3", "d4"]
    assert store.prune(limits, 2) == Pruned(1)
    assert store.prune(limits, 2) == Pruned() == store.count_expired(limits)
    assert ids(store) == ["d3", "d4"]


def test_retention_by_count_keeps_the_newest_of_what_nobody_judged(store: Store, clock: Clock) -> None:
    clock.now = 1_000 * DAY
    aged(store, 6, 5, 4, 3, 2, 1, now=clock.now)
    store.add_preference(Side("d0", 0), Side("d0", 1))
    store.add_feedback("d2", 0, thumb="up")
    assert store.prune(store.limits(None, 2, True), 100) == Pruned(2)
    assert ids(store) == ["d0", "d2", "d4", "d5"]
    assert store.limits(None, 4, False).cut is None
    assert store.prune(store.limits(None, 3, False), 100) == Pruned(1, preferences=1)
    assert store.preference_counts()["total"] == 0
    assert store.prune(store.limits(None, 2, False), 100) == Pruned(1, feedback=1)
    assert store.list_feedback() == []


def test_without_limits_nothing_goes(store: Store) -> None:
    store.add_completions([completion()])
    nothing = store.limits(None, None, False)
    assert store.prune(nothing, 100) == store.count_expired(nothing) == Pruned()
    assert ids(store) == ["c1"]


def test_pruned_completions_tell_the_pictures_that_nobody_shows_any_more(store: Store, clock: Clock) -> None:
    clock.now = 1_000 * DAY
    other = replace(PICTURE, sha256="b" * 64)
    old, new = clock.now - 2 * DAY, clock.now
    store.add_completions(
        [completion("old", images=(PICTURE, other), created_at=old), completion("new", images=(other,), created_at=new)]
    )
    assert store.prune(store.limits(1, None, True), 10) == Pruned(1, images=(PICTURE.sha256,))
    assert store.unknown_pictures([PICTURE.sha256, other.sha256]) == [PICTURE.sha256]


def trained(store: Store, job_version: str, parent: str | None, train: tuple[str, ...], **parts: Any) -> str:
    """A job over these judgements that has published a version; returns the job's id."""
    job = store.create_job("dpo")
    owned = store.claim_job("me", 60.0)
    assert owned is not None
    store.add_snapshot(Snapshot(f"snap-{job.id}", job.id, 1.0, train, parts.pop("held_out", ()), {}))
    store.note_uses(job.id, parts)
    store.add_version(version(job_version, parent=parent, job=job.id))
    store.finish_job(job.id, "me", "succeeded", version=job_version)
    return job.id


def test_forgetting_marks_the_versions_that_learnt_and_keeps_no_name(store: Store, clock: Clock) -> None:
    store.add_completions([completion("c1", end_user="jane@x.org"), completion("c2", end_user="u-2")])
    theirs, _ = store.add_preference(Side("c1", 0), Side("c1", 1), annotator="u-2")
    said, _ = store.add_preference(Side("c2", 0), Side("c2", 1), annotator="jane@x.org")
    others, _ = store.add_preference(Side("c2", 1), Side("c2", 0), annotator="u-2")
    thumb = store.add_feedback("c1", 0, thumb="up")
    store.add_version(version("v1"))
    first = trained(store, "v2", "v1", (theirs.id, others.id), held_out=(said.id,), calibration=["c1", "c2"])
    trained(store, "v3", "v2", (others.id,))
    kto = trained(store, "v4", "v1", (thumb.id,), prompts=["c1"])
    trained(store, "v5", "v1", (others.id,))
    waiting = store.create_job("grpo")
    store.note_uses(waiting.id, {"prompts": ["c1", "c1"]})
    found = store.forget_end_user("jane@x.org")
    assert {key: found[key] for key in ("completions", "preferences", "feedback")} == {
        "completions": 1,
        "preferences": 2,
        "feedback": 1,
    }
    assert found["lineage"] == {
        "versions": [
            {
                "version": "v2",
                "state": "candidate",
                "job": first,
                "uses": {"calibration": 1, "held_out": 1, "train": 1},
            },
            {"version": "v4", "state": "candidate", "job": kto, "uses": {"prompts": 1, "train": 1}},
        ],
        "inherited": ["v3"],
        "jobs": [{"job": waiting.id, "state": "queued", "uses": {"prompts": 1}}],
    }
    assert store.forgotten_of("v2") == {"users": 1, "uses": {"calibration": 1, "train": 1}, "inherited": 0}
    assert store.forgotten_of("v3") == {"users": 0, "uses": {}, "inherited": 1}
    assert store.forgotten_of("v5") == {"users": 0, "uses": {}, "inherited": 0}
    assert store.forgotten_uses(waiting.id) == {"prompts": 1}
    assert store.forget_end_user("jane@x.org")["lineage"] == {"versions": [], "inherited": [], "jobs": []}
    with store._db.read() as conn:
        rows = conn.exec_driver_sql("SELECT * FROM forgotten").all()
    assert len(rows) == 1 and not any("jane" in str(value) for value in rows[0])


def test_a_user_who_comes_back_and_is_forgotten_again_counts_once(store: Store) -> None:
    job = store.create_job("dpo")
    store.add_version(version("v1", job=job.id))
    store.note_uses(job.id, {"calibration": ["c1", "c2", "c3"]})
    for name, user in (("c1", "u-1"), ("c2", "u-1"), ("c3", "u-2")):
        store.add_completions([completion(name, end_user=user)])
        store.forget_end_user(user)
    assert store.forgotten_of("v1") == {"users": 2, "uses": {"calibration": 3}, "inherited": 0}


def test_a_training_that_begins_again_loses_its_marks(store: Store) -> None:
    store.add_completions([completion("c1", end_user="u-1")])
    made, _ = store.add_preference(Side("c1", 0), Side("c1", 1))
    job = store.create_job("dpo")
    store.add_snapshot(Snapshot("snap", job.id, 1.0, (made.id,), (), {}))
    store.note_uses(job.id, {"calibration": ["c1"]})
    store.forget_end_user("u-1")
    assert store.forgotten_uses(job.id) == {"train": 1, "calibration": 1}
    store.clear_forgotten_uses(job.id)
    assert store.forgotten_uses(job.id) == {"calibration": 1}


def test_what_was_forgotten_does_not_lie_in_the_log(tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        store.add_completions([completion("c1", ("a secret of theirs", "b"), end_user="u-1")])
        assert b"a secret of theirs" in (tmp_path / "noria.db-wal").read_bytes()
        store.forget_end_user("u-1")
        for path in tmp_path.iterdir():
            assert b"a secret of theirs" not in path.read_bytes()


def test_a_picture_that_is_gone_refuses_its_completion(store: Store) -> None:
    """And what was written beside it is not there either; a picture that is shown already is not asked for again."""
    shown = completion("c1", images=(PICTURE,))
    with pytest.raises(PictureGone, match="deleted while"):
        store.add_completions([completion("c0"), shown], lambda sha256: False)
    assert ids(store) == []
    assert store.add_completions([shown], lambda sha256: True) == 1
    assert store.add_completions([completion("c2", images=(PICTURE,))], lambda sha256: False) == 1


def test_a_picture_that_is_shown_again_is_not_dropped(store: Store) -> None:
    dropped: list[str] = []
    store.add_completions([completion("c1", images=(PICTURE,))])
    orphans = store.delete_completion("c1")
    store.add_completions([completion("c2", images=(PICTURE,))])
    assert store.drop_pictures(orphans, dropped.append) == 0
    orphans = store.delete_completion("c2")
    assert store.drop_pictures([*orphans, "c" * 64], dropped.append) == 2
    assert dropped == [PICTURE.sha256, "c" * 64]


def test_capture_and_forgetting_of_one_picture_never_lose_it(store: Store, tmp_path: Path) -> None:
    """Two hands, the same bytes, many times: whatever completion is stored has its picture."""
    blobs, data = Blobs(f"file://{tmp_path / 'blobs'}"), b"the same picture"
    done, failures, again = threading.Event(), list[BaseException](), list[str]()

    def capture() -> None:
        try:
            for number in range(40):
                while True:
                    image: Image = blobs.put(data, "image/png")
                    one = completion(f"mine-{number}", images=(image,), end_user="stays")
                    try:
                        store.add_completions([one], blobs.exists)
                        break
                    except PictureGone:
                        again.append(one.id)
                assert blobs.exists(image.sha256), f"{one.id} lost its picture"
                store.drop_pictures(store.delete_completion(one.id), blobs.delete)
        except BaseException as error:  # noqa: BLE001 - told in the test's own thread
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=capture)
    thread.start()
    while not done.is_set():
        image = blobs.put(data, "image/png")
        try:
            store.add_completions([completion("theirs", images=(image,), end_user="goes")], blobs.exists)
        except PictureGone:
            again.append("theirs")
        store.drop_pictures(store.forget_end_user("goes")["images"], blobs.delete)
    thread.join()
    assert failures == []
    store.drop_pictures([image.sha256], blobs.delete)
    assert not blobs.exists(image.sha256)
