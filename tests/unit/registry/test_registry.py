"""The registry: a version is whole or absent, and a byte that changes is found and named."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from noria.errors import Conflict, IntegrityError, InvalidRequest, NotFound
from noria.registry import Base, Manifest, ManifestDraft, Registry, fingerprint
from noria.store import Store

WEIGHTS = b"\x00" * 3_000_000
FILES = {"adapter/adapter_model.safetensors": b"lora", "serving/model.safetensors": WEIGHTS, "probe.json": b"{}"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """An empty store."""
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as opened:
        yield opened


@pytest.fixture
def registry(tmp_path: Path, store: Store) -> Registry:
    """A registry without versions."""
    return Registry(tmp_path / "models", store)


def staged(registry: Registry, **contents: bytes) -> Path:
    """A filled staging folder."""
    staging = registry.begin("job 1/x")
    for name, data in {**FILES, **contents}.items():
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        (staging / name).write_bytes(data)
    return staging


def publish(registry: Registry, job: str | None = None, parent: str | None = None) -> Manifest:
    """One more version."""
    return registry.publish(staged(registry), ManifestDraft(method="dpo", job=job, parent=parent))


def test_a_published_version_is_what_its_manifest_says(registry: Registry, store: Store, tmp_path: Path) -> None:
    base = Base(name="tiny", path="masters/tiny", sha256="sha256:ab")
    draft = ManifestDraft(
        method="dpo", base=base, job="job_1", metrics={"loss": 0.5}, frozen={"aligner": "sha256:cd"}, extra_field=[1]
    )
    staging = staged(registry)
    assert staging.parent == tmp_path / "models"
    made = registry.publish(staging, draft)
    assert (made.id, made.format, made.gate) == ("v1", 1, None)
    assert not staging.exists()
    assert {path: (entry.sha256, entry.size) for path, entry in made.files.items()} == {
        path: (hashlib.sha256(data).hexdigest(), len(data)) for path, data in FILES.items()
    }
    folder = registry.path("v1")
    assert folder == tmp_path / "models" / "v1"
    assert folder.stat().st_mode & 0o777 == 0o755
    assert json.loads((folder / "manifest.json").read_bytes())["extra_field"] == [1]
    assert registry.manifest("v1") == made
    assert registry.verify("v1") == made
    row = store.get_version("v1")
    assert (row.state, row.job, row.metrics, row.frozen) == ("candidate", "job_1", {"loss": 0.5}, dict(draft.frozen))


def test_the_fingerprint_is_the_id_and_the_manifests_hash(registry: Registry) -> None:
    publish(registry)
    raw = (registry.path("v1") / "manifest.json").read_bytes()
    assert fingerprint(registry.manifest("v1")) == f"v1-{hashlib.sha256(raw).hexdigest()[:8]}"


def test_the_fingerprint_survives_fields_that_this_noria_does_not_know(registry: Registry) -> None:
    publish(registry)
    path = registry.path("v1") / "manifest.json"
    path.write_text(json.dumps({"from_the_future": 1, **json.loads(path.read_text())}))
    assert fingerprint(registry.manifest("v1")) == f"v1-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"


def _flip(folder: Path) -> None:
    path = folder / "serving/model.safetensors"
    data = bytearray(path.read_bytes())
    data[2_345_678] ^= 4
    path.write_bytes(data)


def _truncate(folder: Path) -> None:
    os.truncate(folder / "serving/model.safetensors", 2_999_999)


def _remove(folder: Path) -> None:
    (folder / "adapter/adapter_model.safetensors").unlink()


def _add(folder: Path) -> None:
    (folder / "serving/extra.bin").write_bytes(b"x")


def _link(folder: Path) -> None:
    path = folder / "probe.json"
    path.rename(folder.parent / "elsewhere.json")
    path.symlink_to(folder.parent / "elsewhere.json")


def _edit_manifest(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"method": "dpo"', '"method": "dpx"'))


def _break_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


def _remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


ZEROS = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_flip, rf"v1/serving/model.safetensors has sha256 [0-9a-f]{{64}}, its manifest says {ZEROS}"),
        (_truncate, r"v1/serving/model.safetensors has 2999999 bytes, its manifest says 3000000"),
        (_remove, r"v1/adapter/adapter_model.safetensors is missing"),
        (_add, r"v1/serving/extra.bin is not in the manifest"),
        (_link, r"v1/probe.json is not a plain file"),
        (_edit_manifest, r"v1/manifest.json has sha256 [0-9a-f]{64}, it was published as [0-9a-f]{64}"),
        (_break_manifest, r"v1/manifest.json: not a manifest"),
        (_remove_manifest, r"v1/manifest.json is missing"),
    ],
)
def test_verify_names_what_is_damaged(registry: Registry, damage: object, says: str) -> None:
    publish(registry)
    registry.verify("v1")
    assert callable(damage)
    damage(registry.path("v1"))
    with pytest.raises(IntegrityError, match=says):
        registry.verify("v1")


def test_a_job_publishes_once(registry: Registry, store: Store) -> None:
    first = publish(registry, "job_1")
    again = staged(registry)
    assert registry.publish(again, ManifestDraft(method="dpo", job="job_1")) == first
    assert not again.exists()
    assert publish(registry, "job_2").id == "v2"
    assert publish(registry).id == "v3"
    assert publish(registry).id == "v4"
    assert [one.id for one in store.list_versions()] == ["v1", "v2", "v3", "v4"]


def crash(registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies between the rename and the row."""

    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "add_version", dies)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, "job_1")


