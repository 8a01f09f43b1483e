"""Hot swap of real vLLM on GPTQ weights: nobody loses a request, no answer has two versions, nothing bad gets in.

One server for the whole file, over versions that the fixtures publish: v1 and v2 are different random weights in the
same shape, the others are v2 with one thing wrong. `VLLM_SERVER_DEV_MODE` opens vLLM's own routes to the worker, with
which the last tests go past validation.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from noria.client import NoriaClient
from noria.client.shapes import Rollout
from noria.records import Json
from noria.registry import ManifestDraft, Registry
from noria.settings import VerifySettings
from noria.store import Store
from tests.flow.rtn import quantize_rtn
from tests.servers import Server, start_server
from tests.tiny import build_tiny_vlm
from train.export.rendering import CalibrationSample
from train.export.verify import verify

CLIENTS = 8
ROUND_TRIPS = 5
MAX_TOKENS = 8
LINEAR = "language_model.model.layers.1.mlp.down_proj"
NORM = "language_model.model.norm.weight"
PROMPTS = [*(f"What is {n}?" for n in range(12)), *(f"picture {n}" for n in range(4))]

Tensors = dict[str, torch.Tensor]
BAD: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "extra": (lambda t: t.update(bogus=torch.zeros(4)), "tensor bogus is not one"),
    "missing_gptq": (lambda t: t.pop(f"{LINEAR}.scales"), f"tensor {LINEAR}.scales is missing"),
    "missing_norm": (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
    "wrong_shape": (lambda t: t.update({f"{LINEAR}.qweight": t[f"{LINEAR}.qweight"].T.contiguous()}), "has shape"),
    "nan_scales": (lambda t: t[f"{LINEAR}.scales"].fill_(torch.nan), f"tensor {LINEAR}.scales holds NaN"),
}


@dataclass
class World:
    """A running server and the ids of what is published in its home, by name."""

    server: Server
    noria: NoriaClient
    versions: dict[str, str]

    def serving(self, name: str) -> str:
        """The checkpoint folder of a published version."""
        return str(self.server.home / "models" / self.versions[name] / "serving")

    def roll_out(self, name: str) -> Rollout:
        """Rolls a version out and waits for the end."""
        return self.noria.wait_rollout(self.noria.create_rollout(self.versions[name])["id"], poll_s=0.05)

    def rpc(self, method: str, *args: str) -> Any:
        """The one worker's answer to a call past the releaser."""
        answer = httpx.post(f"{self.server.url}/collective_rpc", json={"method": method, "args": args}, timeout=60)
        answer.raise_for_status()
        return answer.json()["results"][0]


