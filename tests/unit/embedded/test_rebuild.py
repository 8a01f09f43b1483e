"""`build-embedded` on a tiny blank master: trained for real, exported, found again, taken up where it was left."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from noria.cli.main import call
from noria.errors import Conflict, IntegrityError, InvalidRequest, NotFound
from noria.recipes import Recipe, load_recipe, parse_recipe
from noria.records import Json
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from tests.unit.embedded.material import RECIPE
from train.export.checkpoint import file_index, read_bytes, tensor_index
from train.export.merge import merge
from train.models.add import Progress
from train.models.cli import print_eyes
from train.models.embedded.eyes.export import export_eyes
from train.models.embedded.eyes.lay import MARK
from train.models.embedded.eyes.record import Eyes, open_eyes, recipe_hash
from train.models.embedded.rebuild import Rebuilt, rebuild, recipe_to_run
from train.stages.job import version_of

FEW: Json = {"batch_size": 4, "micro_batch_size": 2, "max_length": 256}
SHORT: Json = {
    "name": "short",
    "model": "embedded-blank",
    "stages": [{**stage, **FEW, "steps": 2} for stage in RECIPE["stages"]],
    "quantize": {"calibration_samples": 4},
    "verify": {"samples": 2, "max_kl": 50.0},
}


@contextmanager
def bars() -> Iterator[Progress]:
    """Nobody watches."""
    yield lambda stage, share: None


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A run takes the process's signals; tests go on after it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def short() -> Recipe:
    return parse_recipe(SHORT)


@pytest.fixture
def settings(blank: Path, tmp_path: Path) -> Settings:
    """An empty home, but for the blank master."""
    few = {"nice": 0, "quantize": {"calibration_samples": 4}, "verify": {"samples": 2, "max_kl": 50.0}}
    made = Settings.model_validate({"home": tmp_path / "home", "train": few})
    shutil.copytree(blank, made.masters_dir / "embedded-blank")
    return made


def test_it_trains_exports_and_goes_on_where_it_was(settings: Settings, short: Recipe, tmp_path: Path) -> None:
    with Store.open(settings.store_url) as store:
        wanted = {"recipe": short.model_dump(mode="json", exclude_defaults=True)}
        left = store.start_job("recipe", wanted, "none", "a trainer that died", 1.0)
    rebuilt = rebuild(settings, short, tmp_path / "eyes", bars)
    assert rebuilt.status == 0
    eyes = open_eyes(tmp_path / "eyes")
    assert rebuilt.eyes == eyes
    assert (eyes.record.version, eyes.record.job) == ("v2", left.id)
    assert [(stage.name, stage.steps, stage.samples) for stage in eyes.record.stages] == [
        ("vision", 2, 12),
        ("align", 2, 6),
        ("sft", 2, 110),
    ]
    assert all(stage.seconds > 0 and stage.data_sha256.startswith("sha256:") for stage in eyes.record.stages)
    assert eyes.record.recipe_sha256 == recipe_hash(short) == recipe_hash(recipe_to_run(None, eyes.folder))
    assert recipe_to_run(None, eyes.folder).model == "embedded-blank"
    same_as_merged(settings, eyes, tmp_path)
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        assert [(one.id, one.state) for one in store.list_versions()] == [("v1", "candidate"), ("v2", "live")]
        assert registry.manifest("v1").base is not None
    again = rebuild(settings, short, tmp_path / "again", bars)
    assert again.eyes is not None
    assert again.eyes.record == eyes.record
    with Store.open(settings.store_url) as store:
        assert [job.id for job in store.list_jobs()] == [left.id]
        refusals(settings, Registry(settings.models_dir, store), tmp_path)


def same_as_merged(settings: Settings, eyes: Eyes, tmp_path: Path) -> None:
    """Tower and aligner are what the version's own deltas make of the master."""
    merge(settings.masters_dir / "embedded-blank", [settings.models_dir / "v2" / "adapter"], tmp_path / "merged")
    merged, index = tensor_index(tmp_path / "merged"), file_index(eyes.weights)
    whole = [name for name in merged if not name.startswith("language_model.")]
    assert all(read_bytes(merged[name]) == read_bytes(index[name]) for name in whole)
    assert len(index) == len(whole) + 2 * 2 * 7