def test_reconcile_adds_the_row_that_a_crash_left_out(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(registry, store, monkeypatch)
    assert store.list_versions() == []
    assert registry.reconcile() == ["v1"]
    assert registry.reconcile() == []
    assert (store.get_version("v1").job, store.get_version("v1").state) == ("job_1", "candidate")
    assert registry.verify("v1").job == "job_1"


def test_a_job_that_crashed_while_publishing_finds_its_version(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    crash(registry, store, monkeypatch)
    assert publish(registry, "job_1").id == "v1"
    assert [one.id for one in store.list_versions()] == ["v1"]


def test_a_crash_before_the_rename_leaves_no_version(
    registry: Registry, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    staging = staged(registry)
    with monkeypatch.context() as patch:
        patch.setattr("noria.registry.os.rename", dies)
        with pytest.raises(KeyboardInterrupt):
            registry.publish(staging, ManifestDraft(method="dpo", job="job_1"))
    assert registry.reconcile() == []
    with pytest.raises(NotFound, match="'v1'"):
        registry.path("v1")
    assert registry.publish(staging, ManifestDraft(method="dpo", job="job_1")).id == "v1"
    registry.verify("v1")


def test_every_file_is_on_the_disk_before_the_name(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(handle: int) -> None:
        told.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    def noted_rename(source: Path, target: Path) -> None:
        told.append("rename")
        rename(source, target)

    staging = staged(registry)
    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr("os.rename", noted_rename)
    registry.publish(staging, ManifestDraft(method="dpo"))
    before, after = told[: told.index("rename")], told[told.index("rename") + 1 :]
    parts = ["", "/adapter", "/serving", "/manifest.json", *(f"/{name}" for name in FILES)]
    assert {f"{staging}{part}" for part in parts} <= set(before)
    assert after[0] == str(staging.parent)


def test_a_folder_that_cannot_be_read_stops_nobody(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "models" / "v3").mkdir(parents=True)
    assert registry.reconcile() == []
    assert publish(registry, "job_1").id == "v4"


def test_reconcile_removes_only_staging_that_is_stale(registry: Registry) -> None:
    old, fresh = staged(registry), staged(registry)
    for path in (old, *old.rglob("*")):
        os.utime(path, (1.0, 1.0))
    os.utime(fresh, (1.0, 1.0))  # its folder is old, but a file in it is not
    registry.reconcile()
    assert not old.exists()
    assert fresh.exists()


def test_only_a_folder_from_begin_can_be_published(registry: Registry, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for folder in (other, registry.path(publish(registry).id)):
        with pytest.raises(InvalidRequest, match=r"begin\(\)"):
            registry.publish(folder, ManifestDraft(method="dpo"))


def test_publishers_at_once_get_numbers_of_their_own(registry: Registry, store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda i: publish(registry, f"job_{i}").id, range(8)))
    assert sorted(ids) == [f"v{i}" for i in range(1, 9)]
    for id_ in ids:
        registry.verify(id_)
    assert len(store.list_versions()) == 8


def test_promote_and_roll_back(registry: Registry, store: Store) -> None:
    publish(registry)
    publish(registry, parent="v1")
    registry.promote("v1")
    registry.promote("v2")
    assert (registry.live(), registry.previous()) == ("v2", "v1")
    assert registry.rollback() == "v1"
    assert (registry.live(), registry.previous()) == ("v1", "v2")
    registry.set_state("v2", "rejected")
    with pytest.raises(Conflict):
        registry.rollback()
    with pytest.raises(NotFound):
        registry.promote("v9")
    assert [(one.id, one.state) for one in registry.list_versions()] == [("v1", "live"), ("v2", "rejected")]


def test_lineage_starts_at_the_root(registry: Registry) -> None:
    publish(registry)
    publish(registry, parent="v1")
    publish(registry, parent="v1")
    publish(registry, parent="v3")
    assert [one.id for one in registry.lineage("v4")] == ["v1", "v3", "v4"]
    assert [one.id for one in registry.lineage("v1")] == ["v1"]


@pytest.mark.parametrize("name", ["../v1", "v01", "v0", "", ".", ".staging-x", "v1/..", "latest"])
def test_a_version_name_is_never_another_path(registry: Registry, name: str) -> None:
    publish(registry)
    with pytest.raises(NotFound):
        registry.path(name)
