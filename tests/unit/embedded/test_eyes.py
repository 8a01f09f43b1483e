"""Eyes as a file: what is taken out is what merging would have made, and laid over a blank master it is that again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from noria.errors import Conflict, IntegrityError, TrainingError
from noria.modules import architecture_of
from tests.unit.embedded.material import SFT, VISION, told, write_delta
from train.export.checkpoint import file_index, read_bytes, read_header, tensor_index
from train.export.merge import merge
from train.models.embedded.eyes import record
from train.models.embedded.eyes.export import write_eyes
from train.models.embedded.eyes.extract import extract
from train.models.embedded.eyes.lay import MARK, eyes_hash, eyes_of, lay_over
from train.models.embedded.eyes.record import CARD, FILES, RECORD, WEIGHTS, Eyes, open_eyes

STEP = 2.0**-8  # unit roundoff of bfloat16


def test_laid_over_the_blank_master_they_are_the_job_s_merged_master(
    blank: Path, adapter: Path, eyes: Eyes, tmp_path: Path
) -> None:
    """Tower and aligner to the bit; the language model to the rounding of the LoRA's factors."""
    merge(blank, [adapter], tmp_path / "merged")
    lay_over(eyes, blank, tmp_path / "sighted")
    wanted, got, before = tensor_index(tmp_path / "merged"), tensor_index(tmp_path / "sighted"), tensor_index(blank)
    assert list(got) == list(wanted)
    parted = architecture_of(json.loads((blank / "config.json").read_text())).partition(wanted, "checkpoint")
    factors = load_file(adapter / "03-sft" / "adapter_model.safetensors")
    numbers, exact = (load_file(tmp_path / one / "model.safetensors") for one in ("sighted", "merged"))
    adapted = 0
    for name in wanted:
        lora = f"base_model.model.model.{name.removesuffix('.weight').replace('.model.', '.', 1)}.lora_"
        if name in parted["language_model"] and f"{lora}A.weight" in factors:
            adapted += 1
            size = 3.0 * factors[f"{lora}B.weight"].abs() @ factors[f"{lora}A.weight"].abs()
            error = (numbers[name].float() - exact[name].float()).abs()
            assert bool((error <= 2.1 * STEP * (size + exact[name].abs().float())).all()), name
        else:
            assert read_bytes(got[name]) == read_bytes(wanted[name]), name
    assert adapted == 2 * 7
    moved = [name for name in wanted if read_bytes(before[name]) != read_bytes(got[name])]
    assert sum(name.startswith("language_model.") for name in moved) == adapted
    assert set(parted["aligner"]) < set(moved)
    assert sum(name.startswith("vision_tower.") for name in moved) > 0


def test_the_language_model_is_the_project_s_own_merge_of_the_rounded_factors(
    blank: Path, adapter: Path, eyes: Eyes, tmp_path: Path
) -> None:
    rounded = shutil.copytree(adapter, tmp_path / "rounded")
    factors = rounded / "03-sft" / "adapter_model.safetensors"
    halved = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(factors).items()}
    save_file(halved, factors)
    merge(blank, [rounded], tmp_path / "merged")
    lay_over(eyes, blank, tmp_path / "sighted")
    assert _tensors(tmp_path / "sighted") == _tensors(tmp_path / "merged")


