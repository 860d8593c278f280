"""Quantised checkpoints give what the model gives whose weights are those that the file stands for."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import quantised_files as files
import torch
from families import build
from safetensors.torch import load_file, save_file

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError, QwenScopeError
from qwen_scope.model import load_model


def compressed(bits: int, form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": bits, "type": "int", **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "fp8 in blocks": (files.fp8(128, 128, "weight_scale_inv"), BLOCKS),
    "fp8 by tensor": (files.fp8(0, 0, "weight_scale"), {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8 by row": (files.fp8(1, 0, "weight_scale"), {"quant_method": "fbgemm_fp8"}),
    "mxfp8": (files.fp8(1, 32, "weight_scale_inv", True), {"quant_method": "mxfp8", "weight_block_size": [1, 32]}),
    "modelopt": (files.fp8(0, 0, "weight_scale"), {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "gptq": (files.gptq(4, True), GPTQ),
    "gptq asymmetric": (files.gptq(4, False), GPTQ),
    "gptq reordered": (files.gptq(4, False, shuffled=True), GPTQ | {"desc_act": True}),
    "gptq v2": (files.gptq(4, False, version=2), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq 8 bits": (files.gptq(8, False), GPTQ | {"bits": 8}),
    "gptq 2 bits": (files.gptq(2, False), GPTQ | {"bits": 2}),
    "awq": (files.awq, AWQ),
    "auto-round as gptq": (
        files.gptq(4, True), {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"},
    ),
    "auto-round as awq": (files.awq, AWQ | {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"}),
    "compressed 4 bits": (files.packed(4, True), compressed(4, "pack-quantized", group_size=32)),
    "compressed with zeros": (files.packed(4, False), compressed(4, "pack-quantized", group_size=32, symmetric=False)),
    "compressed 3 bits": (files.packed(3, False), compressed(3, "pack-quantized", group_size=32, symmetric=False)),
    "compressed int8": (files.int8, compressed(8, "int-quantized", strategy="channel")),
    "compressed int8 with zeros": (files.int8_zeros, compressed(8, "int-quantized", strategy="channel")),
    "compressed fp8": (files.fp8(1, 0, "weight_scale"), compressed(8, "float-quantized", strategy="channel")),
    "compressed fp8 in blocks": (
        files.fp8(128, 128, "weight_scale"), compressed(8, "float-quantized", block_structure=[128, 128]),
    ),
    **{f"mlx {bits} bits": (files.mlx(bits), {"group_size": 32, "bits": bits}) for bits in (2, 3, 4, 6, 8)},
}  # fmt: skip


def states(model: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(torch.arange(24).reshape(2, 12) * 7, output_hidden_states=True)
    return [*out.hidden_states, out.logits]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_file_stands_for_its_weights(kind: str, tmp_path: Path) -> None:
    write, said = KINDS[kind]
    plain = files.model()
    model = files.written(tmp_path, files.model(), write, {"quantization_config": said})
    loaded = load_model(tmp_path, device="cpu", dtype="float32").model
    for (name, want), (_, got) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")
    for want, got in zip(states(model), states(loaded), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.equal(states(model)[-1], states(plain)[-1]), "quantising changed nothing"
    assert getattr(loaded.config, "quantization_config", None) is None
    assert load_model(tmp_path, device="cpu").model.dtype == torch.float32  # as the config says
    assert load_model(tmp_path, device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def saved(folder: Path, kind: str = "fp8 in blocks", **changes: Any) -> Path:
    write, said = KINDS[kind]
    files.written(folder, files.model(), write, {"quantization_config": said | changes})
    return folder


def without(folder: Path, *endings: str, **added: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    kept = {key: one for key, one in load_file(path).items() if not key.endswith(endings)}
    save_file(kept | added, path, {"format": "pt"})


PLAIN = {"quantization_config": None}


@pytest.mark.parametrize(
    ("kind", "lost", "said"),
    [
        ("fp8 in blocks", "layers.1.mlp.up_proj.weight_scale_inv", "without its 'weight_scale_inv' or 'weight_scale'"),
        ("gptq", "q_proj.scales", "without its 'scales'"),
        ("awq", "q_proj.qzeros", "without its 'qzeros'"),
        ("compressed 4 bits", "q_proj.weight_scale", "without its 'weight_scale'"),
        ("compressed fp8", "q_proj.weight_scale", "without its 'weight_scale_inv' or 'weight_scale'"),
        ("mlx 4 bits", "q_proj.biases", "without its 'biases'"),
        ("fp8 in blocks", "q_proj.weight", "come with scales, such as .* would be ignored"),
        ("gptq", "q_proj.qweight", "come with scales, such as .* would be ignored"),
    ],
)
def test_a_weight_without_its_scales_is_refused(kind: str, lost: str, said: str, tmp_path: Path) -> None:
    saved(tmp_path, kind)
    without(tmp_path, lost)
    with pytest.raises(FormatError, match=said) as caught:
        load_model(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)
    assert "original precision" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fp8 in blocks", "stored in few bits (F8_E4M3, such as"),
        ("compressed int8", "stored in few bits (I8, such as"),
        ("gptq", "stored in few bits (I32, such as"),
        ("mlx 4 bits", "stored in few bits (U32, such as"),
    ],
)
def test_a_config_that_says_nothing_is_refused(kind: str, said: str, tmp_path: Path) -> None:
    """Loaders that cast what they find would take the stored numbers for the weights."""
    files.say(saved(tmp_path, kind), **PLAIN)
    with pytest.raises(FormatError) as caught:
        load_model(tmp_path, device="cpu")
    assert said in str(caught.value)
    assert main(["features", "x", "--model", str(tmp_path), "--sae", "lab"]) == 2


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "in the format 'marlin'"),
        ("awq", {"version": "gemv"}, "in the version 'gemv'"),
        ("awq", {"bits": 8}, "in 8 bits"),
        ("compressed 4 bits", {"format": "marlin-24"}, "in the format 'marlin-24'"),
        ("compressed 4 bits", {"transform_config": {"config_groups": {"R1": {}}}}, "with transforms"),
        ("compressed 4 bits", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "and sparse"),
        ("modelopt", {"quant_algo": "NVFP4"}, "as 'NVFP4'"),
        ("mlx 4 bits", {"mode": "mxfp4"}, "in the mode 'mxfp4'"),
    ],
)
def test_what_is_not_read_is_said(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_model(saved(tmp_path, kind, **changes), device="cpu")
    assert "original precision" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("fp8 in blocks", {"weight_block_size": [64, 64]}, "do not fit a weight .* in blocks of 64 x 64"),
        ("fp8 in blocks", {"weight_block_size": None}, "do not fit"),
        ("fp8 in blocks", {"weight_block_size": "large"}, "original precision"),
        ("fp8 in blocks", {"weight_block_size": [0, 0]}, "original precision"),
        ("gptq", {"quant_method": "awq"}, "can't be unpacked"),
        ("compressed 4 bits", {"config_groups": {"a": {"weights": {"num_bits": 8}}}}, "fit none of the stated bits"),
        ("compressed 4 bits", {"config_groups": {}}, "fit none of the stated bits"),
        ("compressed 4 bits", {"config_groups": [3]}, "original precision"),
        ("mlx 4 bits", {"group_size": 48}, "do not fit scales"),
        ("mlx 4 bits", {"group_size": "many"}, "original precision"),
        ("mlx 4 bits", {"group_size": 0}, "original precision"),
    ],
)
def test_a_config_that_does_not_fit_its_weights(kind: str, changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(QwenScopeError, match=said) as caught:
        load_model(saved(tmp_path, kind, **changes), device="cpu")
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_quantised_after_all(tmp_path: Path) -> None:
    files.model().save_pretrained(tmp_path)
    files.byte_tokenizer().save_pretrained(tmp_path)
    files.say(tmp_path, quantization_config=BLOCKS)
    with pytest.raises(FormatError, match=r"says that its weights are quantised \(FP8\), and they are not: take"):
        load_model(tmp_path, device="cpu")


def test_quantising_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"quantised already \(FP8\); drop quantization"):
        load_model(saved(tmp_path), device="cpu", quantization="8bit")


SUMS = ("input_layernorm.weight", "attention_layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")


def as_mlx(folder: Path, said: dict[str, Any]) -> None:
    """A saved model in the form that mlx-lm (0.32) gives one of Qwen3.5: with its own names, experts stacked, the
    convolution's channels last, and norms of `1 + weight` as that sum."""
    path = folder / "model.safetensors"
    kept, experts = {}, {}
    for name, one in load_file(path).items():
        name = name.replace("model.language_model.", "language_model.model.").replace(
            "lm_head", "language_model.lm_head"
        )
        if found := re.fullmatch(r"(.*)\.experts\.(\d+)\.(\w+)_proj\.weight", name):
            experts.setdefault(f"{found[1]}.switch_mlp.{found[3]}_proj.weight", {})[int(found[2])] = one
        elif name.endswith(SUMS):
            kept[name] = one + 1
        else:
            kept[name] = one.transpose(1, 2).contiguous() if "conv1d" in name else one
    kept |= {name: torch.stack([each[i] for i in range(len(each))]) for name, each in experts.items()}
    out = {}
    for name, one in kept.items():
        if not name.endswith("_proj.weight"):
            out[name] = one
            continue
        rows, _ = files.mlx(8, 16)(one.flatten(0, -2))
        for end, part in rows.items():
            out[name.removesuffix("weight") + end] = part.reshape(*one.shape[:-1], -1).contiguous()
    save_file(out, path, {"format": "mlx"})
    files.say(folder, quantization=said, quantization_config=said)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_what_mlx_changes_is_changed_back(name: str, tmp_path: Path) -> None:
    model = build(name)
    for key, one in model.named_parameters():
        if "norm" in key:
            torch.nn.init.normal_(one, 0.0, 0.1)
    model.save_pretrained(tmp_path)
    files.byte_tokenizer().save_pretrained(tmp_path)
    plain = load_model(tmp_path, device="cpu").model
    as_mlx(tmp_path, {"group_size": 16, "bits": 8})
    loaded = load_model(tmp_path, device="cpu", dtype="float32").model
    assert type(loaded) is type(plain)
    for (key, want), (_, got) in zip(plain.named_parameters(), loaded.named_parameters(), strict=True):
        exact = not key.endswith(("_proj.weight", "_proj"))
        torch.testing.assert_close(
            got, want, rtol=0, atol=1e-6 if exact else 0.01, msg=lambda t, key=key: f"{key}: {t}"
        )


