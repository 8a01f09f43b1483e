"""What a manifest says of frozen modules is held against the bytes, and against what the parent's says."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from noria.errors import IntegrityError, UnsupportedModel
from noria.modules import architecture_of
from noria.modules.hashes import module_hashes
from noria.records import Module
from noria.registry import Manifest
from serve.release.frozen import check_frozen
from serve.release.validate import read_tensors
from tests.unit.release.fakes import CONFIG, write_serving

TOWER: Module = "vision_tower"


def manifest(frozen: dict[str, str], version: str = "v2") -> Manifest:
    """A manifest that says no more than this."""
    return Manifest(method="test", id=version, parent="v1", created_at=1.0, files={}, frozen=frozen)


@pytest.fixture
def serving(tmp_path: Path) -> Path:
    """A candidate's tensors."""
    write_serving(tmp_path / "serving", 1.0)
    return tmp_path / "serving"


@pytest.fixture
def true(serving: Path) -> dict[str, str]:
    """The hashes that its manifest should tell."""
    found = module_hashes(architecture_of(CONFIG), read_tensors(serving), [TOWER, "language_model"])
    return {str(module): digest for module, digest in found.items()}


def test_the_truth_passes_and_so_does_saying_nothing(serving: Path, true: dict[str, str]) -> None:
    check_frozen(serving, manifest(true), manifest(true, "v1"))
    check_frozen(serving, manifest(true), manifest({}, "v1"))  # the parent trained the module, and tells no hash
    check_frozen(serving, manifest(true), None)
    check_frozen(serving, manifest({}), manifest(true, "v1"))


def test_a_module_that_is_not_what_the_manifest_says(serving: Path, true: dict[str, str]) -> None:
    file = serving / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_tower.patch.weight"][0, 0] = 2
    save_file(tensors, file)
    with pytest.raises(IntegrityError, match=r"vision_tower hashes to sha256:.*the manifest of v2 says"):
        check_frozen(serving, manifest(true), None)
    check_frozen(serving, manifest({"language_model": true["language_model"]}), None)


def test_a_frozen_module_that_is_not_the_parent_s(serving: Path, true: dict[str, str]) -> None:
    with pytest.raises(IntegrityError, match=r"v2 calls vision_tower frozen, but it hashes to .* v1's to sha256:0"):
        check_frozen(serving, manifest(true), manifest({TOWER: "sha256:0"}, "v1"))


def test_an_architecture_that_the_map_does_not_know_cannot_be_held_to_its_word(serving: Path) -> None:
    (serving / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(UnsupportedModel):
        check_frozen(serving, manifest({TOWER: "sha256:0"}), None)
