"""What an operator cannot switch on by vLLM's own arguments."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from noria.errors import SettingsError
from noria.settings import EngineSettings, Settings
from serve.engine.launch import engine_flags, parse_flags


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        ("--trust-remote-code", "runs code that comes with a checkpoint"),
        ("--load-format=pt", "safetensors alone"),
        ("--load-format=auto", "safetensors alone"),
        ("--load-format=dummy", "safetensors alone"),
        ("--allowed-local-media-path=/", "input.images.allowed_folder"),
        ('--allowed-media-domains=["example.com"]', "input.images.allowed_hosts"),
        ("--enable-mm-embeds", "unpickles what clients send"),
        ("--enable-prompt-embeds", "unpickles what clients send"),
        ("--trust-request-mm-kwargs", "what the model was shown"),
    ],
)
def test_unsafe_arguments_are_refused(tmp_path: Path, argument: str, told: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    settings = Settings(home=tmp_path, engine=EngineSettings(args=(argument,)))
    with pytest.raises(SettingsError, match=told) as refused:
        parse_flags(engine_flags(settings, tmp_path, "v1"))
    assert refused.value.param == "engine.args"


def test_without_them_weights_are_safetensors(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    args = parse_flags(engine_flags(Settings(home=tmp_path), tmp_path, "v1"))
    assert (args.load_format, args.trust_remote_code) == ("safetensors", False)