def test_the_file_is_bfloat16_under_the_hub_s_and_peft_s_names(blank: Path, eyes: Eyes) -> None:
    index = file_index(eyes.weights)
    assert {entry.dtype for entry in index.values()} == {"BF16"}
    whole = {name for name in tensor_index(blank) if name.startswith(("vision_tower.", "multi_modal_projector."))}
    lora = {name for name in index if name.startswith("base_model.model.model.language_model.layers.")}
    assert set(index) == whole | lora
    assert len(lora) == 2 * 2 * 7
    header, _ = read_header(eyes.weights)
    assert header["__metadata__"] == {"format": "pt", "lora_rank": "4", "lora_alpha": "12", "lora_scale": "3"}
    assert eyes.record.lora is not None
    assert eyes.record.lora.model_dump() == {"rank": 4, "alpha": 12.0, "scale": 3.0, "linears": 14}
    assert eyes.record.size == eyes.weights.stat().st_size
    assert eyes.record.tensors == len(index)
    assert eyes.record.parameters == sum(entry.size_bytes // 2 for entry in index.values())
    assert sorted(path.name for path in eyes.folder.iterdir()) == sorted({WEIGHTS, RECORD, CARD})


def test_the_same_deltas_give_the_same_bytes(blank: Path, adapter: Path, eyes: Eyes, tmp_path: Path) -> None:
    again = write_eyes(extract(blank, [adapter]), told(), tmp_path / "again")
    assert again.record == eyes.record


def test_a_master_says_which_eyes_it_has(blank: Path, eyes: Eyes, tmp_path: Path) -> None:
    lay_over(eyes, blank, tmp_path / "sighted")
    assert eyes_of(tmp_path / "sighted") == eyes_hash(eyes.record) == f"sha256:{eyes.record.sha256}"
    assert eyes_of(blank) is None
    (tmp_path / "sighted" / MARK).write_text("[]")
    assert eyes_of(tmp_path / "sighted") is None
    assert not list(tmp_path.glob(".eyes-*"))


@pytest.mark.parametrize(("name", "why"), [(WEIGHTS, "is missing"), (RECORD, "is missing")])
def test_a_missing_file_is_told(eyes: Eyes, name: str, why: str) -> None:
    (eyes.folder / name).unlink()
    with pytest.raises(IntegrityError, match=rf"{name} {why}; install Noria again"):
        open_eyes(eyes.folder)


def test_one_wrong_bit_is_told(eyes: Eyes) -> None:
    content = bytearray(eyes.weights.read_bytes())
    content[-1] ^= 1
    eyes.weights.write_bytes(content)
    with pytest.raises(IntegrityError, match=rf"sha256 .*its record says {eyes.record.size} and {eyes.record.sha256}"):
        open_eyes(eyes.folder)
    eyes.weights.write_bytes(content[:-100])
    with pytest.raises(IntegrityError, match=f"has {eyes.record.size - 100} bytes"):
        open_eyes(eyes.folder)


@pytest.mark.parametrize("text", ["{", "{}", '{"format": 2}'])
def test_a_record_that_is_none_is_told(eyes: Eyes, text: str) -> None:
    (eyes.folder / RECORD).write_text(text)
    with pytest.raises(IntegrityError, match=f"{RECORD} is no record"):
        open_eyes(eyes.folder)


def test_eyes_of_another_shape_are_refused(eyes: Eyes, tmp_path: Path) -> None:
    from tests.tiny import build_tiny_vlm

    other = build_tiny_vlm(tmp_path / "other", dtype="bfloat16", hidden=128)
    with pytest.raises(TrainingError, match=r"a delta's .* is .*, the model's is"):
        lay_over(eyes, other, tmp_path / "sighted")
    assert not (tmp_path / "sighted").exists()


def test_what_is_too_large_is_refused_and_leaves_nothing(
    blank: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.models.embedded.eyes.export.MOST_BYTES", 100_000)
    with pytest.raises(TrainingError, match=r"the eyes are \d{6} bytes in all, 100000 at most"):
        write_eyes(extract(blank, [adapter]), told(), tmp_path / "eyes")
    assert list((tmp_path / "eyes").iterdir()) == []
    assert record.MOST_BYTES == 12_000_000


def test_a_folder_with_other_files_is_left_alone(blank: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "eyes").mkdir()
    (tmp_path / "eyes" / "thesis.txt").write_text("mine")
    with pytest.raises(Conflict, match=r"holds other files \(thesis\.txt\)"):
        write_eyes(extract(blank, [adapter]), told(), tmp_path / "eyes")
    assert [path.name for path in (tmp_path / "eyes").iterdir()] == ["thesis.txt"]
    assert "thesis.txt" not in FILES


def test_what_a_file_cannot_express_is_refused(blank: Path, adapter: Path, tmp_path: Path) -> None:
    twice = shutil.copytree(adapter, tmp_path / "twice")
    write_delta(blank, twice / "04-more", SFT, seed=9)
    with pytest.raises(TrainingError, match=r"layers\.0\.mlp\.down_proj\.weight has the LoRAs of 2 stages"):
        extract(blank, [twice])
    ranks = shutil.copytree(adapter, tmp_path / "ranks")
    config = json.loads((ranks / "03-sft" / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"model.language_model.layers.0.self_attn.q_proj": 8}
    (ranks / "03-sft" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=r"LoRAs differ .rank 4 with scale 2, rank 4 with scale 3.; eyes hold one"):
        extract(blank, [ranks])
    write_delta(blank, tmp_path / "whole" / "01-all", {**VISION, "language_model": "full"}, seed=3)
    with pytest.raises(TrainingError, match="was trained in full; of the language model eyes hold a LoRA"):
        extract(blank, [tmp_path / "whole"])
    write_delta(blank, tmp_path / "tower" / "01-tower", {**VISION, "vision_tower": "lora"}, seed=4)
    with pytest.raises(TrainingError, match=r"vision_tower\..* has a LoRA; eyes hold tower and aligner whole"):
        extract(blank, [tmp_path / "tower"])


def test_a_master_in_float32_is_refused(tiny_vlm: Path, adapter: Path) -> None:
    with pytest.raises(TrainingError, match="is F32 in the master; eyes are those of a master in bfloat16"):
        extract(tiny_vlm, [adapter])


def _tensors(folder: Path) -> dict[str, bytes]:
    return {name: bytes(read_bytes(entry)) for name, entry in tensor_index(folder).items()}
