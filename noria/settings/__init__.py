"""The settings tree: `load_settings` reads it, `Settings` is what it becomes; the sections lie beside."""

from noria.settings.input import ImageSettings, InputSettings
from noria.settings.keeping import CaptureSettings, StoreSettings
from noria.settings.limits import KeyLimits, KeyRules, LimitSettings
from noria.settings.privacy import PrivacySettings
from noria.settings.serving import EngineSettings, ReleaseSettings, SamplingSettings, ServerSettings
from noria.settings.training import PolicySettings, QuantizeSettings, TrainSettings, VerifySettings
from noria.settings.tree import Settings, load_settings, override_train
from noria.settings.wire import DoorSettings, GrpcSettings, TlsSettings

__all__ = [
    "CaptureSettings",
    "DoorSettings",
    "EngineSettings",
    "GrpcSettings",
    "ImageSettings",
    "InputSettings",
    "KeyLimits",
    "KeyRules",
    "LimitSettings",
    "PolicySettings",
    "PrivacySettings",
    "QuantizeSettings",
    "ReleaseSettings",
    "SamplingSettings",
    "ServerSettings",
    "Settings",
    "StoreSettings",
    "TlsSettings",
    "TrainSettings",
    "VerifySettings",
    "load_settings",
    "override_train",
]
