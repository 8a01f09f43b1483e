"""The settings tree: `load_settings` reads it, `Settings` is what it becomes; the sections lie beside."""

from noria.settings.doors import DoorSettings
from noria.settings.keeping import CaptureSettings, StoreSettings
from noria.settings.serving import EngineSettings, ReleaseSettings, SamplingSettings, ServerSettings
from noria.settings.training import PolicySettings, QuantizeSettings, TrainSettings, VerifySettings
from noria.settings.tree import Settings, load_settings, override_train

__all__ = [
    "CaptureSettings",
    "DoorSettings",
    "EngineSettings",
    "PolicySettings",
    "QuantizeSettings",
    "ReleaseSettings",
    "SamplingSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "TrainSettings",
    "VerifySettings",
    "load_settings",
    "override_train",
]
