"""The one settings tree: what an operator can turn, with its unit, default and doc.

Comes in: `noria.toml`, `NORIA_*` environment, flags (in that order of precedence). Goes out: a frozen `Settings`.
Environment names nest with two underscores: `NORIA_SERVER__HTTP_PORT=9000`. Unknown keys are refused.
Must not import torch, vllm or fastapi.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from noria.errors import SettingsError
from noria.methods.grpo import policy_conflict
from noria.methods.table import METHODS
from noria.settings.input import InputSettings
from noria.settings.keeping import CaptureSettings, StoreSettings
from noria.settings.limits import LimitSettings
from noria.settings.privacy import PrivacySettings
from noria.settings.serving import EngineSettings, ReleaseSettings, SamplingSettings, ServerSettings
from noria.settings.training import TrainSettings
from noria.settings.wire import DoorSettings
from noria.tls import Trust


class Settings(BaseSettings):
    """Everything an operator can set. Precedence: flags, then `NORIA_*` environment, then `noria.toml`."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        env_prefix="NORIA_",
        env_nested_delimiter="__",
    )

    home: Path = Path("~/.noria")
    """NORIA_HOME: settings, store, pictures, models and jobs."""
    url: str | None = None
    """NORIA_URL: where commands find the server; none is the home's own, else server.http_port here."""
    api_key: SecretStr | None = None
    """NORIA_API_KEY: the key that commands and the trainer show to a server; none is server.api_key."""
    tls_ca: Path | None = None
    """NORIA_TLS_CA: PEM file of the authorities whose servers commands and the trainer trust; none is the system's."""
    tls_cert: Path | None = None
    """NORIA_TLS_CERT: PEM file of the certificate that commands and the trainer show to a server with
    `server.tls.client_ca`."""
    tls_key: Path | None = None
    """NORIA_TLS_KEY: PEM file of its private key."""
    server: ServerSettings = ServerSettings()
    input: InputSettings = InputSettings()
    doors: DoorSettings = DoorSettings()
    engine: EngineSettings = EngineSettings()
    sampling: SamplingSettings = SamplingSettings()
    limits: LimitSettings = LimitSettings()
    capture: CaptureSettings = CaptureSettings()
    store: StoreSettings = StoreSettings()
    privacy: PrivacySettings = PrivacySettings()
    train: TrainSettings = TrainSettings()
    release: ReleaseSettings = ReleaseSettings()

    @model_validator(mode="after")
    def _expand_home(self) -> Self:
        object.__setattr__(self, "home", self.home.expanduser().resolve())
        return self

    @model_validator(mode="after")
    def _automatic_jobs_can_run(self) -> Self:
        """Here and not in `TrainSettings`, which are those of one job, too: an operator's may be of another method."""
        train = self.train
        if not train.policy.automatic or METHODS[train.policy.method].reads != "prompts":
            return self
        said = f"train.policy.method={train.policy.method!r}"
        advice = "every automatic job would fail; or say train.policy.automatic=false"
        if because := policy_conflict(train.policies()):
            only = f' (train.only="{train.only}")' if train.only else ""
            raise ValueError(f"{said} cannot start jobs: {because}{only}; {advice}")
        if not train.reward.rewards:
            raise ValueError(f"{said} contradicts train.reward.rewards, which is empty: name a reward; {advice}")
        return self

    @property
    def shown_key(self) -> str | None:
        """The key to show to a server, or None."""
        key = self.api_key or self.server.api_key
        return key.get_secret_value() if key else None

    @property
    def trust(self) -> Trust:
        """Whom commands and the trainer trust, and what they show themselves."""
        return Trust(self.tls_ca, self.tls_cert, self.tls_key)

    @property
    def store_url(self) -> str:
        """The SQLAlchemy URL in force."""
        return self.store.url or f"sqlite:///{self.home / 'noria.db'}"

    @property
    def blobs_url(self) -> str:
        """The fsspec URL in force."""
        return self.store.blobs or f"file://{self.home / 'blobs'}"

    @property
    def models_dir(self) -> Path:
        """Folder of published versions."""
        return self.home / "models"

    @property
    def masters_dir(self) -> Path:
        """Folder of full-precision base checkpoints."""
        return self.home / "masters"

    @property
    def jobs_dir(self) -> Path:
        """Folder of the jobs' working files."""
        return self.home / "jobs"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the home's `noria.toml`."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=_toml_path(init_settings))
        return init_settings, env_settings, toml


def _toml_path(init: PydanticBaseSettingsSource) -> Path:
    home = init().get("home") or os.environ.get("NORIA_HOME") or "~/.noria"
    return Path(str(home)).expanduser() / "noria.toml"


def load_settings(**flags: Any) -> Settings:
    """Reads the tree; `flags` are nested like it (`server={"http_port": 0}`) and win.

    Raises SettingsError, one line per wrong key, each naming the key.
    """
    _refuse_unknown_environment()
    try:
        return Settings(**{k: v for k, v in flags.items() if v is not None})
    except ValidationError as error:
        raise _settings_error(error, under=()) from error


def _refuse_unknown_environment() -> None:
    """pydantic-settings ignores a variable whose first part it does not know: a slip would go unseen."""
    for name in os.environ:
        head, nested, _ = name.removeprefix("NORIA_").lower().partition("__")
        if name.startswith("NORIA_") and nested and head not in Settings.model_fields:
            raise SettingsError(
                f"{name}: there is no section {head!r}; the sections are {', '.join(Settings.model_fields)}", param=name
            )


def override_train(train: TrainSettings, overrides: Mapping[str, Any]) -> TrainSettings:
    """The training settings of one job: `overrides` is a partial tree like `{"dpo": {"beta": 0.2}}` and wins.

    Raises SettingsError, one line per wrong key, each as `settings.dpo.beta`.
    """
    try:
        return TrainSettings.model_validate(_merged(train.model_dump(), overrides))
    except ValidationError as error:
        raise _settings_error(error, under=("settings",)) from error


def _merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: _merged(base.get(key), value) for key, value in over.items()}}


def _settings_error(error: ValidationError, *, under: tuple[str, ...]) -> SettingsError:
    keys, lines = [], []
    for one in error.errors():
        keys.append(".".join([*under, *map(str, one["loc"])]) or "settings")
        lines.append(f"{keys[-1]}: {one['msg']}" + (" (unknown key)" if one["type"] == "extra_forbidden" else ""))
    return SettingsError("\n".join(lines), param=keys[0])
