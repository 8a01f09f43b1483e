"""GPTQ, verification and intake on the tiny model: what changes, what must not, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from noria.errors import Conflict, IntegrityError, InvalidRequest, NoriaError, TrainingError, UnsupportedModel
from noria.modules.hashes import group_hash
from noria.records import Module
from noria.registry import Registry
from noria.settings import QuantizeSettings, Settings, VerifySettings
from noria.store import Store
from tests.tiny_families import random_model
from train.export import gptq_format, layers
from train.export.checkpoint import INDEX_NAME, tensor_index
from train.export.quantize import QuantizeReport, load_model, load_processor, quantize, to_device
from train.export.rendering import CalibrationSample, encode
from train.export.verify import verify
from train.models.add import add_model
from train.models.conversations import calibration_samples, held_out_samples
from train.models.intake import check_source, take_in

SETTINGS = QuantizeSettings(group_size=32, calibration_samples=8, calibration_tokens=256)
LOOSE = VerifySettings(max_kl=5.0, samples=4)


@pytest.fixture(scope="module")
def made(tiny_vlm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, QuantizeReport, list[float]]:
    """The tiny model quantised: its folder, the report, and the shares of progress that were told."""
    out = tmp_path_factory.mktemp("quantised") / "serving"
    told: list[float] = []
    return out, quantize(tiny_vlm, tiny_vlm, calibration_samples(8), out, SETTINGS, told.append), told


@pytest.fixture
def serving(made: tuple[Path, QuantizeReport, list[float]], tmp_path: Path) -> Path:
    """A copy of the quantised model that a test may spoil."""
    return Path(shutil.copytree(made[0], tmp_path / "serving"))


def spoil(folder: Path, change: Any) -> None:
    """Applies `change` to the tensors of a checkpoint's only file."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_only_the_decoder_s_linears_are_replaced(tiny_vlm: Path, made: Any) -> None:
    folder, report, told = made
    before, after = tensor_index(tiny_vlm), tensor_index(folder)
    linears = gptq_format.quantised_linears(after)
    assert report.linears == len(linears) == 14
    assert all(name.startswith("language_model.model.layers.") for name in linears)
    kept = [name for name in before if name.removesuffix(".weight") not in linears]
    assert group_hash(before, kept) == group_hash(after, kept)
    packed = {f"{linear}.{suffix}" for linear in linears for suffix in gptq_format.SUFFIXES}
    assert set(after) == set(kept) | packed
    assert told == sorted(told) and told[-1] == 1.0


def test_config_and_side_files(tiny_vlm: Path, made: Any) -> None:
    folder = made[0]
    config = json.loads((folder / "config.json").read_text())
    said = config.pop("quantization_config")
    assert config == json.loads((tiny_vlm / "config.json").read_text())
    assert (said["quant_method"], said["bits"], said["group_size"], said["desc_act"], said["sym"]) == (
        "gptq",
        4,
        32,
        False,
        True,
    )
    assert r"-:^vision_tower\." in said["dynamic"] and r"-:^multi_modal_projector\." in said["dynamic"]
    side = {path.name for path in tiny_vlm.iterdir()} - {"config.json", "model.safetensors"}
    assert all((folder / name).read_bytes() == (tiny_vlm / name).read_bytes() for name in side)


