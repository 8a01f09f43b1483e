"""Which version a starting server loads.

Comes in: the registry and what the operator named. Goes out: a `ServingVersion` whose bytes were checked.
Must not import vllm.
"""

from __future__ import annotations

from noria.errors import NotFound
from noria.registry import Registry, fingerprint
from serve.engine.versions import ServingVersion


def choose_version(registry: Registry, model: str | None = None) -> ServingVersion:
    """The live version; with `model`, that version (or the newest of the base with that name), made live.

    Where nothing is live yet the newest root version, one that no training made, becomes it. Reads every byte of the
    version. Raises NotFound that says how to get a model, IntegrityError for a folder that is not as published.
    """
    registry.reconcile()
    live = registry.live()
    wanted = _named(registry, model) if model else live or _newest_root(registry)
    if wanted is None:
        raise NotFound(
            "there is no model yet: `noria up` builds the embedded one, `noria model add PATH` takes yours",
            param="model",
            code="no_model",
        )
    checked = _checked(registry, wanted)
    if wanted != live:
        registry.promote(wanted)
    return checked


def version_aside(registry: Registry, version: str | None = None) -> ServingVersion:
    """The named version, a rejected one too, or the live one; what is live stays as it is.

    Reads every byte of the version. Raises NotFound, IntegrityError for a folder that is not as published.
    """
    wanted = version or registry.live()
    if wanted is None:
        raise NotFound("nothing is live in this home: name a version with --model", param="model", code="no_model")
    return _checked(registry, wanted)


def _checked(registry: Registry, version: str) -> ServingVersion:
    manifest = registry.verify(version)
    return ServingVersion(version, fingerprint(manifest), registry.path(version) / "serving")


def _named(registry: Registry, model: str) -> str:
    usable = [version.id for version in registry.list_versions() if version.state != "rejected"]
    if model in usable:
        return model
    for version in reversed(usable):
        base = registry.manifest(version).base
        if base is not None and base.name == model:
            return version
    raise NotFound(
        f"no version and no base model is called {model!r}; `noria versions` lists them, `noria model add` adds one",
        param="model",
        code="no_model",
    )


def _newest_root(registry: Registry) -> str | None:
    roots = [one.id for one in registry.list_versions() if one.parent is None and one.state != "rejected"]
    return roots[-1] if roots else None
