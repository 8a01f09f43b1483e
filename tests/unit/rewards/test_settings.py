"""The rewards of a settings file: what is refused, by which key, and that the tree survives being written down."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from noria.cli.config import _toml
from noria.errors import SettingsError
from noria.rewards import NAMES, ExactOptions, RegexOptions, RewardSettings, parse_rewards
from noria.settings import TrainSettings, load_settings, override_train
from tests.checks.documented import unexplained_settings
from train.rewards.registry import BUILDERS

PAGE = Path(__file__).parents[3] / "docs" / "rewards.md"
NEEDED: dict[str, dict[str, Any]] = {
    "regex": {"pattern": "a"},
    "json_schema": {"definition": {"type": "object"}},
    "length": {"high": 10},
    "language": {"languages": ["en"]},
    "judge": {"url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "short"},
    "python": {"function": "a:b"},
}


@pytest.fixture(autouse=True)
def bare_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))


def test_there_is_a_builder_for_every_name() -> None:
    assert set(BUILDERS) == set(NAMES)
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_each_is_read_by_its_name_with_weight_and_label(name: str) -> None:
    (found,) = parse_rewards([{"name": name, "weight": -0.5, "label": "mine", **NEEDED.get(name, {})}])
    assert type(found) is NAMES[name]
    assert (found.weight, found.key) == (-0.5, "mine")


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained_here_and_on_the_page(name: str) -> None:
    assert NAMES[name].__doc__
    assert list(unexplained_settings(NAMES[name])) == []
    page = PAGE.read_text()
    section = page[page.index(f"\n## {name}\n") :]
    section = section[: section.find("\n## ", 5)]
    missing = [option for option in NAMES[name].model_fields if f"`{option}`" not in section]
    assert set(missing) <= {"name", "weight", "label"}
    assert f'name = "{name}"' in section


def test_the_page_s_examples_are_good() -> None:
    blocks = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    seen: set[str] = set()
    for block in blocks:
        if block.startswith("["):
            seen |= {one.name for one in RewardSettings(**tomllib.loads(block)["train"]["reward"]).rewards}
            continue
        listed = "rewards = [\n" + block.replace("\n{name", ",\n{name") + "]"
        seen |= {one.name for told in tomllib.loads(listed)["rewards"] for one in parse_rewards([told])}
    assert seen == set(NAMES)


@pytest.mark.parametrize(
    ("reward", "key", "told"),
    [
        ({"name": "exat"}, "rewards.0", "'exact'"),
        ({"weight": 1.0}, "rewards.0", "name"),
        ({"name": "exact", "metrik": "number"}, "rewards.0.exact.metrik", "unknown key"),
        ({"name": "exact", "metric": "nearly"}, "rewards.0.exact.metric", "contains"),
        ({"name": "exact", "weight": "inf"}, "rewards.0.exact.weight", "finite"),
        ({"name": "regex"}, "rewards.0.regex.pattern", "required"),
        ({"name": "regex", "pattern": "("}, "rewards.0.regex.pattern", "not a regular expression"),
        ({"name": "json_schema"}, "rewards.0.json_schema", "definition or file"),
        ({"name": "length", "low": 5, "high": 4}, "rewards.0.length", "low=5 is above high=4"),
        ({"name": "language", "languages": []}, "rewards.0.language.languages", "at least 1"),
        ({"name": "python", "function": "module"}, "rewards.0.python.function", "pattern"),
        ({**NEEDED["judge"], "name": "judge", "lowest": 5, "highest": 5}, "rewards.0.judge", "lowest=5.0"),
        ({"name": "preferences", "min_accuracy": 2}, "rewards.0.preferences.min_accuracy", "less than or equal to 1"),
    ],
)
def test_a_wrong_option_is_refused_by_its_key(reward: dict[str, Any], key: str, told: str) -> None:
    with pytest.raises(SettingsError, match="rewards") as refused:
        parse_rewards([reward])
    assert refused.value.param == key
    assert key in refused.value.message
    assert told in refused.value.message


def test_two_of_one_name_need_labels() -> None:
    two = [{"name": "regex", "pattern": "a"}, {"name": "regex", "pattern": "b"}]
    with pytest.raises(SettingsError, match="two rewards are called 'regex'"):
        parse_rewards(two)
    with pytest.raises(SettingsError, match="two rewards are called 'regex'"):
        load_settings(train={"reward": {"rewards": two}})
    assert [one.key for one in parse_rewards([two[0], {**two[1], "label": "b"}])] == ["regex", "b"]


def test_the_home_s_file_and_a_job_state_them(tmp_path: Path) -> None:
    (tmp_path / "noria.toml").write_text(
        "[train.reward]\nmax_failure_rate = 0.5\nrewards = [\n"
        '    {name = "exact", metric = "number"},\n    {name = "regex", pattern = "^ok$", weight = 0.5},\n]\n'
    )
    reward = load_settings().train.reward
    assert reward.rewards == (ExactOptions(metric="number"), RegexOptions(pattern="^ok$", weight=0.5))
    assert (reward.max_failure_rate, reward.failure_window) == (0.5, 200)
    changed = override_train(load_settings().train, {"reward": {"rewards": [{"name": "exact"}]}})
    assert changed.reward == RewardSettings(rewards=(ExactOptions(),), max_failure_rate=0.5)
    with pytest.raises(SettingsError) as refused:
        override_train(TrainSettings(), {"reward": {"rewards": [{"name": "regex", "patern": "a"}]}})
    assert refused.value.param == "settings.reward.rewards.0.regex.pattern"


def test_the_environment_states_them_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_TRAIN__REWARD__REWARDS", '[{"name": "length", "high": 9}]')
    (found,) = load_settings().train.reward.rewards
    assert found.model_dump(exclude_defaults=True) == {"name": "length", "high": 9}


def test_a_tree_without_defaults_is_read_again() -> None:
    settings = RewardSettings(rewards=parse_rewards([{"name": name, **NEEDED.get(name, {})} for name in NAMES]))
    kept = settings.model_dump(mode="json", exclude_defaults=True)
    assert kept["rewards"][0] == {"name": "exact"}
    assert RewardSettings.model_validate(kept) == settings


def test_what_config_show_prints_is_toml_that_loads_again(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a b": {"enum": ["ü", 1, True]}}}
    rewards = [{"name": "json_schema", "definition": schema}, {"name": "judge", **NEEDED["judge"]}]
    settings = load_settings(train={"reward": {"rewards": rewards}})
    text = "\n".join(_toml(settings.model_dump(mode="json")["train"]["reward"]))
    assert RewardSettings.model_validate(tomllib.loads(text)) == settings.train.reward


def test_the_ground_floor_checks_them_without_torch() -> None:
    heavy = ("torch", "train", "transformers", "regex")
    told = f"import noria.rewards, sys; sys.exit(any(m in sys.modules for m in {heavy}))"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
