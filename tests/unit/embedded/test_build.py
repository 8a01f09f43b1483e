"""A home's embedded model is put together from the language model's file and the eyes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from noria.cli.main import call
from noria.cli.up.command import Plan, plan
from noria.errors import IntegrityError
from noria.recipes import parse_recipe
from noria.registry import Base, ManifestDraft, Registry
from noria.settings import Settings
from noria.store import Store
from tests.unit.embedded.material import RECIPE, STAGES, told, write_delta, write_gguf
from train.export.checkpoint import read_bytes, tensor_index, tree_hash
from train.models.add import publish_master
from train.models.embedded import BLANK, EMBEDDED
from train.models.embedded.assemble import assemble
from train.models.embedded.build import make_master
from train.models.embedded.download import GGUF_NAME
from train.models.embedded.eyes.export import write_eyes
from train.models.embedded.eyes.extract import extract
from train.models.embedded.eyes.lay import eyes_of
from train.models.embedded.eyes.record import WEIGHTS, Eyes
from train.models.embedded.eyes.seen import seen_conversations
from train.stages.job import RECIPE as ROWS


class Place:
    """A home whose language model is a tiny one, the blank master of that, and eyes that were trained on it."""

    def __init__(self, root: Path) -> None:
        root.mkdir()
        self.gguf = write_gguf(root / "tiny.gguf")
        self.sha256 = hashlib.sha256(self.gguf.read_bytes()).hexdigest()
        self.blank = root / "blank"
        self.blank.mkdir()
        assemble(self.gguf, self.blank, lambda share: None)
        for number, (name, policies) in enumerate(STAGES):
            write_delta(self.blank, root / "adapter" / name, policies, seed=number)
        taken = extract(self.blank, [root / "adapter"])
        self.eyes = write_eyes(taken, told(language_model_sha256=self.sha256), root / "eyes")

    def home(self, folder: Path) -> Settings:
        """A home to which the language model was downloaded before."""
        (folder / "downloads").mkdir(parents=True)
        (folder / "downloads" / GGUF_NAME).write_bytes(self.gguf.read_bytes())
        few = {"quantize": {"calibration_samples": 6}, "verify": {"samples": 3, "max_kl": 50.0}}
        return Settings.model_validate({"home": folder, "train": few})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("place") / "root")


@pytest.fixture
def place(made: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The tiny file is the one that is expected."""
    monkeypatch.setattr("train.models.embedded.download.GGUF_SHA256", made.sha256)
    monkeypatch.setattr("train.models.embedded.build.GGUF_SHA256", made.sha256)
    return made


def silent(stage: str, share: float) -> None:
    """Nobody watches."""