@dataclass
class Traffic:
    """What the clients were answered: texts by version and prompt, failures as they were."""

    answers: dict[str, dict[str, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failures: list[str] = field(default_factory=list)


def publish(registry: Registry, source: Path, *, probe: Path | None, change: Callable[[Path], object]) -> str:
    """Publishes a copy of a serving folder that `change` has been at; its id."""
    staging = registry.begin("swap")
    shutil.copytree(source, staging / "serving")
    change(staging / "serving")
    if probe is not None:
        shutil.copy(probe, staging / "probe.json")
    return registry.publish(staging, ManifestDraft(method="test")).id


def with_tensors(change: Callable[[Tensors], object]) -> Callable[[Path], object]:
    """A change of a folder that changes its tensors."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return apply


def truncate(folder: Path) -> None:
    """Cuts the tensors' file in half."""
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def publish_all(home: Path, scratch: Path) -> dict[str, str]:
    """v1 (live), v2, one version for each way to be wrong, and one whose probe is another's; ids by name."""
    folders, probes = {}, {}
    for seed, name in enumerate(("v1", "v2"), start=1):
        source = build_tiny_vlm(scratch / f"source-{name}", seed=seed, dtype="bfloat16")
        folders[name], probes[name] = scratch / name, scratch / f"{name}.json"
        quantize_rtn(source, folders[name])
        sample = CalibrationSample([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}], [])
        verify(folders[name], source, [sample], probes[name], VerifySettings(max_kl=50.0))
    with Store.open(f"sqlite:///{home / 'noria.db'}") as store:
        registry = Registry(home / "models", store)
        ids = {
            name: publish(registry, folders[name], probe=probes[name], change=lambda folder: None)
            for name in ("v1", "v2")
        }
        for name, (change, _) in BAD.items():
            ids[name] = publish(registry, folders["v2"], probe=probes["v2"], change=with_tensors(change))
        ids["truncated"] = publish(registry, folders["v2"], probe=probes["v2"], change=truncate)
        ids["other_probe"] = publish(registry, folders["v2"], probe=probes["v1"], change=lambda folder: None)
        store.promote(ids["v1"])
    return ids


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The server on v1."""
    home, scratch = tmp_path_factory.mktemp("swap-home"), tmp_path_factory.mktemp("swap")
    versions = publish_all(home, scratch)
    settings = {
        "VLLM_SERVER_DEV_MODE": "1",
        "NORIA_ENGINE__MAX_MODEL_LEN": "256",
        "NORIA_ENGINE__KV_CACHE_GIB": "0.25",
        "NORIA_RELEASE__POLL_S": "0.05",
    }
    with start_server(home, **settings) as server, NoriaClient(server.url) as noria:
        yield World(server, noria, versions)


def picture(number: int) -> str:
    """A data URL of a small picture, another one for each number."""
    data = io.BytesIO()
    Image.new("RGB", (40, 40), (60 * number % 256, 255 - number, 90)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def body(prompt: str, **more: Any) -> Json:
    """A chat request at temperature 0; `picture N` shows a picture too."""
    content: list[Json] = [{"type": "text", "text": prompt}]
    if prompt.startswith("picture"):
        content.insert(0, {"type": "image_url", "image_url": {"url": picture(int(prompt.split()[1]))}})
    messages = [{"role": "user", "content": content}]
    return {"model": "noria", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "store": False, **more}


async def stream(http: httpx.AsyncClient, prompt: str, traffic: Traffic) -> None:
    """One streamed answer into `traffic`. A failure: an HTTP error, a broken stream, two versions in one answer."""
    signed, text, ended, finished = set(), "", False, ""
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body(prompt, stream=True)) as response:
            signed.add(response.headers.get("x-noria-model-version", f"HTTP {response.status_code}"))
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    ended = True
                elif line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    signed.add(chunk["system_fingerprint"].split("-")[0])
                    for choice in chunk["choices"]:
                        text += choice["delta"].get("content") or ""
                        finished = choice["finish_reason"] or finished
    except (httpx.HTTPError, KeyError, ValueError) as error:
        traffic.failures.append(f"{prompt}: {type(error).__name__} {error}")
        return
    if not ended or finished not in ("stop", "length") or len(signed) != 1:
        traffic.failures.append(f"{prompt}: ended={ended}, finish_reason={finished}, signed by {sorted(signed)}")
        return
    version = signed.pop()
    traffic.answers[version][prompt].add(text)
    traffic.counts[version] += 1


async def load(url: str, meanwhile: Callable[[Traffic], Awaitable[None]]) -> Traffic:
    """Eight streaming clients that ask all prompts over and over, each from another one on, while `meanwhile` runs."""
    traffic, over = Traffic(), asyncio.Event()

    async def client(number: int, http: httpx.AsyncClient) -> None:
        turn = number * len(PROMPTS) // CLIENTS
        while not over.is_set():
            await stream(http, PROMPTS[turn % len(PROMPTS)], traffic)
            turn += 1

    async with httpx.AsyncClient(base_url=url, timeout=120) as http:
        clients = [asyncio.create_task(client(number, http)) for number in range(CLIENTS)]
        try:
            await meanwhile(traffic)
        finally:
            over.set()
            await asyncio.gather(*clients)
    return traffic


async def answered(traffic: Traffic, version: str, count: int) -> None:
    """Returns when a version has given `count` more answers."""
    until = traffic.counts[version] + count
    async with asyncio.timeout(120):
        while traffic.counts[version] < until:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


def exact(world: World) -> list[Any]:
    """Tokens and log-probabilities of a few answers, asked one after the other."""
    answers = []
    for prompt in (*PROMPTS[:3], *PROMPTS[-2:]):
        asked = body(prompt, logprobs=True, top_logprobs=2)
        answer = httpx.post(f"{world.server.url}/v1/chat/completions", json=asked, timeout=60)
        answer.raise_for_status()
        answers.append(answer.json()["choices"][0]["logprobs"])
    return answers


async def test_swaps_under_load_lose_nothing_and_mix_nothing(world: World) -> None:
    v1, v2 = world.versions["v1"], world.versions["v2"]
    reference: dict[str, dict[str, set[str]]] = {}
    for name, version in (("v1", v1), ("v2", v2)):
        assert world.noria.status()["serving"] == version or world.roll_out(name)["state"] == "succeeded"
        traffic = await load(world.server.url, partial(answered, version=version, count=12 * len(PROMPTS)))
        assert traffic.failures == [] and set(traffic.answers) == {version}
        reference |= traffic.answers
    steady = [p for p in PROMPTS if len(reference[v1][p]) == len(reference[v2][p]) == 1]
    telling = [p for p in steady if reference[v1][p] != reference[v2][p]]
    assert len(telling) >= len(PROMPTS) // 2, f"too few prompts tell the versions apart: {reference}"

    rollouts: list[Rollout] = []

    async def swap(seen: Traffic) -> None:
        for _ in range(ROUND_TRIPS):
            for name in ("v1", "v2"):
                await answered(seen, str(world.noria.status()["live"]), CLIENTS)
                rollouts.append(await asyncio.to_thread(world.roll_out, name))
        await answered(seen, v2, CLIENTS)

    traffic = await load(world.server.url, swap)
    assert traffic.failures == []
    assert [rollout["state"] for rollout in rollouts] == ["succeeded"] * 2 * ROUND_TRIPS, rollouts
    assert min(traffic.counts[v1], traffic.counts[v2]) >= ROUND_TRIPS * CLIENTS
    for version in (v1, v2):
        for prompt in steady:
            assert traffic.answers[version][prompt] <= reference[version][prompt], (version, prompt)
    for rollout in rollouts:
        assert rollout["metrics"]["probe_mean_abs_diff"] < 0.25
        assert 0 < rollout["metrics"]["reload_s"] < rollout["metrics"]["pause_s"]


async def test_who_leaves_the_queue_takes_no_picture_along(world: World) -> None:
    """A request that waits at the gate has its picture in vLLM's cache on our side; the engine's side must get it."""
    target = "v2" if world.noria.status()["serving"] == world.versions["v1"] else "v1"
    long = body("Tell", max_tokens=200, min_tokens=200, stream=True)
    async with httpx.AsyncClient(base_url=world.server.url, timeout=120) as http:
        async with http.stream("POST", "/v1/chat/completions", json=long) as running:
            lines = running.aiter_lines()
            await anext(lines)
            world.noria.create_rollout(world.versions[target])
            left = await leave_queue(http)
            assert len([line async for line in lines]) > 100
        answer = await http.post("/v1/chat/completions", json=body(left, max_tokens=2))
        assert answer.headers["x-noria-model-version"] == world.versions[target]
        assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")


async def leave_queue(http: httpx.AsyncClient) -> str:
    """Asks about one new picture after another until a request queues, and leaves it there; its prompt."""
    for number in range(100, 200):
        try:
            await http.post("/v1/chat/completions", json=body(f"picture {number}", max_tokens=1), timeout=0.3)
        except httpx.ReadTimeout:
            return f"picture {number}"
    raise AssertionError("no request had to wait for the swap")


@pytest.mark.parametrize("name", [*BAD, "truncated", "other_probe"])
def test_a_bad_checkpoint_changes_nothing(world: World, name: str) -> None:
    assert world.noria.status()["serving"] == world.versions["v1"] or world.roll_out("v1")["state"] == "succeeded"
    before = exact(world)
    weights = world.rpc("checksum_weights")
    rollout = world.roll_out(name)
    says = {"truncated": "truncated", "other_probe": "differ from the verifier's"}.get(name) or BAD[name][1]
    assert rollout["state"] == "failed" and says in str(rollout["reason"])
    status = world.noria.status()
    assert (status["live"], status["serving"]) == (world.versions["v1"],) * 2
    assert exact(world) == before
    assert world.rpc("checksum_weights") == weights


@pytest.mark.parametrize(
    ("name", "refused"),
    [("truncated", True), ("extra", True), ("wrong_shape", True), ("missing_gptq", False), ("nan_scales", False)],
)
def test_past_validation_the_worker_still_comes_back_exactly(world: World, name: str, refused: bool) -> None:
    assert world.noria.status()["serving"] == world.versions["v1"] or world.roll_out("v1")["state"] == "succeeded"
    before, weights = exact(world), world.rpc("checksum_weights")
    httpx.post(f"{world.server.url}/pause", params={"mode": "wait"}, timeout=60).raise_for_status()
    assert (world.rpc("reload_version", world.serving(name))["error"] is not None) == refused
    if not refused:  # what vLLM takes in silence answers something: its traces in the KV blocks must go, too
        httpx.post(f"{world.server.url}/resume", timeout=60).raise_for_status()
        httpx.post(f"{world.server.url}/v1/chat/completions", json=body(PROMPTS[0]), timeout=60)
        httpx.post(f"{world.server.url}/pause", params={"mode": "wait"}, timeout=60).raise_for_status()
    assert world.rpc("reload_version", world.serving("v1"))["error"] is None
    world.rpc("zero_kv_cache")
    httpx.post(f"{world.server.url}/resume", timeout=60).raise_for_status()
    assert exact(world) == before
    assert world.rpc("checksum_weights") == weights


def test_a_live_version_moved_by_another_process_is_followed(world: World) -> None:
    with Store.open(f"sqlite:///{world.server.home / 'noria.db'}") as store:
        target = "v2" if store.live() == world.versions["v1"] else "v1"
        store.promote(world.versions[target])
    deadline = time.monotonic() + 60
    while world.noria.status()["serving"] != world.versions[target]:
        assert time.monotonic() < deadline, "the server did not follow"
        time.sleep(0.05)
