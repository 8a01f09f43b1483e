"""The size rule: at most 400 lines a module, 60 a function, 8 modules in a folder beside `__init__.py`.

Comes in: the repository's Python files. Goes out: one line a breach. Generated stubs (`noria/v1`) are not measured,
and the tests' folders may hold any number of modules.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

MODULE_LINES = 400
FUNCTION_LINES = 60
FOLDER_MODULES = 8
ROOTS = ("noria", "serve", "train", "tests", "proto", "deploy", "benchmarks", "examples")
GENERATED = ("noria/v1",)
ANY_NUMBER = ("tests",)


def modules(root: Path) -> Iterator[Path]:
    """The measured files, relative to the root, in order."""
    for top in ROOTS:
        for path in sorted((root / top).rglob("*.py")):
            relative = path.relative_to(root)
            if not relative.as_posix().startswith(tuple(f"{one}/" for one in GENERATED)):
                yield relative


def breaches(root: Path) -> list[str]:
    """One line for each module, function and folder that is too large."""
    found = []
    folders: Counter[Path] = Counter()
    for path in modules(root):
        text = (root / path).read_text()
        lines = text.count("\n")
        if lines > MODULE_LINES:
            found.append(f"{path}: {lines} lines, at most {MODULE_LINES}")
        if path.name != "__init__.py" and path.parts[0] not in ANY_NUMBER:
            folders[path.parent] += 1
        found += [
            f"{path}:{line}: {name} has {long} lines, at most {FUNCTION_LINES}" for line, name, long in _long(text)
        ]
    found += [f"{path}: {n} modules, at most {FOLDER_MODULES}" for path, n in folders.items() if n > FOLDER_MODULES]
    return found


def _long(text: str) -> Iterator[tuple[int, str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield node.lineno, node.name, lines


def main() -> int:
    """Prints the breaches; 1 when there are any."""
    found = breaches(Path.cwd())
    print("\n".join(found) or "sizes: every module, function and folder is small enough")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
