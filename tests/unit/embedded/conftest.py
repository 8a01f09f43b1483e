"""One tiny blank master, what three stages made of it, and the eyes taken out of that."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.embedded.material import build_master, told, write_stages
from train.models.embedded.eyes.export import write_eyes
from train.models.embedded.eyes.extract import extract
from train.models.embedded.eyes.record import Eyes


@pytest.fixture(scope="session")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in bfloat16."""
    return build_master(tmp_path_factory.mktemp("blank") / "master")


@pytest.fixture(scope="session")
def adapter(blank: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deltas of vision, align and sft."""
    return write_stages(blank, tmp_path_factory.mktemp("trained") / "adapter")


@pytest.fixture
def eyes(blank: Path, adapter: Path, tmp_path: Path) -> Eyes:
    """The eyes folder of those deltas."""
    return write_eyes(extract(blank, [adapter]), told(), tmp_path / "eyes")