def refusals(settings: Settings, registry: Registry, tmp_path: Path) -> None:
    """What is no fresh version of the recipe gives no eyes."""
    with pytest.raises(InvalidRequest, match="v1 is of method 'base'; eyes come from a recipe"):
        export_eyes("v1", registry, settings, tmp_path / "none")
    with pytest.raises(NotFound, match="no version 'v9'"):
        export_eyes("v9", registry, settings, tmp_path / "none")
    (settings.masters_dir / "embedded-blank" / MARK).write_text('{"eyes": "sha256:ab"}')
    with pytest.raises(InvalidRequest, match="v2 was trained from embedded-blank, which sees already"):
        export_eyes("v2", registry, settings, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_job_s_home_is_left_alone(settings: Settings, short: Recipe, tmp_path: Path) -> None:
    with Store.open(settings.store_url) as store:
        other = store.create_job("dpo", {}, "none")
        with pytest.raises(Conflict, match=rf"job {other.id} \(dpo\) is queued .*`noria jobs cancel {other.id}`"):
            rebuild(settings, short, tmp_path / "eyes", bars)
        assert [job.id for job in store.list_jobs()] == [other.id]
    assert not (tmp_path / "eyes").exists()


def test_a_run_that_fails_says_so_and_exports_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = {**SHORT["stages"][1], "data": [{"source": str(tmp_path / "gone.jsonl")}]}
    rebuilt = rebuild(settings, parse_recipe({**SHORT, "stages": [gone]}), tmp_path / "eyes", bars)
    assert rebuilt == Rebuilt(6)
    assert "gone.jsonl" in capsys.readouterr().err
    assert not (tmp_path / "eyes").exists()
    with Store.open(settings.store_url) as store:
        assert Registry(settings.models_dir, store).live() is None


def test_which_recipe_is_run(eyes: Eyes, tmp_path: Path) -> None:
    assert recipe_hash(recipe_to_run(None, eyes.folder)) == eyes.record.recipe_sha256
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\n[[stages]]\nname = "a"\nkind = "align"\nsteps = 1\ndata = [{source = "scenes"}]\n')
    assert recipe_to_run(file, eyes.folder) == load_recipe(file).model_copy(update={"model": "embedded-blank"})
    file.write_text(f'model = "llava"\n{file.read_text()}')
    with pytest.raises(InvalidRequest, match="recipe 'mine' starts from model 'llava', and build-embedded trains"):
        recipe_to_run(file, eyes.folder)
    eyes.weights.unlink()
    assert recipe_hash(recipe_to_run(None, eyes.folder)) == eyes.record.recipe_sha256
    with pytest.raises(
        IntegrityError, match=r"eyes\.json is missing; install Noria again, or name a recipe with --rec"
    ):
        recipe_to_run(None, tmp_path / "none")


def test_the_recipe_alone_says_what_makes_its_model(short: Recipe, tmp_path: Path) -> None:
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        registry = Registry(tmp_path / "models", store)
        with pytest.raises(NotFound, match=r"'embedded-blank' .*there is none.*`noria model build-embedded` makes it"):
            version_of(short, registry)


def test_the_command_hands_over_what_it_was_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handed: list[list[str]] = []

    def exec_(program: str, arguments: list[str], environment: Any) -> None:
        handed.append(arguments[arguments.index("train") :])
        assert environment["NORIA_HOME"] == str(tmp_path)
        raise SystemExit(0)

    monkeypatch.setattr("os.execve", exec_)
    file = tmp_path / "mine.toml"
    words = ["--home", str(tmp_path), "model", "build-embedded"]
    assert call(words) == 0
    assert call([*words, "--recipe", str(file)]) == 4
    assert "there is no recipe" in capsys.readouterr().err
    file.write_text("name = 1\n")
    assert call([*words, "--recipe", str(file)]) == 2
    assert f"{file}: name" in capsys.readouterr().err
    file.write_text('name = "mine"\n[[stages]]\nname = "a"\nkind = "align"\nsteps = 1\ndata = [{source = "scenes"}]\n')
    assert call([*words, "--out", "eyes", "--recipe", str(file), "--json"]) == 0
    assert handed == [
        ["train", "model", "build-embedded"],
        ["train", "model", "build-embedded", "--out", "eyes", "--recipe", str(file), "--json"],
    ]


def test_what_was_written_is_printed(eyes: Eyes, capsys: pytest.CaptureFixture[str]) -> None:
    print_eyes(eyes, as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["out"], told["sha256"], told["version"]) == (str(eyes.folder), eyes.record.sha256, "v2")
    assert told["files"]["eyes.safetensors"] == eyes.record.size
    assert "recipe" not in told
    print_eyes(eyes, as_json=False)
    assert capsys.readouterr().out.startswith(f"{eyes.folder}: the eyes of v2, trained in 184 s\n  MODEL_CARD.md  ")
