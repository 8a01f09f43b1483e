"""A server aside, short of its engine: which version it takes, its flag, and that its chat handler keeps nothing.

The engine's part runs in tests/flow/test_eval.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from noria.errors import IntegrityError, NotFound
from noria.registry import ManifestDraft, Registry
from noria.settings import CaptureSettings
from noria.store import Store
from serve.__main__ import parse
from serve.capture.chat import CapturingChat
from serve.live import version_aside


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """v1, v2, v3; nothing is live."""
    with Store.open(f"sqlite:///{tmp_path / 'noria.db'}") as store:
        registry = Registry(tmp_path / "models", store)
        for number in range(3):
            staging = registry.begin("test")
            (staging / "serving").mkdir()
            (staging / "serving" / "config.json").write_text(str(number))
            registry.publish(staging, ManifestDraft(method="base"))
        yield registry


def test_the_named_version_is_taken_and_nothing_goes_live(registry: Registry) -> None:
    with pytest.raises(NotFound, match="nothing is live"):
        version_aside(registry)
    registry.promote("v1")
    registry.set_state("v3", "rejected")
    assert version_aside(registry).id == "v1"
    assert version_aside(registry, "v3").id == "v3"  # also a rejected one can be looked at
    assert version_aside(registry, "v2").fingerprint.startswith("v2-")
    assert (registry.live(), registry.previous()) == ("v1", None)
    assert [one.state for one in registry.list_versions()] == ["live", "candidate", "rejected"]


def test_a_version_whose_bytes_changed_is_refused(registry: Registry) -> None:
    (registry.path("v2") / "serving" / "config.json").write_text("7")
    with pytest.raises(IntegrityError):
        version_aside(registry, "v2")
    with pytest.raises(NotFound):
        version_aside(registry, "v9")


def test_the_flag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NORIA_HOME", str(tmp_path))
    settings, model, aside = parse(["--aside", "--model", "v2", "--http-port", "0"])
    assert (settings.server.http_port, model, aside) == (0, "v2", True)
    assert parse([])[1:] == (None, False)


class Plain:
    """Stands where vLLM's handler would."""

    async def chat_completion_full_generator(self, *args: Any, **kwargs: Any) -> Any:
        """An answer at once."""
        return SimpleNamespace(choices=[])


class Chat(CapturingChat, Plain):
    """The mixin in front of it."""


@pytest.mark.parametrize("stored", [True, False, None])
async def test_without_a_queue_nothing_is_kept_whatever_the_request_says(stored: bool | None) -> None:
    chat = Chat()
    chat.noria_capture, chat.noria_settings = None, CaptureSettings(default=True)
    request = SimpleNamespace(model_extra={"store": stored}, stream=False)
    answer = await chat.chat_completion_full_generator(request, None, "id", "noria")
    assert answer.choices == []
    assert chat._tape(request, "id", "noria") is None
