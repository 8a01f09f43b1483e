"""Generates the Python stubs of `proto/noria/v1/*.proto` into `noria/v1/`.

Comes in: the .proto files. Goes out: `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py`, imported as `noria.v1.*`.
`python proto/generate.py` writes them; with `--check` it writes nothing and exits 1 when they are not fresh.
Must not import noria, serve or train.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
STUBS = HERE.parent / "noria" / "v1"
DOC = '"""Stubs generated from `proto/noria/v1` by `make proto`: the wire\'s messages and services. Not edited."""\n'


def generate(out: Path) -> list[Path]:
    """Writes the stubs below `out` and returns them. Raises SystemExit with protoc's status when it fails."""
    sources = sorted(str(path) for path in (HERE / "noria" / "v1").glob("*.proto"))
    arguments = [f"-I{HERE}", f"-I{files('grpc_tools') / '_proto'}"]
    outputs = [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    status = protoc.main(["protoc", *arguments, *outputs, *sources])
    if status:
        raise SystemExit(status)
    folder = out / "noria" / "v1"
    (folder / "__init__.py").write_text(DOC)
    return sorted(folder.iterdir())


def main() -> int:
    """The command line: writes, or compares with `--check`."""
    parser = argparse.ArgumentParser(description="Generate the gRPC stubs in noria/v1.")
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 when the stubs are stale")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        fresh = generate(Path(folder))
        if check:
            return report(fresh)
        STUBS.mkdir(exist_ok=True)
        for old in STUBS.glob("*.py*"):
            old.unlink()
        for path in fresh:
            shutil.copyfile(path, STUBS / path.name)
    return 0


def report(fresh: list[Path]) -> int:
    """Says which stubs differ from what the .proto files give; 1 when any does."""
    names = {path.name for path in fresh}
    stale = sorted(path.name for path in STUBS.glob("*.py*") if path.name not in names)
    for path in fresh:
        here = STUBS / path.name
        if not here.is_file() or not filecmp.cmp(path, here, shallow=False):
            stale.append(path.name)
    if stale:
        print(f"stale in noria/v1: {', '.join(sorted(stale))}; run `make proto`", file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
