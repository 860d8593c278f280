"""GGUF files: packed and unpacked they give what the model gives whose weights were rounded in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants

from qwen_scope import load_scope
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.model import (
    HookPoint,
    capture,
    gguf_file,
    load_config,
    load_model,
    load_tokenizer,
    weights_fingerprint,
)
from qwen_scope.model.gguf import Gguf
from qwen_scope.model.packed import unpacked

WIDTH, HEADS, KV, HEAD, INNER, LAYERS, VOCABULARY = 256, 2, 1, 128, 512, 2, 512

# The parts of a decoder block in transformers and in llama.cpp.
BLOCK = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip
NORMS = {
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "qwen2": {"post_attention_layernorm": "ffn_norm"},
    "qwen3": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}  # fmt: skip
KINDS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "F16", "BF16", "F32"]


def model_of(architecture: str, tied: bool) -> Any:
    """A small random model of the architecture."""
    sizes = {
        "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": KV, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "head_dim": HEAD, "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    kind = {"gemma3": "gemma3_text"}.get(architecture, architecture)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **sizes))
    for name, one in model.named_parameters():  # biases and norms are plain numbers until training moves them
        if one.dim() == 1:
            torch.nn.init.normal_(one, 0.0 if name.endswith("bias") else 1.0, 0.1)
    return model.eval().requires_grad_(False)


def written(path: Path, model: Any, architecture: str, kind: str, *, tokens: list[str] | None = None) -> Any:
    """The file, in the way llama.cpp's converter writes it; the model gets the rounded weights."""
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_vocab_size(VOCABULARY)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if tokens is not None:
        merges = [f"{a} {b}" for a, b in zip("ab", "bc", strict=True)]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([*tokens, *(f"<{i}>" for i in range(VOCABULARY - len(tokens)))])
        writer.add_token_merges(merges)
        writer.add_eos_token_id(0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for layer in range(LAYERS):
        parts = (BLOCK | NORMS[architecture]).items()
        names |= {f"model.layers.{layer}.{ours}": f"blk.{layer}.{theirs}" for ours, theirs in parts}
    tied = config.tie_word_embeddings
    for name, one in model.named_parameters():
        module, _, attribute = name.rpartition(".")
        values, of = one.numpy().copy(), GGMLQuantizationType[kind if one.dim() == 2 else "F32"]
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = HEADS if module.endswith("q_proj") else KV  # as llama.cpp interleaves the halves of each head
            values = values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)
        if architecture == "gemma3" and "norm" in module:
            values = values + 1
        rows = quants.quantize(values, of)
        if not (tied and module == "lm_head"):
            writer.add_tensor(f"{names[module]}.{attribute}", rows, raw_dtype=of)
        back = torch.from_numpy(quants.dequantize(rows, of).astype(np.float32))
        if architecture == "llama" and module.endswith(("q_proj", "k_proj")):
            heads = HEADS if module.endswith("q_proj") else KV
            back = back.reshape(heads, len(back) // heads // 2, 2, -1).transpose(1, 2).reshape(one.shape)
        one.copy_(back - 1 if architecture == "gemma3" and "norm" in module else back.reshape(one.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def states(model: Any) -> list[torch.Tensor]:
    ids = torch.arange(24).reshape(2, 12) * 7 % VOCABULARY
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    return [*out.hidden_states, out.logits]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", list(NORMS))
def test_a_file_gives_what_the_rounded_model_gives(architecture: str, tied: bool, tmp_path: Path) -> None:
    model = written(tmp_path / "m.gguf", model_of(architecture, tied), architecture, "Q8_0")
    file = Gguf.open(tmp_path / "m.gguf")
    assert file.stays_packed
    auto, config = transformers.AutoModelForCausalLM, file.config()
    dense, packed = (file.model(auto, config, torch.float32, way) for way in (False, True))
    for want, got, same in zip(states(model), states(dense), states(packed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert torch.equal(got, same)
    assert weights_fingerprint(dense) == weights_fingerprint(packed) is not None
    assert sum(b.nbytes for b in packed.buffers()) < sum(p.nbytes for p in dense.parameters()) / 3
    half = file.model(auto, config, torch.bfloat16, packed=True)
    assert torch.equal(states(half)[-1], states(file.model(auto, config, torch.bfloat16, False))[-1])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_unpacked(kind: str, tmp_path: Path) -> None:
    """The reference is the NumPy arithmetic of the package gguf; k-quants other than Q6_K it can't write."""
    of, values = GGMLQuantizationType[kind], np.random.default_rng(0).normal(size=(8, 512)).astype(np.float32)
    if kind == "Q6_K":
        rows = np.random.default_rng(1).integers(0, 256, (8, 2 * 210), np.uint8)
        rows[:, 208::210], rows[:, 209::210] = 0, 48  # the scales, as fp16
    else:
        rows = quants.quantize(values, of)
    want = quants.dequantize(rows, of)
    got = unpacked(torch.from_numpy(np.ascontiguousarray(rows)), int(of)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    if kind != "Q6_K":
        assert np.abs(got - values).max() < {"Q": 0.5}.get(kind[0], 0.02)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A whole file with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("gguf")
    letters = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)] + [chr(c) for c in range(174, 256)]
    tokens = [*letters, *(chr(256 + i) for i in range(68)), "ab", "bc"]
    written(folder / "small.gguf", model_of("qwen2", True), "qwen2", "Q8_0", tokens=tokens)
    return folder / "small.gguf"


def test_a_file_is_named_in_several_ways(small: Path) -> None:
    by_file, by_folder = (load_model(name, device="cpu") for name in (small, small.parent))
    assert torch.equal(states(by_file.model)[-1], states(by_folder.model)[-1])
    assert by_file.tokenizer("ab c")["input_ids"] == load_tokenizer(small)("ab c")["input_ids"]
    assert load_config(small).num_hidden_layers == LAYERS
    assert by_file.name == str(small)
    stated = load_model(small, device="cpu", dtype="float32").model
    assert all(type(one) is torch.nn.Linear for one in stated.modules() if hasattr(one, "in_features"))
    assert torch.equal(states(by_file.model)[-1], states(stated)[-1])


def test_a_vision_tower_beside_a_model_is_passed_over(small: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(small.read_bytes())
    (tmp_path / "mmproj-model-f16.gguf").write_bytes(b"")
    assert gguf_file(str(tmp_path)) == str(tmp_path / "model.gguf")
    writer = GGUFWriter(tmp_path / "mmproj-b.gguf", "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(FormatError, match=r"config in .* can't be read"):
        load_model(tmp_path / "mmproj-b.gguf")


def test_safetensors_go_before_a_file_beside_them(small: Path, tmp_path: Path) -> None:
    model_of("qwen3", True).save_pretrained(tmp_path)
    (tmp_path / "model.gguf").write_bytes(small.read_bytes())
    assert gguf_file(str(tmp_path)) is None
    assert load_config(tmp_path).model_type == "qwen3"


def test_residuals_of_a_packed_model_are_those_of_a_plain_hook(small: Path) -> None:
    model = load_model(small, device="cpu").model
    ids, seen = torch.arange(10)[None], []
    handle = model.model.layers[1].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(ids)
    handle.remove()
    point = HookPoint.parse("layers.1.resid_post")
    assert torch.equal(capture(model, ids, [point])[point], seen[0][0] if isinstance(seen[0], tuple) else seen[0])


@pytest.mark.parametrize("cut", [0, 10, 40, 200, 9000, -1])
def test_a_truncated_file_is_refused(small: Path, tmp_path: Path, cut: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(small.read_bytes()[:cut])
    with pytest.raises(FormatError, match="cut short"):
        load_model(tmp_path / "cut.gguf")


@pytest.mark.slow
def test_what_is_no_model_is_refused(small: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.gguf").write_text("no model at all")
    with pytest.raises(FormatError, match="does not begin with the letters GGUF"):
        load_model(tmp_path / "text.gguf")
    with pytest.raises(NotFoundError, match=r"no file 'absent\.gguf'"):
        load_model("absent.gguf")
    (tmp_path / "b.gguf").write_bytes(small.read_bytes())
    with pytest.raises(InputError, match="holds 2 GGUF files"):
        load_model(tmp_path)
    (tmp_path / "m-00001-of-00003.gguf").write_bytes(small.read_bytes())
    with pytest.raises(FormatError, match="one of 3 parts"):
        load_model(tmp_path / "m-00001-of-00003.gguf")
    parts = tmp_path / "parts"
    parts.mkdir()
    for i in (1, 2):
        (parts / f"m-0000{i}-of-00003.gguf").write_bytes(small.read_bytes())
    with pytest.raises(FormatError, match=r"one of 3 parts, of which 1 are missing \(m-00003-of-00003\.gguf\)"):
        load_model(parts)
    with pytest.raises(NotFoundError, match=r"'c\.gguf' of 'a/b' can't be fetched"):
        load_model("a/b:c.gguf")
    with pytest.raises(InputError, match="quantised already"):
        load_model(small, quantization="8bit")
    written(tmp_path / "odd.gguf", model_of("qwen2", True), "qwen2", "Q8_0")
    content = (tmp_path / "odd.gguf").read_bytes()
    at = content.index(b"qwen2.block_count") + len(b"qwen2.block_count") + 4
    (tmp_path / "odd.gguf").write_bytes(content[:at] + (10**6).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(FormatError, match="holds 2 blocks, its config says 1000000"):
        load_model(tmp_path / "odd.gguf")
    assert main(["features", "x", "--model", str(tmp_path / "text.gguf"), "--sae", "lab"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_features_of_a_file(small: Path, tmp_path: Path) -> None:
    scope = load_scope(small, tiny_saes(tmp_path), device="cpu")
    unpacked_scope = load_scope(small, tmp_path / "saes", device="cpu", dtype="float32")
    one, other = (s.features(["ab c"]).acts[0] for s in (scope, unpacked_scope))
    assert torch.equal(one.indices, other.indices)
    assert torch.equal(one.values, other.values)
    assert scope.generate("ab").text == unpacked_scope.generate("ab").text


def tiny_saes(folder: Path) -> Path:
    from qwen_scope import save_sae
    from qwen_scope.sae import Identity, TopK

    torch.manual_seed(1)
    sae = TopK(
        W_enc=torch.randn(64, WIDTH), W_dec=torch.randn(WIDTH, 64), b_enc=torch.zeros(64), b_dec=torch.zeros(WIDTH),
        k=4, identity=Identity("tiny", 0, "0"),
    )  # fmt: skip
    save_sae(sae, folder / "saes")
    return folder / "saes"