def test_gptq_beats_rounding_on_what_it_saw(tiny_vlm: Path, made: Any) -> None:
    """The first group (q, k, v of layer 0) sees unquantised inputs, so its error can be computed directly."""
    model, processor = load_model(tiny_vlm), load_processor(tiny_vlm)
    path = "model.language_model.layers.0.self_attn.q_proj"
    linear = model.get_submodule(path)
    seen: list[torch.Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    with torch.no_grad():
        for sample in calibration_samples(8):
            inputs = encode(processor, sample, SETTINGS.calibration_tokens)
            assert inputs is not None
            model(**to_device(inputs, model))
    handle.remove()
    weight, inputs_NI = linear.weight.detach(), torch.cat(seen)
    name = path.replace("model.language_model", "language_model.model")
    solved = gptq_format.dequantise(gptq_format.read_packed(tensor_index(made[0]), name), 4)
    groups = weight.reshape(weight.shape[0], -1, 32)
    step = 2 * groups.abs().amax(-1, keepdim=True) / 15
    rounded = ((groups / step).round().clamp(-8, 7) * step).reshape(weight.shape)
    error, rounding = ((inputs_NI @ (weight - other).t()).square().mean() for other in (solved, rounded))
    assert 0 < float(error) < 0.9 * float(rounding)


def test_the_same_input_gives_the_same_bytes(tiny_vlm: Path, made: Any, tmp_path: Path) -> None:
    quantize(tiny_vlm, tiny_vlm, calibration_samples(8), tmp_path / "again", SETTINGS, lambda _: None)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (made[0] / "model.safetensors").read_bytes()


def test_a_changed_tower_is_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(tiny_vlm, tmp_path / "merged"))
    spoil(merged, lambda tensors: next(t for n, t in tensors.items() if n.startswith("vision_tower")).add_(0.5))
    with pytest.raises(IntegrityError, match="vision_tower is not that of its source"):
        quantize(merged, tiny_vlm, calibration_samples(2), tmp_path / "out", SETTINGS, lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_trained_tower_is_exported_as_trained(tiny_vlm: Path, tmp_path: Path) -> None:
    merged = Path(shutil.copytree(tiny_vlm, tmp_path / "merged"))
    spoil(merged, lambda tensors: next(t for n, t in tensors.items() if n.startswith("vision_tower")).add_(0.5))
    out, frozen = tmp_path / "out", list[Module](["aligner"])
    report = quantize(merged, tiny_vlm, calibration_samples(2), out, SETTINGS, lambda _: None, frozen)
    wanted, got = load_file(merged / "model.safetensors"), load_file(out / "model.safetensors")
    assert all(torch.equal(got[name], wanted[name]) for name in wanted if not name.startswith("language_model.model.l"))
    assert set(report.frozen) == {"aligner"}
    verify(out, merged, calibration_samples(2), tmp_path / "probe.json", LOOSE)


def test_a_frozen_language_model_keeps_the_parent_s_quantised_weights(
    tiny_vlm: Path, made: Any, tmp_path: Path
) -> None:
    merged = Path(shutil.copytree(tiny_vlm, tmp_path / "merged"))
    spoil(merged, lambda tensors: next(t for n, t in tensors.items() if n.startswith("multi_modal")).add_(0.5))
    out, told = tmp_path / "out", list[float]()
    report = quantize(merged, made[0], [], out, SETTINGS, told.append, frozen=("vision_tower", "language_model"))
    parent, got = load_file(made[0] / "model.safetensors"), load_file(out / "model.safetensors")
    changed = [name for name in parent if not torch.equal(parent[name], got[name])]
    assert len(changed) == 1 and changed[0].startswith("multi_modal_projector.")
    assert torch.equal(got[changed[0]], load_file(merged / "model.safetensors")[changed[0]])
    assert json.loads((out / "config.json").read_text()) == json.loads((made[0] / "config.json").read_text())
    assert set(report.frozen) == {"vision_tower", "language_model"} and told == [1.0]
    assert report.frozen["vision_tower"] == made[1].frozen["vision_tower"]
    assert (report.linears, report.samples, report.mean_loss) == (14, 0, None)
    verify(out, merged, calibration_samples(2), tmp_path / "probe.json", LOOSE)
    with pytest.raises(IntegrityError, match="is not quantised, so its language model cannot be kept"):
        quantize(merged, tiny_vlm, [], tmp_path / "no", SETTINGS, told.append, ("vision_tower", "language_model"))


def test_group_sizes_and_samples_that_do_not_fit(tiny_vlm: Path, tmp_path: Path) -> None:
    wide = QuantizeSettings(group_size=48)
    with pytest.raises(UnsupportedModel, match=r"train\.quantize\.group_size=48"):
        quantize(tiny_vlm, tiny_vlm, calibration_samples(2), tmp_path / "out", wide, lambda _: None)
    picture = CalibrationSample(
        [{"role": "user", "content": [{"type": "text", "text": "x" * 64}, {"type": "image"}]}],
        [Image.new("RGB", (9, 9))],
    )
    short = QuantizeSettings(calibration_tokens=16)
    with pytest.raises(TrainingError, match="none of 1 calibration conversations"):
        quantize(tiny_vlm, tiny_vlm, [picture], tmp_path / "out", short, lambda _: None)


def test_eight_bits_are_refused_where_only_a_cpu_can_serve(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"train\.quantize\.bits=8 cannot be served on a CPU"):
        quantize(tiny_vlm, tiny_vlm, [], tmp_path / "out", QuantizeSettings(bits=8), lambda _: None)


def test_verify_measures_and_writes_the_probe(tiny_vlm: Path, made: Any, tmp_path: Path) -> None:
    report = verify(made[0], tiny_vlm, held_out_samples(), tmp_path / "probe.json", LOOSE)
    assert 0 < report.mean_kl < 1 and report.max_kl >= report.mean_kl and 0.5 < report.agreement <= 1
    assert (report.samples, report.quantised, report.tensors) == (4, 14, len(tensor_index(made[0])))
    probe = json.loads((tmp_path / "probe.json").read_text())
    assert probe["tolerance_nats"] == LOOSE.probe_tolerance
    with_picture = [prompt for prompt in probe["prompts"] if prompt["image_png"]]
    assert 1 <= len(with_picture) < len(probe["prompts"])
    for prompt in probe["prompts"]:
        answer = prompt["answer_token_ids"]
        assert 1 <= len(answer) == len(prompt["logprobs"]) and prompt["prompt_token_ids"][-len(answer) :] == answer
        assert all(-20 < logprob <= 0 for logprob in prompt["logprobs"])
    assert Image.open(io.BytesIO(base64.b64decode(with_picture[0]["image_png"]))).size == (96, 96)


def test_the_unquantised_model_has_no_distance_to_itself(tiny_vlm: Path, made: Any, tmp_path: Path) -> None:
    master = take_in(made[0], tmp_path / "masters", "tiny").path
    report = verify(made[0], master, held_out_samples()[:2], tmp_path / "probe.json", VerifySettings(max_kl=1e-3))
    assert report.mean_kl < 1e-3 and report.agreement > 0.99  # the master's float16 rounding is all that is left


def test_the_bound_is_enforced(tiny_vlm: Path, made: Any, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"mean KL .* bound train\.verify\.max_kl=1e-06"):
        verify(made[0], tiny_vlm, held_out_samples()[:2], tmp_path / "probe.json", VerifySettings(max_kl=1e-6))


LINEAR = "language_model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t.pop(f"{LINEAR}.scales"), "up_proj.scales is missing"),
        (lambda t: t.pop("language_model.model.norm.weight"), "norm.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "extra is unexpected"),
        (lambda t: t.update({f"{LINEAR}.g_idx": torch.zeros(3, dtype=torch.int32)}), r"g_idx is I32\[3\]"),
        (lambda t: t["multi_modal_projector.linear_1.weight"].add_(1), "linear_1.weight was changed"),
        (lambda t: t[f"{LINEAR}.scales"].fill_(float("nan")), "up_proj dequantises to numbers that are not finite"),
    ],
)
def test_a_wrong_artefact_is_named(tiny_vlm: Path, serving: Path, tmp_path: Path, change: Any, told: str) -> None:
    spoil(serving, change)
    with pytest.raises(TrainingError, match=told):
        verify(serving, tiny_vlm, held_out_samples()[:1], tmp_path / "probe.json", LOOSE)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_replaying_layers_is_the_model_s_own_forward(family: str) -> None:
    """Qwen3-VL adds picture features to the stream between layers; the replay must bring them along."""
    torch.manual_seed(0)
    model, inputs, path = _family(family)
    decoder = [model.get_submodule(f"{path}.{number}") for number in range(2)]
    with torch.no_grad():
        last: list[torch.Tensor] = []
        handle = decoder[-1].register_forward_hook(lambda _, __, output: last.append(layers._stream(output)))
        tape = layers._record(model, decoder, [inputs])
        handle.remove()
        added = tape.layers[1][0].added
        for number, layer in enumerate(decoder):
            layers._advance(layer, tape, number)
    assert (added is not None) == (family == "qwen3_vl")
    assert torch.allclose(tape.streams[0], last[0], atol=1e-6)


