"""The checkers of the house rules find what they are there for."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from tests.checks import documented, papers, sizes


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for top in ("noria", "tests/unit", "noria/v1"):
        (tmp_path / top).mkdir(parents=True, exist_ok=True)
    return tmp_path


def test_a_small_tree_passes(tree: Path) -> None:
    (tree / "noria" / "a.py").write_text('"""A."""\n\n\ndef f() -> None:\n    """F."""\n')
    assert sizes.breaches(tree) == []
    assert list(documented.undocumented(tree)) == []


def test_long_modules_and_functions_are_named(tree: Path) -> None:
    (tree / "noria" / "long.py").write_text('"""A."""\n' * 401)
    (tree / "noria" / "f.py").write_text("def f():\n" + "    x = 1\n" * 60)
    (tree / "noria" / "v1" / "stub.py").write_text('"""A."""\n' * 1000)
    assert sizes.breaches(tree) == [
        "noria/f.py:1: f has 61 lines, at most 60",
        "noria/long.py: 401 lines, at most 400",
    ]


def test_a_full_folder_is_named_but_not_a_folder_of_tests(tree: Path) -> None:
    for number in range(9):
        (tree / "noria" / f"m{number}.py").write_text('"""M."""\n')
        (tree / "tests" / "unit" / f"m{number}.py").write_text('"""M."""\n')
    (tree / "noria" / "__init__.py").write_text('"""N."""\n')
    assert sizes.breaches(tree) == ["noria: 9 modules, at most 8"]


def test_missing_docstrings_are_named(tree: Path) -> None:
    (tree / "noria" / "a.py").write_text("class A:\n    def b(self): ...\n    def _c(self): ...\n\ndef d(): ...\n")
    (tree / "tests" / "unit" / "t.py").write_text('"""T."""\ndef test_t(): ...\n')
    assert list(documented.undocumented(tree)) == [
        "noria/a.py:1: the module has no docstring",
        "noria/a.py:1: A has no docstring",
        "noria/a.py:2: A.b has no docstring",
        "noria/a.py:5: d has no docstring",
    ]


def test_a_setting_without_a_doc_is_named() -> None:
    class Tree(BaseModel):
        """A tree."""

        bare: int = 1

    assert list(documented.unexplained_settings(Tree)) == ["setting bare has no doc beneath it"]
    assert list(documented.unexplained_settings()) == []


def test_every_command_has_help_and_an_example_of_itself() -> None:
    assert list(documented.unhelpful_commands()) == []
    names = {name for name, _ in documented.commands()}
    design = "up serve train retrain rollout rollback versions status why jobs prefs model config doctor demo"
    assert set(design.split()) <= names
    assert {f"prefs {one}" for one in ("stats", "list", "export", "import", "forget")} <= names
    assert {f"jobs {one}" for one in ("list", "show", "cancel", "watch")} <= names
    assert {"versions list", "versions show", "model add", "model list", "config show"} <= names


def test_the_pages_say_what_the_code_says() -> None:
    cli, settings = papers.cli_page(), papers.settings_page()
    assert "## noria prefs export\n" in cli
    assert "noria retrain --wait --settings dpo.beta=0.2" in cli
    assert "| `http_port` | integer, at least 0, at most 65535 | `8000` | HTTP port; 0 takes a free one. |" in settings
    assert "## [train.dpo]\n" in settings
