"""Rounds of retention on real blobs: what goes, what a crash left, what is left alone; by the server and by hand."""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from noria.blobs import Blobs
from noria.cli.main import call
from noria.errors import Unavailable
from noria.privacy.retention import RoundCounts, past_retention, prune, sweep
from noria.records import Side
from noria.settings import PrivacySettings, Settings
from noria.store import Store
from serve.capture.queue import CaptureQueue
from serve.capture.tape import Captured, ChoiceTape
from serve.engine.versions import ServingVersion, Trace
from serve.privacy.keeper import Keeper
from serve.privacy.metrics import exported_privacy
from serve.privacy.scrub import Scrubber
from tests.unit.store.samples import completion

HOUR = 3600.0


@pytest.fixture
def home(tmp_path: Path) -> Settings:
    """A home with three completions, an old one judged, each with a picture of its own."""
    settings = Settings(home=tmp_path / "home")
    settings.home.mkdir()
    blobs, now = Blobs(settings.blobs_url), time.time()
    with Store.open(settings.store_url) as store:
        for name, days in (("old", 40), ("judged", 40), ("new", 1)):
            image = blobs.put(name.encode(), "image/png")
            store.add_completions([completion(name, images=(image,), created_at=now - days * 24 * HOUR)])
        store.add_preference(Side("judged", 0), Side("judged", 1))
    return settings


def aged(settings: Settings, sha256: str, hours: float) -> None:
    at = time.time() - hours * HOUR
    os.utime(settings.home / "blobs" / sha256[:2] / sha256, (at, at))


def stored(settings: Settings) -> int:
    return sum(path.is_file() for path in (settings.home / "blobs").rglob("*"))


def test_a_round_takes_completions_and_their_pictures(home: Settings) -> None:
    privacy, blobs = PrivacySettings(retention_days=30), Blobs(home.blobs_url)
    with Store.open(home.store_url) as store:
        assert past_retention(store, privacy).completions == 1
        assert prune(store, blobs, privacy) == RoundCounts(completions=1, images=1)
        assert sorted(one.id for one in store.list_completions()) == ["judged", "new"]
        assert prune(store, blobs, PrivacySettings(retention_days=30, keep_judged=False)) == RoundCounts(1, 1, 0, 1)
    assert stored(home) == 1


def test_a_sweep_takes_what_nothing_refers_to_once_it_is_old(home: Settings) -> None:
    privacy, blobs = PrivacySettings(), Blobs(home.blobs_url)
    left, fresh = blobs.put(b"left by a crash", "image/png").sha256, blobs.put(b"just put", "image/png").sha256
    half = home.home / "blobs" / left[:2] / f".{left}.ab12.tmp"
    half.write_bytes(b"half")
    os.utime(half, (1.0, 1.0))
    with Store.open(home.store_url) as store:
        for one in (left, *(image.sha256 for row in store.list_completions() for image in row.images)):
            aged(home, one, 2)
        assert sweep(store, blobs, privacy, dry_run=True).swept == 1
        assert blobs.exists(left)
        aged(home, left, 2)  # exists() did not refresh it, but be sure
        assert sweep(store, blobs, privacy).swept == 1
    assert not blobs.exists(left) and blobs.exists(fresh) and not half.exists()
    assert stored(home) == 4


def test_a_picture_that_is_put_again_is_young_again(home: Settings) -> None:
    blobs = Blobs(home.blobs_url)
    one = blobs.put(b"twice", "image/png").sha256
    aged(home, one, 5)
    blobs.put(b"twice", "image/png")
    with Store.open(home.store_url) as store:
        assert sweep(store, blobs, PrivacySettings()).swept == 0


def test_the_pictures_of_a_job_that_is_not_over_are_left_alone(home: Settings) -> None:
    """A recipe's pictures lie in the blobs and no completion shows them; when the job is over they go."""
    blobs = Blobs(home.blobs_url)
    with Store.open(home.store_url) as store:
        job = store.create_job("recipe")
        one = blobs.put(b"a row of a recipe's data", "image/png").sha256
        later = time.time() + 5 * HOUR
        assert sweep(store, blobs, PrivacySettings(), clock=lambda: later).swept == 0
        assert blobs.exists(one)
        store.request_cancel(job.id)
        assert sweep(store, blobs, PrivacySettings(), clock=lambda: later).swept == 1


