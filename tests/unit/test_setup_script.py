"""`deploy/scripts/setup.sh` with a written stand-in for the venv's Python: which sources it asks, what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "deploy" / "scripts" / "setup.sh"
INDEX = "--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON = f"""#!/bin/bash
case "$*" in
    "-c "*) exec {sys.executable} "$@" ;;
    *"pip list"*) cat "$HERE/packages" 2>/dev/null; exit 0 ;;
esac
echo "$*" >>"$HERE/asked"
if [[ "$*" == *"torch=="* && "$*" != *extra-index-url* && -e "$HERE/no-torch" ]] || [[ -e "$HERE/no-index" ]]; then
    echo "ERROR: No matching distribution found for torch"
    exit 1
fi
"""


class Clone:
    """A folder with the script, a pyproject.toml and a venv whose programs only note how they were called."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "deploy" / "scripts").mkdir(parents=True)
        (folder / ".venv" / "bin").mkdir(parents=True)
        (folder / "bin").mkdir()
        shutil.copy(SCRIPT, folder / "deploy" / "scripts" / "setup.sh")
        (folder / "pyproject.toml").write_text("[project]\n")
        self.program(".venv/bin/python", PYTHON)
        self.program(".venv/bin/noria", '#!/bin/bash\necho "noria $*" >>"$HERE/asked"\n')

    def program(self, path: str, text: str) -> None:
        """Writes an executable."""
        (self.folder / path).write_text(text)
        (self.folder / path).chmod(0o755)

    def set_up(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the script."""
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        given = {**os.environ, "FLAVOUR": "cpu", **environment, "HERE": str(self.folder), "PATH": path}
        command = ["bash", str(self.folder / "deploy" / "scripts" / "setup.sh")]
        return subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=60)

    def asked(self) -> list[str]:
        """What pip and noria were called with, without the words that are always there."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [line.removeprefix("-m pip install --progress-bar off ") for line in lines]


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_configured_sources_come_first_and_torch_stays_the_cpu_build(clone: Clone) -> None:
    assert clone.set_up().returncode == 0
    assert clone.asked() == [
        "--no-deps torch==2.13.0+cpu",
        "-c .venv/constraints.txt -e .[cpu,dev]",
        "noria doctor",
    ]
    assert (clone.folder / ".venv" / "constraints.txt").read_text() == "torch==2.13.0+cpu\n"


def test_pytorchs_index_is_asked_when_they_do_not_have_it(clone: Clone) -> None:
    (clone.folder / "no-torch").touch()
    done = clone.set_up()
    assert done.returncode == 0
    assert clone.asked()[:3] == [
        "--no-deps torch==2.13.0+cpu",
        f"--no-deps {INDEX} torch==2.13.0+cpu",
        f"{INDEX} -c .venv/constraints.txt -e .[cpu,dev]",
    ]


def test_torch_that_nobody_has_is_said_and_nothing_is_installed(clone: Clone) -> None:
    (clone.folder / "no-index").touch()
    done = clone.set_up()
    assert done.returncode == 1
    assert "was found neither in pip's sources nor at" in done.stderr
    assert "ERROR: No matching distribution" in done.stderr
    assert not any("-e" in line.split() for line in clone.asked())


def test_a_second_run_only_asks_the_doctor(clone: Clone) -> None:
    clone.set_up()
    (clone.folder / "asked").unlink()
    assert clone.set_up().returncode == 0
    assert clone.asked() == ["noria doctor"]
    (clone.folder / "pyproject.toml").write_text("[project]\nname = 'changed'\n")
    clone.set_up()
    assert "-c .venv/constraints.txt -e .[cpu,dev]" in clone.asked()


def test_cuda_packages_on_a_machine_without_a_gpu_are_refused(clone: Clone) -> None:
    (clone.folder / "packages").write_text("nvidia-ml-py==13.0\nnvidia-cublas-cu13==1.0\nnvidia-cuda-runtime==13.0\n")
    done = clone.set_up()
    assert done.returncode == 1
    assert "nvidia-cublas-cu13==1.0 nvidia-cuda-runtime==13.0" in done.stderr
    assert "nvidia-ml-py" not in done.stderr
    assert not (clone.folder / ".venv" / "noria-setup.stamp").exists()


def test_a_gpu_that_is_found_takes_the_gpu_packages(clone: Clone) -> None:
    clone.program("bin/nvidia-smi", "#!/bin/bash\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\n")
    assert clone.set_up(FLAVOUR="").returncode == 0
    assert clone.asked() == ["-e .[gpu,dev]", "noria doctor"]


def test_a_driver_without_a_gpu_is_a_cpu_machine(clone: Clone) -> None:
    clone.program("bin/nvidia-smi", "#!/bin/bash\necho 'No devices were found'\nexit 6\n")
    assert clone.set_up(FLAVOUR="").returncode == 0
    assert "--no-deps torch==2.13.0+cpu" in clone.asked()
