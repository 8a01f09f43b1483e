"""The settings tree: precedence, refusals that name the key, and where things lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from noria.errors import SettingsError
from noria.settings import Settings, load_settings, override_train

EXACT = {"rewards": [{"name": "exact"}]}
SHIPPED = Path(__file__).parents[2] / "deploy" / "settings"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("NORIA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))


def test_flags_win_over_environment_which_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noria.toml").write_text("[server]\nhttp_port = 1\ngrpc_port = 2\nhost = 'a'\n")
    monkeypatch.setenv("NORIA_SERVER__HTTP_PORT", "3")
    monkeypatch.setenv("NORIA_SERVER__GRPC_PORT", "4")
    server = load_settings(server={"http_port": 5}).server
    assert (server.http_port, server.grpc_port, server.host) == (5, 4, "a")


def test_the_file_is_read_from_the_home_that_is_named(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "noria.toml").write_text("[train]\nmin_pairs = 3\n")
    assert load_settings(home=other).train.min_pairs == 3
    assert load_settings().train.min_pairs == 8


def test_everything_lies_in_the_home(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.home == tmp_path
    assert settings.store_url == f"sqlite:///{tmp_path}/noria.db"
    assert settings.blobs_url == f"file://{tmp_path}/blobs"
    assert settings.models_dir == tmp_path / "models"
    assert settings.masters_dir == tmp_path / "masters"
    assert settings.jobs_dir == tmp_path / "jobs"


@pytest.mark.parametrize(
    ("toml", "key"),
    [
        ("[server]\nhtp_port = 1\n", "server.htp_port"),
        ("[servr]\nhttp_port = 1\n", "servr"),
        ("[server]\nhttp_port = 70000\n", "server.http_port"),
        ("[train.dpo]\nbeta = -1\n", "train.dpo.beta"),
        ("[train.simpo]\nnll_wait = 1\n", "train.simpo.nll_wait"),
        ("[train.kto]\nmicro_batch_size = 1\n", "train.kto.micro_batch_size"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, toml: str, key: str) -> None:
    (tmp_path / "noria.toml").write_text(toml)
    with pytest.raises(SettingsError) as refused:
        load_settings()
    assert refused.value.param == key
    assert key in refused.value.message


def test_a_wrong_nested_environment_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_SERVER__HTP_PORT", "1")
    with pytest.raises(SettingsError, match=r"server\.htp_port.*unknown key"):
        load_settings()


def test_a_wrong_section_in_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_SERVR__HTTP_PORT", "1")
    with pytest.raises(SettingsError, match=r"NORIA_SERVR__HTTP_PORT.*'servr'.*server"):
        load_settings()


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.toml")), ids=lambda file: file.name)
def test_every_shipped_file_loads(file: Path, tmp_path: Path) -> None:
    (tmp_path / "noria.toml").write_bytes(file.read_bytes())
    assert load_settings(home=tmp_path) != load_settings(home=tmp_path / "empty")


def test_files_are_shipped() -> None:
    assert {"cpu.toml", "one-gpu.toml"} <= {file.name for file in SHIPPED.glob("*.toml")}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ({"train": {"dpo": {"batch_size": 5, "micro_batch_size": 2}}}, ("dpo.batch_size=5", "dpo.micro_batch_size=2")),
        ({"train": {"kto": {"batch_size": 9, "micro_batch_size": 2}}}, ("kto.batch_size=9", "kto.micro_batch_size=2")),
        (
            {"train": {"dpo": {"loss_type": "sigmoid_norm", "label_smoothing": 0.1}}},
            ("dpo.label_smoothing=0.1", "dpo.loss_type='sigmoid_norm'"),
        ),
        (
            {"train": {"dpo": {"loss_type": "robust", "label_smoothing": 0}}},
            ("dpo.label_smoothing=0", "dpo.loss_type='robust'"),
        ),
        (
            {"train": {"mpo": {"preference_weight": 0, "quality_weight": 0}}},
            ("mpo.preference_weight=0", "mpo.quality_weight=0"),
        ),
        ({"train": {"modules": {"vision_tower": "full"}}}, ("train.modules.vision_tower", "train.policy.method")),
        ({"train": {"modules": {"language_model": "frozen", "aligner": "full"}}}, ("language_model", "train.policy")),
        ({"train": {"only": "aligner"}}, ("train.only", "train.policy.method")),
        ({"train": {"policy": {"method": "grpo"}}}, ("train.policy.method", "train.reward.rewards")),
        (
            {"train": {"policy": {"method": "grpo"}, "reward": EXACT, "modules": {"aligner": "full"}}},
            ("train.policy.method='grpo'", "train.modules.aligner.policy='full'"),
        ),
        (
            {"train": {"policy": {"method": "grpo"}, "reward": EXACT, "only": "language_model"}},
            ("train.policy.method='grpo'", 'train.only="language_model"'),
        ),
        ({"train": {"modules": {"language_model": "full"}, "base": "gptq"}}, ("modules.language_model", "train.base")),
    ],
)
def test_a_conflict_names_both_keys(flags: dict[str, object], names: tuple[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load_settings(**flags)
    assert all(name in refused.value.message for name in names)


@pytest.mark.parametrize(
    ("dpo", "filled_in"),
    [
        ({}, (0.1, 0.0)),
        ({"loss_type": "ipo"}, (0.1, 0.0)),
        ({"loss_type": "robust"}, (0.1, 0.1)),
        ({"loss_type": "sigmoid_norm"}, (5.0, 0.0)),
        ({"loss_type": "sigmoid_norm", "beta": 2.0}, (2.0, 0.0)),
        ({"loss_type": "robust", "label_smoothing": 0.3}, (0.1, 0.3)),
    ],
)
def test_what_is_not_said_of_dpo_is_its_losss_default(dpo: dict[str, object], filled_in: tuple[float, float]) -> None:
    found = load_settings(train={"dpo": dpo}).train.dpo
    assert (found.strength, found.smoothing) == filled_in


def test_the_tree_is_frozen_and_keeps_its_secret() -> None:
    settings = load_settings(server={"api_key": "hush"})
    with pytest.raises(ValueError, match="frozen"):
        settings.server.http_port = 1  # type: ignore[misc]
    assert "hush" not in repr(settings)
    assert "hush" not in settings.model_dump_json()
    assert settings.server.api_key is not None
    assert settings.server.api_key.get_secret_value() == "hush"


def test_where_automatic_jobs_are_of_grpo_an_operators_may_train_what_no_adapter_holds() -> None:
    base = load_settings(train={"policy": {"method": "grpo"}, "reward": EXACT}).train
    assert override_train(base, {"modules": {"aligner": "full"}}).policies()["aligner"].policy == "full"
    off = load_settings(train={"policy": {"method": "grpo", "automatic": False}, "modules": {"aligner": "full"}})
    assert off.train.policy.method == "grpo"


def test_a_job_overrides_a_part_and_keeps_the_rest() -> None:
    base = Settings().train
    changed = override_train(base, {"dpo": {"beta": 0.2}, "min_pairs": 2})
    assert (changed.dpo.beta, changed.min_pairs) == (0.2, 2)
    assert changed.modules == base.modules
    assert changed.quantize == base.quantize
    with pytest.raises(SettingsError) as refused:
        override_train(base, {"dpo": {"betta": 0.2}})
    assert refused.value.param == "settings.dpo.betta"
