"""Model folders that transformers or a tokenizer can't read end in one sentence, whatever is raised inside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from qwen_scope.cli import main
from qwen_scope.errors import InputError, QwenScopeError
from qwen_scope.model import load_model
from qwen_scope.text import tokenize


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.folder() / "model", tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | values), encoding="utf-8")


def refused(folder: Path, said: str = "") -> str:
    with pytest.raises(QwenScopeError) as caught:
        load_model(folder, device="cpu")
    message = str(caught.value)
    assert said in message
    assert "\n" not in message
    assert len(message) < 900
    return message


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
        {"quant_method": "hqq", "quant_config": {}, "skip_modules": []},
        {"quant_method": "eetq"},
        {"group_size": 64, "bits": 4},  # MLX names no method
        {"quant_method": "of-tomorrow", "bits": 3},
        {"quant_method": ["gptq"]},
    ],
    ids=lambda q: str(q.get("quant_method", "none")),
)
def test_quantised_weights_without_their_package(folder: Path, quantised: dict[str, Any]) -> None:
    change(folder / "config.json", quantization_config=quantised)
    message = refused(folder)
    assert "quantised" in message
    assert "original precision" in message


@pytest.mark.parametrize("name", ["mlp.up_proj.weight_scale_inv", "self_attn.q_proj.scales", "mlp.up_proj.absmax"])
def test_scales_that_would_be_ignored(folder: Path, name: str) -> None:
    """A checkpoint in FP8 whose config.json does not say so: its weights would be read without their scales."""
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path) | {f"model.layers.0.{name}": torch.ones(1, 1)}
    save_file(tensors, path, {"format": "pt"})
    assert "would be ignored" in refused(folder, "come with scales")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rope_parameters": {"rope_type": "of-tomorrow", "rope_theta": 1e4, "factor": 2.0}}, ""),
        ({"model_type": "of_tomorrow"}, "a newer transformers may"),
        ({"model_type": "t5"}, "not a decoder language model"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "code of its own, which is not run"),
        ({"num_hidden_layers": -1}, ""),
        ({"hidden_size": "many"}, ""),
        ({"num_attention_heads": 0}, ""),
        ({"vocab_size": None}, ""),
        ({"hidden_act": "of-tomorrow"}, ""),
        ({"layer_types": ["of-tomorrow"] * 3}, ""),
        ({"num_hidden_layers": 10**30}, ""),
    ],
)
def test_configs_that_do_not_fit(folder: Path, values: dict[str, Any], said: str) -> None:
    change(folder / "config.json", **values)
    refused(folder, said)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b'{"model_type": ' + b"9" * 4301 + b"}",
        b"[" * 100_000,
        b"\xff\xfe{}",
        b"\x00",
        b'{"model_type": "\\ud800"}',
    ],
)
def test_config_files_that_are_none(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    refused(folder)


def test_an_adapter_whose_model_is_not_here(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"}))
    refused(folder, "'a/b' is not in the local cache")


@pytest.mark.parametrize(
    "values",
    [
        {"pre_tokenizer": {"type": "OfTomorrow"}},
        {"normalizer": {"type": "OfTomorrow"}},
        {"model": {"type": "OfTomorrow", "vocab": {}, "merges": []}},
        {"post_processor": 5},
        {"model": None},
        {"version": 2},
    ],
)
def test_tokenizers_of_tomorrow(folder: Path, values: dict[str, Any]) -> None:
    change(folder / "tokenizer.json", **values)
    assert "newer transformers" in refused(folder, "has no tokenizer that transformers can load")


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"9" * 4301])
def test_tokenizer_files_that_are_none(folder: Path, data: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    refused(folder, "has no tokenizer")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", ""),
        ("{{ messages[0]['content'].nothing.at_all }}", ""),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | of_tomorrow }}", ""),
        ("{{ ''.__class__.__mro__ }}{{ unsafe() }}", ""),
        ({"tool_use": "x", "rag": "y"}, ""),
    ],
)
def test_chat_templates_that_refuse(folder: Path, template: Any, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_model(folder, device="cpu").tokenizer
    tokenizer.chat_template = template
    with pytest.raises(InputError, match="chat template refuses") as caught:
        tokenize(tokenizer, ["hello"], max_length=None, chat="default")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_named_template_called_default_is_taken(folder: Path) -> None:
    tokenizer = load_model(folder, device="cpu").tokenizer
    tokenizer.chat_template = {"default": "<{{ messages[0]['content'] }}>", "tool_use": "x"}
    assert tokenize(tokenizer, ["hello"], max_length=None, chat="default").texts == ["<hello>"]


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}]])
def test_messages_that_are_none(messages: list[Any]) -> None:
    tokenizer = load_model(tiny.folder() / "model", device="cpu").tokenizer
    with pytest.raises(InputError, match="role and content"):
        tokenize(tokenizer, [messages], max_length=None, chat="default")


def test_weights_that_are_none(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    assert main(["features", "hello", "--model", str(folder), "--sae", str(tiny.folder() / "sae")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("qwen-scope: ")
    assert err.count("\n") == 1
