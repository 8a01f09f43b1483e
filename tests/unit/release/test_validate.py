"""What never reaches the engine: every wrong checkpoint is refused with the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from noria.errors import IntegrityError
from serve.release.validate import read_tensors, validate_serving
from tests.unit.release.fakes import CONFIG, LINEAR, write_serving

Tensors = dict[str, np.ndarray[Any, Any]]
NORM = "language_model.model.norm.weight"


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """The folder that the engine runs."""
    write_serving(tmp_path / "running", 1.0)
    return tmp_path / "running"


def changed(tmp_path: Path, change: Callable[[Tensors], object]) -> Path:
    """A candidate whose tensors `change` has been at."""
    folder = tmp_path / "candidate"
    tensors = write_serving(folder, 2.0)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_other_weights_of_the_same_kind_pass(tmp_path: Path, running: Path) -> None:
    candidate = changed(tmp_path, lambda tensors: None)
    assert validate_serving(candidate, running) == 4
    entry = read_tensors(candidate)[NORM]
    assert (entry.dtype, entry.shape, entry.end - entry.begin) == ("F32", (32,), 128)


def scaled(value: float) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{LINEAR}.scales"][0, 31] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.update(bogus=np.zeros(4, np.float32)), "tensor bogus is not one that the running model loads"),
        (lambda t: t.pop(f"{LINEAR}.scales"), f"tensor {LINEAR}.scales is missing"),
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({f"{LINEAR}.qweight": np.zeros((8, 16), np.int32)}), "has shape [8, 16], the running"),
        (lambda t: t.update({NORM: np.zeros(32, np.float16)}), f"tensor {NORM} is F16, the running model loads F32"),
        (scaled(np.nan), f"tensor {LINEAR}.scales holds NaN or infinity"),
        (scaled(-np.inf), f"tensor {LINEAR}.scales holds NaN or infinity"),
        (lambda t: t.update({NORM: np.full(32, np.nan, np.float32)}), f"tensor {NORM} holds NaN or infinity"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path: Path, running: Path, change: Callable[[Tensors], object], says: str) -> None:
    with pytest.raises(IntegrityError) as caught:
        validate_serving(changed(tmp_path, change), running)
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-1], "model.safetensors has"),
        (lambda data: data + b"x", "something follows the last tensor"),
        (lambda data: data[:20], "do not hold the header they announce"),
        (lambda data: b"", "0 bytes do not hold the header"),
        (lambda data: data[:8] + b"!" + data[9:], "the header is not safetensors"),
    ],
)
def test_a_file_that_is_not_what_its_header_says(
    tmp_path: Path, running: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(IntegrityError) as caught:
        validate_serving(folder, running)
    assert says in caught.value.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "deep/optimizer.PT", "a.pkl", "model.ckpt", "modeling_x.py"])
def test_what_can_run_code_never_goes_live(tmp_path: Path, running: Path, name: str) -> None:
    candidate = Path(shutil.copytree(running, tmp_path / "candidate"))
    validate_serving(candidate, running)
    (candidate / name).parent.mkdir(exist_ok=True)
    (candidate / name).write_bytes(b"x")
    with pytest.raises(IntegrityError, match="can run code") as refused:
        validate_serving(candidate, running)
    assert refused.value.param == Path(name).name


def test_no_file_at_all(tmp_path: Path, running: Path) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    (folder / "model.safetensors").unlink()
    with pytest.raises(IntegrityError, match="holds no safetensors file"):
        validate_serving(folder, running)


def test_a_tensor_in_two_files(tmp_path: Path, running: Path) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    save_file({NORM: np.zeros(32, np.float32)}, folder / "more.safetensors")
    with pytest.raises(IntegrityError, match=f"tensor {NORM} is also in"):
        validate_serving(folder, running)


def test_an_index_that_leaves_a_tensor_out(tmp_path: Path, running: Path) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    names = dict.fromkeys(read_tensors(folder), "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert validate_serving(folder, running) == 4
    del names[NORM]
    index.write_text(json.dumps({"weight_map": names}))
    with pytest.raises(IntegrityError, match=f"tensor {NORM} lies in model.safetensors, the index says None"):
        validate_serving(folder, running)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**CONFIG, "model_type": "qwen2_vl"}, "config.json: model_type differs"),
        ({**CONFIG, "text_config": {"hidden_size": 64}}, "config.json: text_config differs"),
        (
            {**CONFIG, "quantization_config": {**CONFIG["quantization_config"], "bits": 8}},
            "quantization_config.bits is 8",
        ),
        ({k: v for k, v in CONFIG.items() if k != "quantization_config"}, "quantization_config.quant_method is None"),
    ],
)
def test_another_architecture_or_quantisation(tmp_path: Path, running: Path, config: Any, says: str) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IntegrityError) as caught:
        validate_serving(folder, running)
    assert says in caught.value.message


def test_notes_of_the_tools_in_a_config_do_not_matter(tmp_path: Path, running: Path) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    quantization = {**CONFIG["quantization_config"], "meta": {"quantizer": "other:1"}}
    noted = {**CONFIG, "transformers_version": "9", "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(noted))
    assert validate_serving(folder, running) == 4


def test_another_tokenizer_needs_a_start(tmp_path: Path, running: Path) -> None:
    folder = changed(tmp_path, lambda tensors: None)
    (folder / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(IntegrityError, match=r"tokenizer\.json differs from the running version's"):
        validate_serving(folder, running)
