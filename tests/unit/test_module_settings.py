"""What an operator may say of the three modules: shorthands, defaults, and contradictions that name both keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from noria.errors import SettingsError
from noria.module_settings import PREFERENCE, ModulePolicies, PolicyDefaults, ResolvedPolicy
from noria.records import MODULES
from noria.settings import TrainSettings, load_settings, override_train

EVERYTHING = PolicyDefaults(dict.fromkeys(MODULES, "full"), dict.fromkeys(MODULES, 1e-6), 1e-4)


def resolved(stated: dict[str, Any], **more: Any) -> dict[Any, ResolvedPolicy]:
    return ModulePolicies.model_validate(stated).resolved(**more)


def test_what_is_not_stated_is_the_kind_of_trainings_default() -> None:
    told = resolved({})
    assert told["vision_tower"] == told["aligner"] == ResolvedPolicy("frozen")
    assert told["language_model"] == ResolvedPolicy("lora", 5e-5, 0.0, 16, 32.0, 0.0)
    assert {(p.policy, p.learning_rate) for p in resolved({}, defaults=EVERYTHING).values()} == {("full", 1e-6)}


def test_a_word_stands_for_its_policy_and_a_value_keeps_the_default_policy() -> None:
    told = resolved({"aligner": "lora", "language_model": {"rank": 4, "learning_rate": 1e-3}})
    assert told["aligner"] == ResolvedPolicy("lora", PREFERENCE.lora_rate, 0.0, 16, 32.0)
    assert told["language_model"] == ResolvedPolicy("lora", 1e-3, 0.0, 4, 32.0)


def test_only_stands_for_three_policies() -> None:
    told = resolved({"aligner": {"learning_rate": 1e-3}}, only="aligner")
    assert [told[m].policy for m in MODULES] == ["frozen", "full", "frozen"]
    assert told["aligner"].learning_rate == 1e-3
    same = resolved({"vision_tower": "frozen", "aligner": "full", "language_model": "frozen"}, only="aligner")
    assert [told[m].policy for m in MODULES] == [same[m].policy for m in MODULES]


@pytest.mark.parametrize(
    ("stated", "only", "keys"),
    [
        ({"aligner": {"policy": "frozen", "rank": 8}}, None, ("modules.aligner.rank=8", "modules.aligner.policy")),
        ({"aligner": {"rank": 8}}, None, ("modules.aligner.rank=8", "modules.aligner.policy='frozen', its default")),
        ({"vision_tower": {"learning_rate": 1e-4}}, None, ("vision_tower.learning_rate", "vision_tower.policy")),
        ({"aligner": {"weight_decay": 0.1}}, None, ("aligner.weight_decay", "aligner.policy")),
        ({"vision_tower": {"last_blocks": 2}}, None, ("vision_tower.last_blocks=2", "vision_tower.policy")),
        ({"language_model": {"policy": "full", "alpha": 3}}, None, ("language_model.alpha", "policy='full'")),
        ({"language_model": {"policy": "full", "dropout": 0}}, None, ("language_model.dropout", "policy='full'")),
        ({"language_model": {"policy": "full", "targets": ["q"]}}, None, ("targets", "policy='full'")),
        ({"aligner": {"policy": "lora", "last_blocks": 1}}, None, ("modules.aligner.last_blocks", "no blocks")),
        ({"vision_tower": {"gradient_checkpointing": True}}, None, ("gradient_checkpointing", "policy='frozen'")),
        ({"aligner": {"gradient_checkpointing": True}}, None, ("aligner.gradient_checkpointing", "aligner.policy")),
        ({"language_model": "lora"}, "language_model", ("modules.language_model.policy='lora'", "train.only=")),
        ({"vision_tower": "full"}, "aligner", ("modules.vision_tower.policy='full'", 'train.only="aligner"')),
        ({"language_model": {"rank": 2}}, "language_model", ("language_model.rank=2", 'train.only="language_model"')),
        ({"language_model": "frozen"}, None, ("vision_tower.policy", "language_model.policy", "nothing would train")),
    ],
)
def test_a_contradiction_names_both_keys(stated: dict[str, Any], only: Any, keys: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"train\.modules\.") as refused:
        resolved(stated, only=only)
    assert all(key in str(refused.value) for key in keys), str(refused.value)


def test_a_frozen_decoder_may_be_checkpointed_while_gradients_pass_it() -> None:
    told = resolved({"language_model": {"policy": "frozen", "gradient_checkpointing": True}, "aligner": "full"})
    assert told["language_model"] == ResolvedPolicy("frozen", gradient_checkpointing=True)
    behind = resolved({"vision_tower": "full", "aligner": {"policy": "frozen", "gradient_checkpointing": True}})
    assert behind["aligner"].gradient_checkpointing is True


def test_a_job_states_another_policy_than_the_file() -> None:
    base = TrainSettings.model_validate({"modules": {"aligner": "full", "language_model": {"learning_rate": 1e-4}}})
    job = override_train(base, {"modules": {"aligner": "lora", "language_model": {"rank": 2}}})
    assert job.policies()["aligner"].policy == "lora"
    assert job.policies()["language_model"] == ResolvedPolicy("lora", 1e-4, 0.0, 2, 32.0)
    assert override_train(TrainSettings(), {"only": "language_model"}).policies()["language_model"].policy == "full"
    with pytest.raises(SettingsError, match=r"modules\.aligner\.policy='full' contradicts train\.only"):
        override_train(base, {"only": "language_model"})


def test_the_environment_states_a_word_a_value_or_a_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORIA_TRAIN__MODULES__ALIGNER", "full")
    monkeypatch.setenv("NORIA_TRAIN__MODULES__LANGUAGE_MODEL__RANK", "8")
    told = load_settings(home=tmp_path).train.policies()
    assert (told["aligner"].policy, told["language_model"].rank) == ("full", 8)
    monkeypatch.setenv("NORIA_TRAIN__MODULES__ALIGNER", '{"policy": "lora", "rank": 2}')
    assert load_settings(home=tmp_path).train.policies()["aligner"].rank == 2
    monkeypatch.setenv("NORIA_TRAIN__MODULES__ALIGNER", "half")
    with pytest.raises(SettingsError, match=r"train\.modules\.aligner\.policy"):
        load_settings(home=tmp_path)


def test_the_record_says_only_what_applies() -> None:
    told = resolved({"aligner": "full", "language_model": {"rank": 4, "targets": ["q_proj"], "last_blocks": 2}})
    assert told["vision_tower"].record() == {"policy": "frozen"}
    assert told["aligner"].record() == {"policy": "full", "learning_rate": 1e-5, "weight_decay": 0.0}
    assert told["language_model"].record() == {
        "policy": "lora",
        "learning_rate": 5e-5,
        "weight_decay": 0.0,
        "rank": 4,
        "alpha": 32.0,
        "dropout": 0.0,
        "targets": ["q_proj"],
        "last_blocks": 2,
    }
