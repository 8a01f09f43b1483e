"""What a home lends to rewards outside a job: a version's model, its processor, stored pictures and preferences.

Comes in: settings, a version. Goes out: `Backing`, which opens and loads only what a reward asks for.
Must not import torch at the top, nor `serve`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from noria.blobs import Blobs
from noria.records import Pair
from noria.registry import Registry
from noria.settings import Settings
from noria.store import Store
from train.data.snapshot import select
from train.data.sources import ImageLoader
from train.pipeline.lineage import Parent, find_parent, live_version
from train.rewards.protocol import Backing


@contextmanager
def lent(settings: Settings, version: str) -> Iterator[Backing]:
    """`version` is an id or `live`. Its functions raise as `find_parent`: no such version, no master."""
    with ExitStack() as open_:

        @cache
        def store() -> Store:
            settings.home.mkdir(parents=True, exist_ok=True)
            return open_.enter_context(Store.open(settings.store_url))

        @cache
        def parent() -> Parent:
            registry = Registry(settings.models_dir, store())
            return find_parent(registry, settings.home, live_version(registry) if version == "live" else version)

        def processor() -> Any:
            master = parent().master  # a version that is not there is told before transformers is loaded
            from train.methods.policy_model import load_processor

            return load_processor(master)

        def model() -> Any:
            return _model(parent())

        def pairs() -> tuple[Sequence[Pair], Sequence[Pair]]:
            found = select(store().training_pairs(), held_out=settings.train.held_out)
            return found.train, found.held_out

        def read_blob(sha256: str) -> bytes:
            return Blobs(settings.blobs_url).get(sha256)

        images = ImageLoader(read_blob, named=True)  # whoever gives samples names their pictures
        yield Backing(processor=processor, model=model, load_image=images, pairs=pairs)


def _model(parent: Parent) -> Any:
    """The version in full precision, on a GPU where there is one."""
    import torch

    from train.methods.policy_model import load_policy, read_architecture, training_dtype

    model = load_policy(parent.master, parent.adapters, read_architecture(parent.master), training_dtype())
    return model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
