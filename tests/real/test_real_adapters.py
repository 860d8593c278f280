"""A LoRA of SmolLM2-135M: its folder, the merged checkpoint and the live model of PEFT are one model to a scope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import LAYER, Ask

from qwen_scope import Scope, load_scope
from qwen_scope.model import load_model
from qwen_scope.sae import FeatureActs

TEXTS = [
    "The capital of France is Paris, and the capital of Italy is Rome.",
    ">>> sorted([3, 1, 2])\n[1, 2, 3]",
    "Die Donau fließt durch Wien und Budapest.",
]
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def acts(scope: Scope) -> FeatureActs:
    return scope.features(TEXTS, layers=[LAYER]).acts[LAYER]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
@pytest.mark.filterwarnings("ignore:the SAEs were trained on another model")  # a live model has its folder's name
def test_folder_merged_and_live_are_one_model(trained: dict[str, Any], ask: Ask, work: Path, tmp_path: Path) -> None:
    saes, base = work / "run" / "tiny", load_model(work / "model.gguf", device="cpu", dtype="float32")
    plain = acts(load_scope(base.model, saes, tokenizer=base.tokenizer))
    torch.manual_seed(0)
    live: Any = peft.get_peft_model(base.model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    for name, one in live.named_parameters():
        if "lora_B" in name:  # zeros until training moves them
            torch.nn.init.normal_(one, 0.0, 0.1)
    live.peft_config["default"].base_model_name_or_path = str(work / "model.gguf")
    live.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    in_memory = acts(load_scope(live, saes, tokenizer=base.tokenizer))
    merged = live.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    base.tokenizer.save_pretrained(tmp_path / "merged")
    del live, merged, base

    named = load_scope(work / "model.gguf", saes, adapter=tmp_path / "adapter", device="cpu", dtype="float32")
    by_folder = acts(named)
    by_merged = acts(load_scope(tmp_path / "merged", saes, device="cpu", dtype="float32"))
    assert torch.equal(by_folder.indices, by_merged.indices)
    assert torch.equal(by_folder.values, by_merged.values)
    # W x + B (A x) against (W + B A) x: equal up to the order of additions; features at rank k may change places.
    one, other = in_memory.to_dense(), by_folder.to_dense()
    both = (one > 0) & (other > 0)
    assert both.sum() > 0.999 * (one > 0).sum()
    torch.testing.assert_close(one[both], other[both], rtol=1e-3, atol=1e-3)
    kept = ((plain.to_dense() > 0) & (other > 0)).sum() / (other > 0).sum()
    assert kept < 0.9  # the adapter changes what fires
    said = ask(
        "features", TEXTS[0], "--json", "--model", "model.gguf", "--dtype", "float32", "--adapter",
        str(tmp_path / "adapter"), "--sae", "run/tiny", "--top", 5, model=False,
    )  # fmt: skip
    first = named.features(TEXTS[:1], layers=[LAYER]).acts[LAYER]
    for i, token in enumerate(said["tokens"]):
        shown = [one["feature"] for one in token["layers"][str(LAYER)]]
        assert shown == first.indices[0, i, :5].tolist()