def test_an_object_store_knows_ages_too() -> None:
    blobs = Blobs("memory://ages")
    one = blobs.put(b"x", "image/png").sha256
    assert list(blobs.older_than(time.time() - 60)) == []
    assert list(blobs.older_than(time.time() + 60)) == [[one]]


async def test_the_keeper_works_in_the_background_and_is_counted(home: Settings) -> None:
    privacy = PrivacySettings(retention_days=30, prune_every_s=0.01)
    with Store.open(home.store_url) as store:
        keeper = Keeper(store, Blobs(home.blobs_url), privacy)
        registry = CollectorRegistry()
        with exported_privacy(Scrubber(privacy), keeper, registry):
            task = asyncio.create_task(keeper.run())
            while keeper.rounds < 2:  # noqa: ASYNC110 - a counter has no event
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            told = generate_latest(registry).decode()
        assert asdict(keeper.taken) == {"completions": 1, "preferences": 0, "feedback": 0, "images": 1, "swept": 0}
        assert 'noria_privacy_pruned_total{kind="completions"} 1.0' in told
        assert "noria_privacy_failures_total 0.0" in told
        assert store.count_completions() == 2


async def test_a_round_that_fails_is_counted_and_the_next_one_comes(home: Settings) -> None:
    class Away(Store):
        """A store that does not answer the first time."""

        asked = 0

        def limits(self, *words: object) -> object:  # type: ignore[override]
            self.asked += 1
            if self.asked == 1:
                raise Unavailable("the database is away")
            return super().limits(30, None, True)

    with Away.open(home.store_url) as store:
        keeper = Keeper(store, Blobs(home.blobs_url), PrivacySettings(prune_every_s=0.01))
        task = asyncio.create_task(keeper.run())
        while keeper.taken.completions < 1:  # noqa: ASYNC110 - a counter has no event
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert keeper.failures == 1


def test_prune_by_hand_tells_first_and_then_does(home: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    (home.home / "noria.toml").write_text("[privacy]\nretention_count = 1\n")
    words = ["--home", str(home.home), "prefs", "prune", "--json"]
    assert call([*words, "--dry-run"]) == 0
    would = {"completions": 1, "preferences": 0, "feedback": 0, "swept": 0}
    assert json.loads(capsys.readouterr().out) == {"dry_run": True, **would}
    assert stored(home) == 3
    assert call(words) == 0
    assert json.loads(capsys.readouterr().out) == {"dry_run": False, **would, "images": 1}
    assert stored(home) == 2


class Asked:
    """A parsed request that shows a picture."""

    n = 1

    def model_dump(self, **_options: object) -> dict[str, object]:
        """What was asked."""
        shown = {"type": "image_url", "image_url": {"url": "data:image/png;base64,dGhlIHNhbWU="}}
        return {"messages": [{"role": "user", "content": [shown, {"type": "text", "text": "x"}]}], "user": "stays"}


async def test_a_picture_deleted_between_its_put_and_its_commit_is_put_again(home: Settings) -> None:
    """The moment that lost a picture: capture sees it there, somebody deletes it, capture refers to it."""
    blobs = Blobs(home.blobs_url)
    with Store.open(home.store_url) as store:
        taken: list[str] = []

        def interfere(one: object) -> object:
            if not taken:
                orphan = blobs.put(b"the same", "image/png").sha256
                taken.append(orphan)
                assert store.drop_pictures([orphan], blobs.delete) == 1
            return one

        queue = CaptureQueue(store, blobs, home.capture, interfere)  # type: ignore[arg-type]
        trace = Trace("r", ServingVersion("v1", "v1-00000001", Path("v1")))
        tape = ChoiceTape(0, [1, 2], [], ["yes"], "stop")
        queue.offer(Captured("chatcmpl-1", 1.0, "noria", Asked(), trace, [5], {0: tape}, finished=True))
        await queue.flush()
        await queue.close()
        kept = store.get_completion("chatcmpl-1")
        assert [image.sha256 for image in kept.images] == taken
        assert blobs.get(taken[0]) == b"the same"
        assert (queue.stored, queue.dropped, queue.counts.retries) == (1, 0, 1)
