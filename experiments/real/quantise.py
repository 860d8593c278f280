"""Quantised checkpoints by the packages that people make them with. They live in an environment of their own, which
`tests/peers/run.sh quantised` makes. Kinds whose package writes nothing without a GPU are written here, by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def by_auto_round(model: Path, out: Path, form: str, **options: Any) -> Path:
    """By AutoRound, rounding to the nearest without calibration; it writes the formats of others, too."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    options = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu", **options}
    AutoRound(loaded, AutoTokenizer.from_pretrained(model), **options).quantize_and_save(str(out), format=form)
    return next(path.parent for path in out.rglob("config.json"))


def by_mlx(model: Path, out: Path, bits: int, size: int = 64) -> Path:
    """By mlx-lm, which runs on a CPU, too."""
    import mlx_lm

    mlx_lm.convert(str(model), str(out), quantize=True, q_bits=bits, q_group_size=size)
    return out


def by_transformers(
    model: Path, out: Path, config: Callable[[], Any], tell: Callable[[Any], None] | None = None
) -> Path:
    """By transformers with bitsandbytes or torchao; `tell` is given the model in memory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: Any = {"quantization_config": config(), "device_map": {"": "cpu"}, "dtype": torch.float32}
    loaded = AutoModelForCausalLM.from_pretrained(model, **options)
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    if tell is not None:
        tell(loaded)
    return out


def by_hand(model: Path, out: Path, said: dict[str, Any], columns: int, rows: int = 1, exponents: bool = False) -> Path:
    """FP8 as its published layouts have it: numbers of e4m3 and a scale for each block, found in float64.

    Args:
        said: the `quantization_config`.
        rows, columns: of a block; 0 for all.
        exponents: scales are powers of 2, stored as exponents with an offset of 127 (OCP Microscaling).
    """
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tensors = {}
    for name, one in loaded.state_dict().items():
        if not name.endswith("_proj.weight"):
            if not (loaded.config.tie_word_embeddings and name.startswith("lm_head")):
                tensors[name] = one
            continue
        high, wide = rows or one.shape[0], columns or one.shape[1]
        blocks = one.double().unfold(0, high, high).unfold(1, wide, wide)
        scale = blocks.abs().amax((-2, -1)).clamp(min=2.0**-60) / 448
        scale = scale.log2().ceil().exp2() if exponents else scale.float().double()
        factor = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)
        tensors[name] = (one.double() / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
        kept = (scale.log2() + 127).to(torch.uint8) if exponents else scale.float()
        end = "weight_scale_inv" if exponents else "weight_scale"
        tensors[name.removesuffix("weight") + end] = kept if rows or columns else kept.reshape(())
    loaded.config.quantization_config = said
    loaded.config.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def bitsandbytes(**options: Any) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**options)


def torchao(name: str) -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    return TorchAoConfig(getattr(torchao.quantization, name)())


INT4 = {"bits": 4, "group_size": 64}
AUTO_ROUND: dict[str, Callable[[Path, Path], Path]] = {
    "FP8 blocks of 128 x 128": partial(by_auto_round, form="fp8", scheme="FP8_BLOCK"),
    "GPTQ 8 bits": partial(by_auto_round, form="auto_gptq", bits=8, group_size=64, sym=True),
    "GPTQ 4 bits": partial(by_auto_round, form="auto_gptq", sym=True, **INT4),
    "AWQ 4 bits": partial(by_auto_round, form="auto_awq", sym=False, **INT4),
    "AutoRound 4 bits": partial(by_auto_round, form="auto_round", sym=False, **INT4),
    "compressed-tensors FP8": partial(by_auto_round, form="llm_compressor", scheme="FP8_BLOCK"),
    "compressed-tensors int8": partial(by_auto_round, form="llm_compressor", scheme="INT8"),
    "compressed-tensors 4 bits": partial(by_auto_round, form="llm_compressor", **INT4),
}
BY_HAND: dict[str, Callable[[Path, Path], Path]] = {
    "FP8 by row (FBGEMM)": partial(by_hand, said={"quant_method": "fbgemm_fp8"}, columns=0),
    "FP8 by tensor (ModelOpt)": partial(
        by_hand, said={"quant_method": "modelopt", "quant_algo": "FP8"}, rows=0, columns=0
    ),
    "MXFP8": partial(by_hand, said={"quant_method": "mxfp8", "weight_block_size": [1, 32]}, columns=32, exponents=True),
}
BY_MLX: dict[str, Callable[[Path, Path], Path]] = {
    f"MLX {bits} bits": partial(by_mlx, bits=bits) for bits in (8, 6, 4, 3)
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
BY_TRANSFORMERS: dict[str, Callable[..., Path]] = {
    "bitsandbytes 8 bits": partial(by_transformers, config=partial(bitsandbytes, load_in_8bit=True)),
    "bitsandbytes 4 bits": partial(by_transformers, config=partial(bitsandbytes, **NF4)),
    "torchao int8": partial(by_transformers, config=partial(torchao, "Int8WeightOnlyConfig")),
    "torchao FP8": partial(by_transformers, config=partial(torchao, "Float8WeightOnlyConfig")),
}


def writers() -> dict[str, Callable[..., Path]]:
    """All, by the names of what they write."""
    return {**AUTO_ROUND, **BY_HAND, **BY_MLX, **BY_TRANSFORMERS}


def writer_of(kind: str) -> str:
    """Who writes a kind, in words."""
    table = {"AutoRound": AUTO_ROUND, "hand": BY_HAND, "mlx-lm": BY_MLX, "transformers": BY_TRANSFORMERS}
    return next((name for name, kinds in table.items() if kind in kinds), "")
