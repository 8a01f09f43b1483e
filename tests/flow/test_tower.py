"""A version with another tower, through real vLLM: trained, merged, quantised, published, swapped in, and out again.

v2 trains the tower in full beside a LoRA on the aligner and one on the language model; v3 trains v2's aligner alone.
The stages that make them are the trainer's own, from a delta folder to a published version. What v1 answered about a
picture must come back after both, and v2 must not answer with what v1's tower saw: vLLM keeps that by the picture.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from noria.blobs import Blobs
from noria.client import NoriaClient
from noria.client.shapes import Rollout
from noria.module_settings import ResolvedPolicy
from noria.records import Json, Module
from noria.registry import Manifest, ManifestDraft, Registry
from noria.settings import Settings
from noria.store import Store
from tests.servers import Server, start_server
from tests.tiny import build_tiny_vlm
from train.export.checkpoint import read_bytes, tensor_index
from train.export.quantize import load_processor
from train.export.rendering import encode
from train.log import EventLog
from train.methods.delta import save_delta
from train.methods.policies.apply import apply_policies
from train.methods.policy_model import load_policy, read_architecture
from train.models.add import add_model
from train.models.conversations import calibration_samples
from train.pipeline import artefact, release
from train.pipeline.context import JobContext
from train.pipeline.lineage import find_parent

STEPS = 4
MODULES: tuple[Module, ...] = ("vision_tower", "aligner", "language_model")
QUESTIONS: tuple[tuple[str, str | None], ...] = (("See?", "red"), ("And here?", "blue"), ("Say.", None))
EYES: dict[Module, ResolvedPolicy] = {
    "vision_tower": ResolvedPolicy("full", 3e-3),
    "aligner": ResolvedPolicy("lora", 1e-2, rank=4, alpha=8.0),
    "language_model": ResolvedPolicy("lora", 1e-2, rank=4, alpha=8.0),
}
ALIGN: dict[Module, ResolvedPolicy] = {
    "vision_tower": ResolvedPolicy("frozen"),
    "aligner": ResolvedPolicy("full", 3e-3),
    "language_model": ResolvedPolicy("frozen"),
}


@dataclass
class World:
    """A server on v1, v2 to v4 published beside it."""

    server: Server
    noria: NoriaClient
    registry: Registry

    def roll_out(self, version: str) -> Rollout:
        """Rolls a version out and waits for the end."""
        return self.noria.wait_rollout(self.noria.create_rollout(version)["id"], poll_s=0.05)

    def answers(self) -> list[Json]:
        """Tokens and log-probabilities of every question, one after the other."""
        return [self.ask(text, colour) for text, colour in QUESTIONS]

    def ask(self, text: str, colour: str | None) -> Json:
        """One answer at temperature 0."""
        content: list[Json] = [{"type": "text", "text": text}]
        if colour is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": picture(colour)}})
        body = {
            "model": "noria",
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": 6,
            "logprobs": True,
        }
        answer = httpx.post(f"{self.server.url}/v1/chat/completions", json=body, timeout=60)
        answer.raise_for_status()
        said: Json = answer.json()["choices"][0]["logprobs"]
        return said

    def serving(self, version: str) -> Path:
        """A version's checkpoint."""
        return self.registry.path(version) / "serving"

    def changed(self, old: str, new: str) -> dict[Module, int]:
        """How many serving tensors of each module differ between two versions."""
        before, after = tensor_index(self.serving(old)), tensor_index(self.serving(new))
        assert list(before) == list(after)
        names = [name for name in before if read_bytes(before[name]) != read_bytes(after[name])]
        parted = read_architecture(self.serving(old)).partition(names, spelling="checkpoint")
        return {module: len(parted[module]) for module in MODULES}


def picture(colour: str) -> str:
    """A data URL of a 40x40 PNG, the same bytes for the same colour."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def train(master: Path, deltas: tuple[Path, ...], policies: dict[Module, ResolvedPolicy], out: Path) -> None:
    """A few real steps on conversations with pictures, saved as a delta."""
    architecture = read_architecture(master)
    torch.manual_seed(7)
    model = load_policy(master, deltas, architecture, torch.float32)
    applied = apply_policies(model, architecture, policies)
    optimizer = applied.optimizer(torch.optim.AdamW)
    processor = load_processor(master)
    for sample in [one for one in calibration_samples(8 * STEPS) if one.images][:STEPS]:
        inputs = encode(processor, sample, 256)
        assert inputs is not None
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_delta(model, out, policies)


def turn(settings: Settings, store: Store, policies: dict[Module, ResolvedPolicy]) -> Manifest:
    """One job over the live version: trained here, and from the delta on by the trainer's own stages."""
    registry = Registry(settings.models_dir, store)
    store.create_job("dpo", {}, "none", "test")
    job = store.claim_job("test", 600.0)
    assert job is not None
    ctx = JobContext(
        store=store,
        registry=registry,
        blobs=Blobs(settings.blobs_url),
        settings=settings,
        train=settings.train,
        job=job,
        owner="test",
        check=lambda: None,
        log=EventLog(io.StringIO()),
    )
    live = registry.live()
    assert live is not None
    parent = find_parent(registry, settings.home, live)
    train(parent.master, parent.adapters, policies, ctx.folder / "adapter" / "01-eyes")
    nothing: Json = {"recipe": "", "calibration": [], "verification": [], "verified_on_calibration": False}
    (ctx.folder / "snapshot.json").write_text(json.dumps({"train": [], "held_out": [], "samples": nothing}))
    ctx.done["snapshot"] = {"id": "snap_test", "sha256": "sha256:0", "parent": live, "counts": {}}
    ctx.done["train"] = {"stages": [{"name": "eyes", "steps": STEPS}]}
    ctx.done |= {"merge": artefact.merge(ctx), "quantize": artefact.quantize(ctx), "verify": artefact.verify(ctx)}
    version = release.publish(ctx)["version"]
    store.finish_job(job.id, "test", "succeeded", version=version)
    return registry.manifest(version)