def _family(family: str) -> tuple[Any, dict[str, Any], str]:
    if family == "llava":
        model = random_model(family, image_token_id=3, image_seq_length=16)
        pixels = {"pixel_values": torch.randn(1, 3, 16, 16)}
    else:
        model = random_model(family, image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6)
        pixels = {"pixel_values": torch.randn(16, 96), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = torch.tensor([[7, 5, *[3] * (16 if family == "llava" else 4), 6, 9, 10]])
    pixels |= {"mm_token_type_ids": (ids == 3).long()} if family == "qwen3_vl" else {}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    return model.eval(), inputs, "model.language_model.layers"


def test_a_quantised_base_is_dequantised(made: Any, tmp_path: Path) -> None:
    master = take_in(made[0], tmp_path / "masters", "tiny")
    assert master.kind == "dequantised"
    index, packed = tensor_index(master.path), tensor_index(made[0])
    weight = gptq_format.to_torch(index[f"{LINEAR}.weight"])
    expected = gptq_format.dequantise(gptq_format.read_packed(packed, LINEAR), 4).to(torch.float16)
    assert torch.equal(weight, expected)
    assert not gptq_format.quantised_linears(index)
    assert "quantization_config" not in json.loads((master.path / "config.json").read_text())
    load_model(master.path)


def test_a_sharded_checkpoint_keeps_its_files(tiny_vlm: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_vlm, tmp_path / "sharded"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = {f"model-0000{n}-of-00002.safetensors": dict(list(tensors.items())[n - 1 :: 2]) for n in (1, 2)}
    for name, half in halves.items():
        save_file(half, source / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, half in halves.items() for tensor in half}
    (source / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    quantize(source, source, calibration_samples(2), tmp_path / "out", SETTINGS, lambda _: None)
    after = json.loads((tmp_path / "out" / INDEX_NAME).read_text())["weight_map"]
    assert set(after.values()) == set(halves)
    assert after[f"{LINEAR}.qweight"] == weight_map[f"{LINEAR}.weight"]
    assert {name: entry.file.name for name, entry in tensor_index(tmp_path / "out").items()} == after


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda f: (f / "config.json").unlink(), InvalidRequest, "no config.json"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), UnsupportedModel, "pickled weights"),
        (lambda f: (f / "training_args.bin").write_bytes(b"x"), UnsupportedModel, "remove them"),
        (lambda f: _config(f, auto_map={"AutoModel": "x.Y"}), UnsupportedModel, "own code"),
        (lambda f: _config(f, architectures=["T5Model"], model_type="t5"), UnsupportedModel, "not in the module map"),
        (lambda f: _config(f, quantization_config={"quant_method": "awq"}), UnsupportedModel, "'awq'"),
    ],
)
def test_what_is_not_taken_in(tiny_vlm: Path, tmp_path: Path, change: Any, error: type[NoriaError], told: str) -> None:
    source = Path(shutil.copytree(tiny_vlm, tmp_path / "source"))
    change(source)
    with pytest.raises(error, match=told):
        check_source(source)


