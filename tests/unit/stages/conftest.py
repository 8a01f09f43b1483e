"""A trainer over a home of its own, for tests that run a job's stages one by one."""

from __future__ import annotations

import io
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from noria.registry import Base, ManifestDraft
from noria.settings import Settings
from noria.store import Store
from train.daemon import Trainer
from train.log import EventLog


@pytest.fixture
def trainer(tiny_vlm: Path, tmp_path: Path) -> Iterator[Trainer]:
    """A trainer over a home whose live version is the tiny model's."""
    settings = Settings.model_validate({"home": tmp_path / "home", "train": {"nice": 0}})
    shutil.copytree(tiny_vlm, settings.masters_dir / "tiny")
    with Store.open(settings.store_url) as store:
        one = Trainer(settings, store, threading.Event(), EventLog(io.StringIO()))
        staging = one.registry.begin("test")
        shutil.copytree(tiny_vlm, staging / "serving")
        base = Base(name="tiny", path="masters/tiny")
        one.registry.promote(one.registry.publish(staging, ManifestDraft(method="base", base=base)).id)
        yield one
