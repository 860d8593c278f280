"""The fingerprint of weights: the same wherever they lie and in whichever type, another as soon as they are others."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from qwen_scope.model import load_model, weights_fingerprint
from qwen_scope.model.fingerprint import spread

MODEL = tiny.folder() / "model"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL, device="cpu", dtype="float32").model


def of(folder: Path, dtype: str = "auto") -> str | None:
    return weights_fingerprint(load_model(folder, device="cpu", dtype=dtype).model)


def test_place_and_type_do_not_matter(model, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "elsewhere")
    mine = weights_fingerprint(model)
    assert mine is not None
    assert len(mine) == 64
    assert of(tmp_path / "elsewhere", "float32") == of(MODEL, "bfloat16") == mine
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "bf16")
    shutil.copy(MODEL / "tokenizer.json", tmp_path / "bf16")
    shutil.copy(MODEL / "tokenizer_config.json", tmp_path / "bf16")
    assert {of(tmp_path / "bf16", dtype) for dtype in ("float32", "bfloat16", "float16", "auto")} == {mine}


@pytest.mark.parametrize("step", [1e-3, 1e-4, 1e-5])
def test_a_step_of_training_is_seen(model, step: float) -> None:
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(step * torch.randn(parameter.shape, generator=g))
    assert weights_fingerprint(other) != weights_fingerprint(model)


def test_what_changes_the_model_without_its_weights_is_seen(model) -> None:
    mine = weights_fingerprint(model)
    other = copy.deepcopy(model)
    other.config.rms_norm_eps = 1e-3
    assert weights_fingerprint(other) != mine
    other = copy.deepcopy(model)
    other.model.rotary_emb.inv_freq *= 0.9
    assert weights_fingerprint(other) != mine
    other = copy.deepcopy(model)
    layers = other.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert weights_fingerprint(other) != mine
    other = copy.deepcopy(model)
    other.config.transformers_version, other.config._name_or_path, other.config.use_cache = "9", "x", False
    assert weights_fingerprint(other) == mine


def test_weights_that_are_not_in_memory_have_none(model) -> None:
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert weights_fingerprint(empty) is None


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_beside_the_weights_is_seen(model) -> None:
    peft = pytest.importorskip("peft")
    mine = weights_fingerprint(model)
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert weights_fingerprint(wrapped.get_base_model()) != mine


def test_the_places_are_spread_over_the_whole() -> None:
    assert spread(5, 16).tolist() == [0, 1, 2, 3, 4]
    found = spread(10**9, 16).tolist()
    assert (found[0], found[-1], len(set(found))) == (0, 10**9 - 1, 16)
