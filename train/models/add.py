"""Makes the first version of a base: master in, GPTQ, verified, published.

Comes in: a checkpoint folder, or a master that is already there. Goes out: the manifest of a published version.
Where the home serves nothing yet, the version becomes live; otherwise a rollout is the operator's word.
Must not import `serve`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from noria.errors import NoriaError
from noria.modules import architecture_of
from noria.registry import Base, Manifest, ManifestDraft, Registry
from noria.settings import Settings
from train.data.calibration import fingerprint
from train.export.rendering import CalibrationSample
from train.models.conversations import RECIPE, calibration_samples, held_out_samples
from train.models.embedded.eyes.lay import eyes_of
from train.models.intake import Master, check_source, take_in

Progress = Callable[[str, float], None]
"""Called with a stage's name and its share done, 0 to 1."""


def add_model(source: Path, registry: Registry, settings: Settings, name: str | None, progress: Progress) -> Manifest:
    """Takes a full-precision or GPTQ checkpoint in and publishes its first version.

    The same checkpoint under the same name again gives the version that is there. Raises as `take_in`, `quantize` and
    `verify` do; nothing of a failed attempt stays but the master.
    """
    progress("copy", 0.0)
    master = take_in(source, settings.masters_dir, name or source.resolve().name)
    progress("copy", 1.0)
    return publish_master(master, registry, settings, progress)


@dataclass(frozen=True)
class Conversations:
    """What a master is calibrated and verified on; `recipe` says in words how they were chosen."""

    recipe: str
    calibration: Sequence[CalibrationSample]
    verification: Sequence[CalibrationSample]


def publish_master(
    master: Master,
    registry: Registry,
    settings: Settings,
    progress: Progress,
    conversations: Conversations | None = None,
    *,
    live: bool = True,
) -> Manifest:
    """Quantises, verifies and publishes a master as a root version, unless one of it is published.

    `conversations` none are the general ones; `live` false leaves a home that serves nothing as it is.
    """
    made = published(registry, master.name, master.sha256)
    if made is None:
        made = _published(master, registry, settings, progress, conversations or general(settings))
    return make_live(registry, made) if live else made


def general(settings: Settings) -> Conversations:
    """Conversations about everything, for a model of which nothing else is known."""
    return Conversations(RECIPE, calibration_samples(settings.train.quantize.calibration_samples), held_out_samples())


def _published(
    master: Master, registry: Registry, settings: Settings, progress: Progress, conversations: Conversations
) -> Manifest:
    staging = registry.begin(f"add-{master.name}")
    try:
        draft = _fill(staging, master, settings, progress, conversations)
        progress("publish", 0.0)
        manifest = registry.publish(staging, draft)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    progress("publish", 1.0)
    return manifest


def published(registry: Registry, name: str, sha256: str | None = None) -> Manifest | None:
    """The newest root version of a base that is fit to serve."""
    registry.reconcile()
    for version in reversed(registry.list_versions()):
        if version.parent is not None or version.state == "rejected":
            continue
        try:
            manifest = registry.manifest(version.id)
        except NoriaError:
            continue  # a folder that cannot be read serves nobody
        base = manifest.base
        if base is not None and base.name == name and sha256 in (None, base.sha256):
            return manifest
    return None


def _fill(
    staging: Path, master: Master, settings: Settings, progress: Progress, conversations: Conversations
) -> ManifestDraft:
    from train.export.quantize import quantize
    from train.export.verify import verify

    train = settings.train
    architecture = architecture_of(check_source(master.path))
    progress("quantize", 0.0)
    samples = list(conversations.calibration)
    report = quantize(
        master.path,
        master.path,
        samples,
        staging / "serving",
        train.quantize,
        lambda share: progress("quantize", share),
    )
    progress("verify", 0.0)
    verified = verify(
        staging / "serving", master.path, list(conversations.verification), staging / "probe.json", train.verify
    )
    progress("verify", 1.0)
    return ManifestDraft(
        method="base",
        base=_base(master),
        architecture=architecture.name,
        quantization=report.quantization,
        calibration={
            "recipe": conversations.recipe,
            "samples": [{"sha256": fingerprint(one.messages)} for one in samples],
        },
        metrics={"quantize": _metrics(asdict(report)), "verify": asdict(verified)},
        frozen=report.frozen,
    )


def _base(master: Master) -> Base:
    """The base; of an embedded model with eyes also which eyes, by their hash."""
    eyes = eyes_of(master.path)
    more = {} if eyes is None else {"eyes": eyes}
    return Base(name=master.name, path=f"masters/{master.name}", sha256=master.sha256, kind=master.kind, **more)


def _metrics(report: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in report.items() if key not in ("frozen", "quantization")}


def make_live(registry: Registry, manifest: Manifest) -> Manifest:
    """Makes the version live where nothing is live yet; returns it."""
    if registry.live() is None:
        registry.promote(manifest.id)
    return manifest