def test_a_model_of_mlx_of_another_architecture_is_refused(tmp_path: Path) -> None:
    build("qwen3").save_pretrained(tmp_path)
    said = KINDS["mlx 4 bits"][1]
    files.written(tmp_path, files.model(), KINDS["mlx 4 bits"][0], {"quantization_config": said, "model_type": "olmo2"})
    with pytest.raises(InputError, match=r"read for llama, .* not for 'olmo2'"):
        load_model(tmp_path, device="cpu")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks by it
def test_experts_of_fp8_and_an_adapter_on_them(tmp_path: Path) -> None:
    """Qwen stores each expert apart; transformers stacks them."""
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    files.byte_tokenizer().save_pretrained(tmp_path)
    path, out, dense = tmp_path / "model.safetensors", {}, {}
    for name, one in load_file(path).items():
        if not name.endswith("_proj.weight"):
            out[name] = dense[name] = one
            continue
        parts, meant = files.fp8(8, 8, "weight_scale_inv")(one)
        out |= {name.removesuffix("weight") + end: part for end, part in parts.items()}
        dense[name] = meant.float()
    save_file(dense, path, {"format": "pt"})
    want = states(load_model(tmp_path, device="cpu").model)
    save_file(out, path, {"format": "pt"})
    files.say(tmp_path, quantization_config=BLOCKS | {"weight_block_size": [8, 8]})
    loaded = load_model(tmp_path, device="cpu").model
    for one, other in zip(states(loaded), want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    live = peft.get_peft_model(loaded, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    live.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_model(tmp_path, adapter=tmp_path / "adapter", device="cpu").model
    with torch.no_grad():
        logits = live.eval()(torch.arange(24).reshape(2, 12) * 7).logits
    torch.testing.assert_close(states(adapted)[-1], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "said"),
    [("gptq", "unpacked from GPTQ"), ("mlx 4 bits", "unpacked from MLX"), ("bitsandbytes", "language model, packed")],
)
def test_plan_says_what_each_takes(kind: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "bitsandbytes":
        files.say(saved(tmp_path), quantization_config={"quant_method": kind, "load_in_8bit": True})
    else:
        saved(tmp_path, kind)
    assert main(["plan", str(tmp_path)]) == 0
    assert said in capsys.readouterr().out
    assert main(["plan", str(tmp_path), "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    disk = (tmp_path / "model.safetensors").stat().st_size
    assert found["disk"] == disk
    assert found.get("packed") == (disk if kind == "bitsandbytes" else None)
    assert found["model"] == 4 * sum(one.numel() for one in files.model().parameters())


@pytest.mark.parametrize("method", ["bitsandbytes", "torchao"])
def test_a_missing_package_is_named_before_anything_is_read(method: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Not even the weights have to be there."""
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    files.say(saved(tmp_path), quantization_config={"quant_method": method})
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        NotFoundError, match=rf"quantised \({method}\) it needs the packages {method}, accelerate; install"
    ):
        load_model(tmp_path, device="cpu")