def with_the_tower_of(registry: Registry, version: str, other: str) -> str:
    """Publishes `version`, its probe included, with another's tower: what a cache of old image features amounts to."""
    staging = registry.begin("mixed")
    shutil.copytree(registry.path(version) / "serving", staging / "serving")
    shutil.copy(registry.path(version) / "probe.json", staging / "probe.json")
    here, there = tensor_index(staging / "serving"), tensor_index(registry.path(other) / "serving")
    for name in read_architecture(staging / "serving").partition(here, spelling="checkpoint")["vision_tower"]:
        with here[name].file.open("r+b") as stream:
            stream.seek(here[name].begin)
            stream.write(read_bytes(there[name]))
    return registry.publish(staging, ManifestDraft(method="test")).id


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """v1 is the base and live; v2 and v3 are its children, v4 is v2 with v1's tower."""
    home = tmp_path_factory.mktemp("tower-home")
    source = build_tiny_vlm(tmp_path_factory.mktemp("tower") / "tiny", seed=5, dtype="bfloat16")
    quantize: Json = {"group_size": 32, "calibration_samples": 8, "calibration_tokens": 256}
    settings = Settings.model_validate({"home": home, "train": {"quantize": quantize, "verify": {"max_kl": 20.0}}})
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        add_model(source, registry, settings, None, lambda stage, share: None)
        store.promote(turn(settings, store, EYES).id)
        turn(settings, store, ALIGN)
        with_the_tower_of(registry, "v2", "v1")
        store.promote("v1")
        engine = {
            "NORIA_ENGINE__MAX_MODEL_LEN": "256",
            "NORIA_ENGINE__KV_CACHE_GIB": "0.25",
            "NORIA_RELEASE__POLL_S": "0.05",
        }
        with start_server(home, **engine) as server, NoriaClient(server.url) as noria:
            yield World(server, noria, registry)


def test_manifests_say_what_was_frozen_and_the_bytes_agree(world: World) -> None:
    v1, v2, v3 = (world.registry.manifest(version) for version in ("v1", "v2", "v3"))
    assert (v2.parent, v2.frozen) == ("v1", {})
    assert (v3.parent, set(v3.frozen)) == ("v2", {"vision_tower", "language_model"})
    assert set(v1.frozen) == {"vision_tower", "aligner"} and v3.frozen["vision_tower"] != v1.frozen["vision_tower"]
    assert [v2.modules[module]["policy"] for module in MODULES] == ["full", "lora", "lora"]
    assert [v3.modules[module]["policy"] for module in MODULES] == ["frozen", "full", "frozen"]
    assert v2.stages == [{"name": "eyes", "steps": STEPS}]
    tower = sum(name.startswith("vision_tower.") for name in tensor_index(world.serving("v1")))
    told = world.changed("v1", "v2")
    assert 0 < tower // 2 < told["vision_tower"] <= tower  # what CLIP computes and LLaVA does not read stays as it was
    assert told["aligner"] == 2 and told["language_model"] > 0
    assert world.changed("v2", "v3") == {"vision_tower": 0, "aligner": 4, "language_model": 0}


@pytest.mark.parametrize("steps", [("v2", "v1"), ("v2", "v3", "v2", "v1")])
def test_a_swap_of_towers_answers_with_the_new_one_and_goes_back_exactly(world: World, steps: tuple[str, ...]) -> None:
    """Each question is asked twice of each version, so that every cache is warm when the next version comes."""
    first: dict[str, list[Json]] = {}
    at = "v1"
    assert world.answers() == first.setdefault(at, world.answers())
    for version in steps:
        rollout = world.roll_out(version)
        assert rollout["state"] == "succeeded", rollout["reason"]
        assert rollout["metrics"]["probe_image_diff"] < 0.25 and rollout["metrics"]["probe_text_diff"] < 0.25
        told = world.answers()
        assert told == world.answers()
        if version in first:
            assert told == first[version]
        else:
            first[version] = told
            assert told[0] != first[at][0] and told[1] != first[at][1]
        if {at, version} == {"v2", "v3"}:
            assert told[2] == first[at][2]  # the same language model: text without a picture is answered alike
        at = version


def test_the_probe_sees_a_tower_that_is_another_version_s(world: World) -> None:
    assert world.noria.status()["serving"] == "v1" or world.roll_out("v1")["state"] == "succeeded"
    before = world.answers()
    rollout = world.roll_out("v4")
    assert rollout["state"] == "failed" and "over the image prompts" in str(rollout["reason"]), rollout
    assert world.answers() == before


def test_frozen_hashes_that_are_not_the_parent_s_are_refused(world: World) -> None:
    """A version that calls a module frozen and changed it does not reach the engine."""
    draft = ManifestDraft(method="test", parent="v1", frozen=dict(world.registry.manifest("v1").frozen))
    staging = world.registry.begin("liar")
    shutil.copytree(world.serving("v2"), staging / "serving")
    shutil.copy(world.registry.path("v2") / "probe.json", staging / "probe.json")
    rollout = world.roll_out(world.registry.publish(staging, draft).id)
    assert rollout["state"] == "failed" and "vision_tower hashes to" in str(rollout["reason"])
