"""Quantised checkpoints by the packages that people make them with. They live in an environment of their own, which
`tests/peers/run.sh quantised` makes."""

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
    return {**AUTO_ROUND, **BY_MLX, **BY_TRANSFORMERS}
