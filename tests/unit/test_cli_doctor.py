"""The doctor: each check tells a sound machine from a wrong one, and the real installation is sound."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from noria.cli.doctor import checks, command
from noria.cli.main import call

CPU_TORCH = {"version": "2.13.0+cpu", "cuda": None, "gpu": False, "threads": 2}
CUDA_TORCH = {"version": "2.13.0", "cuda": "13.0", "gpu": True, "threads": 2}


@pytest.mark.parametrize(
    ("seen", "gpu", "state"),
    [
        (CPU_TORCH, False, "ok"),
        (CUDA_TORCH, True, "ok"),
        (CUDA_TORCH, False, "fail"),
        ({**CUDA_TORCH, "gpu": False}, True, "fail"),
        ({"error": "OSError: libx.so"}, False, "fail"),
    ],
)
def test_torch_fits_the_machine(seen: dict[str, object], gpu: bool, state: str) -> None:
    found = checks.torch(seen, gpu)
    assert (found.state, found.fix is None) == (state, state == "ok")


def test_torchvision_is_sound_or_repaired() -> None:
    assert checks.torchvision({"needed": False, "active": False, "detail": "fits"}).state == "ok"
    assert checks.torchvision({"needed": True, "active": True, "detail": "works"}).detail == "repaired: works"
    assert checks.torchvision({"needed": True, "active": False, "detail": "no"}).state == "fail"


def test_vllm_and_its_kernels() -> None:
    assert checks.vllm({"version": "0.31.0", "device": "cpu"}, gpu=False).state == "ok"
    assert checks.vllm({"version": "0.31.0", "device": ""}, gpu=True).state == "fail"
    assert checks.kernels({"wanted": ["a", "b"], "found": ["b"]}).detail == "GPTQ: b"
    assert checks.kernels({"wanted": ["a"], "found": []}).state == "fail"


def test_amounts_fail_below_the_least_and_warn_below_the_good() -> None:
    states = [checks.amount("disk", "", found, least=3, good=10).state for found in (2.9, 3.0, 9.9, 10.0)]
    assert states == ["fail", "warn", "warn", "ok"]


def test_a_home_that_cannot_be_written_fails(tmp_path: Path) -> None:
    assert checks.disk(tmp_path / "a" / "b").state != "fail"
    assert checks.disk(Path("/proc/noria")).state == "fail"


def test_cuda_packages_are_told_from_the_driver_tool() -> None:
    names = ["nvidia-cublas", "nvidia-cuda-runtime-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"]
    assert all(checks.CUDA_PACKAGE.match(name) for name in names)
    assert not checks.CUDA_PACKAGE.match("nvidia-ml-py")


def test_requirements_that_are_not_met_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "sample-1.0.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", "Name: sample", "Version: 1.0"]
    needs = [
        "typer<0.1",
        "no-such-package-here",
        "pytest>=1",
        "absent>=1; extra == 'gpu'",
        "sample[model]; extra == 'cpu'",
    ]
    (info / "METADATA").write_text("\n".join(lines + [f"Requires-Dist: {need}" for need in needs]) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(checks.unmet("sample", {"cpu", "model"}))
    assert found[0].startswith("typer ")
    assert found[0].endswith("is not <0.1")
    assert found[1:] == ["no-such-package-here is missing"]
    assert "absent is missing" in list(checks.unmet("sample", {"gpu"}))


def test_a_probe_that_crashes_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/sh\necho 'illegal instruction' >&2\nexit 132\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    seen = command.probe()
    assert seen["vllm"] == {"error": "the probe ended with status 132: illegal instruction"}


def test_this_installation_is_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--home", str(tmp_path), "doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    names = {one["name"] for one in told["checks"]}
    assert {"python", "torch", "torchvision", "vllm", "kernels", "disk", "memory"} <= names