def test_a_home_is_given_a_master_that_sees(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = place.home(tmp_path)
    seen: list[str] = []
    master = make_master(settings, lambda stage, share: seen.append(stage), place.eyes.folder)
    assert sorted(set(seen)) == ["assemble", "download"]
    index, before, trained = (tensor_index(one) for one in (master.path, place.blank, place.eyes.folder))
    assert list(index) == list(before)
    whole = [name for name in trained if name in index]
    assert len(whole) == len([name for name in index if not name.startswith("language_model.")])
    assert all(read_bytes(index[name]) == read_bytes(trained[name]) for name in whole)
    assert any(read_bytes(index[name]) != read_bytes(before[name]) for name in whole)
    linears = [name for name in index if name.startswith("language_model.") and name.endswith("_proj.weight")]
    assert len(linears) == 2 * 7
    assert all(read_bytes(index[name]) != read_bytes(before[name]) for name in linears)
    assert eyes_of(master.path) == f"sha256:{place.eyes.record.sha256}"
    assert [path.name for path in settings.masters_dir.iterdir()] == ["embedded"]
    assert call(["--home", str(tmp_path), "model", "list", "--json"]) == 0
    assert [one["eyes"] for one in json.loads(capsys.readouterr().out)] == [f"sha256:{place.eyes.record.sha256}"]


def test_its_version_says_which_eyes_it_has_and_is_calibrated_on_what_they_saw(place: Place, tmp_path: Path) -> None:
    settings = place.home(tmp_path)
    master = make_master(settings, silent, place.eyes.folder)
    conversations = seen_conversations(place.eyes.recipe, settings.train)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        manifest = publish_master(master, registry, settings, silent, conversations, live=False)
        assert registry.live() is None
        again = publish_master(master, registry, settings, silent)
        assert (again.id, registry.live()) == (manifest.id, manifest.id)
    assert manifest.base is not None
    assert manifest.base.model_dump()["eyes"] == eyes_of(master.path)
    assert manifest.calibration["recipe"] == ROWS
    assert len(manifest.calibration["samples"]) == 6
    assert (registry.path(manifest.id) / "serving" / "noria.json").read_bytes() == (
        master.path / "noria.json"
    ).read_bytes()


def test_a_master_that_is_there_stays_as_it_is(place: Place, tmp_path: Path) -> None:
    """An older build without eyes, and eyes that are not even there."""
    settings = place.home(tmp_path)
    (settings.masters_dir / "embedded").mkdir(parents=True)
    (settings.masters_dir / "embedded" / "config.json").write_text("{}")
    before = tree_hash(settings.masters_dir / "embedded")
    master = make_master(settings, silent, tmp_path / "none")
    assert master.sha256 == before == tree_hash(settings.masters_dir / "embedded")
    assert eyes_of(master.path) is None


def test_wrong_eyes_are_told_before_anything_is_fetched(place: Place, tmp_path: Path) -> None:
    settings = Settings.model_validate({"home": tmp_path / "home"})
    with pytest.raises(IntegrityError, match=r"eyes\.json is missing; install Noria again"):
        make_master(settings, silent, tmp_path / "none")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in place.eyes.folder.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    (bad / WEIGHTS).write_bytes(b"\0" * place.eyes.record.size)
    with pytest.raises(IntegrityError, match=rf"sha256 .* its record says .*{place.eyes.record.sha256}"):
        make_master(settings, silent, bad)
    assert not settings.home.exists()


def test_eyes_of_another_language_model_are_refused(made: Place, tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match=f"trained with another language model: {GGUF_NAME} .sha256 {made.sha256}"):
        make_master(Settings.model_validate({"home": tmp_path}), silent, made.eyes.folder)


def test_calibration_takes_the_rows_that_the_job_took(eyes: Eyes) -> None:
    train = Settings.model_validate({"train": {"quantize": {"calibration_samples": 7}, "verify": {"samples": 5}}}).train
    found = seen_conversations(eyes.recipe, train)
    assert found is not None
    assert (found.recipe, len(found.calibration), len(found.verification)) == (ROWS, 7, 5)
    rows = [*found.calibration, *found.verification]
    assert len({json.dumps(one.messages) for one in rows}) == 12
    assert all(one.messages[-1]["role"] == "assistant" for one in rows)
    pictured = [[len(one.images) for one in part] for part in (found.calibration, found.verification)]
    assert [part.count(0) for part in pictured] == [4, 2]  # half are texts, and both parts see both
    assert [part.count(1) for part in pictured] == [3, 3]
    assert all(image.size == (96, 96) for one in rows for image in one.images)
    towers = parse_recipe({**RECIPE, "stages": RECIPE["stages"][:1]})
    assert seen_conversations(towers, train) is None


def test_a_home_that_only_trains_eyes_still_builds_the_model_that_sees(tmp_path: Path) -> None:
    """The blank model is there to be trained: `noria up` does not take it for one to serve."""
    settings = Settings.model_validate({"home": tmp_path})
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        for name, parent in ((BLANK, None), (BLANK, "v1")):
            staging = registry.begin(name)
            (staging / "weights").write_text(name)
            base = Base(name=name, path=f"masters/{name}")
            made = registry.publish(staging, ManifestDraft(method="base", parent=parent, base=base))
            assert plan(settings, None) == Plan(["model", EMBEDDED], None)
        registry.promote(made.id)
        assert plan(settings, None) == Plan(None, None)