def test_too_little_disk_is_said_before_anything_is_written(
    tiny_vlm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("train.models.intake.shutil.disk_usage", lambda _: usage)
    with pytest.raises(Conflict, match=r"0\.0 GB free"):
        take_in(tiny_vlm, tmp_path / "masters", "tiny")
    assert list((tmp_path / "masters").iterdir()) == []


def test_a_model_is_added_once_and_goes_live(tiny_vlm: Path, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", train={"quantize": {"calibration_samples": 4}, "verify": {"max_kl": 5}})
    told: list[str] = []
    settings.home.mkdir()
    with Store.open(settings.store_url) as store:
        registry = Registry(settings.models_dir, store)
        manifest = add_model(tiny_vlm, registry, settings, "tiny", lambda stage, _: told.append(stage))
        assert registry.live() == manifest.id == "v1"
        assert registry.verify("v1").base == manifest.base
        again = add_model(tiny_vlm, registry, settings, "tiny", lambda *_: None)
        assert (again.id, len(registry.list_versions())) == ("v1", 1)
        other = Path(shutil.copytree(tiny_vlm, tmp_path / "other"))
        spoil(other, lambda tensors: tensors["language_model.model.norm.weight"].add_(1))
        with pytest.raises(Conflict, match="another model already"):
            add_model(other, registry, settings, "tiny", lambda *_: None)
    assert manifest.base is not None and (manifest.base.path, manifest.base.kind) == ("masters/tiny", "master")
    assert set(manifest.frozen) == {"vision_tower", "aligner"} and manifest.quantization["bits"] == 4
    assert {"serving/config.json", "serving/model.safetensors", "probe.json"} <= set(manifest.files)
    assert list(dict.fromkeys(told)) == ["copy", "quantize", "verify", "publish"]
    assert not list(settings.models_dir.glob(".staging*")) and not list(settings.masters_dir.glob(".*"))


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
