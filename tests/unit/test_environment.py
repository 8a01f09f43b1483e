"""What the engine's processes find in their environment."""

from __future__ import annotations

import os

import pytest

from noria.settings import load_settings
from serve.engine import environment


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, and an environment that ends with the test."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "OMP_", "NORIA_"))}
    monkeypatch.setattr(os, "environ", kept)
    monkeypatch.setattr(environment, "has_gpu", lambda: False)


@pytest.mark.parametrize(("asked", "told"), [(False, "0"), (True, "1")])
def test_activations_are_rounded_only_where_asked(asked: bool, told: str) -> None:
    environment.set_environment(load_settings(engine={"int8_activations": asked}))
    assert os.environ["VLLM_CPU_INT4_W4A8"] == told


def test_an_operator_s_own_variable_stays() -> None:
    os.environ["OMP_WAIT_POLICY"] = "active"
    environment.set_environment(load_settings())
    assert os.environ["OMP_WAIT_POLICY"] == "active"
    assert os.environ["OMP_NUM_THREADS"] == str(os.cpu_count())


def test_threads_of_the_settings_win() -> None:
    os.environ["OMP_NUM_THREADS"] = "7"
    environment.set_environment(load_settings(engine={"threads": 1}))
    assert os.environ["OMP_NUM_THREADS"] == "1"
