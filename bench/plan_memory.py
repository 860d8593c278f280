"""Is `qwen-scope plan` right? A random-weight model and SAE of a released group's true shape, and the memory they take.

    python bench/plan_memory.py SAE-Res-Qwen3-8B-Base-W64K-L0_50 --dtype bfloat16 [--device cuda] [--layer 18]

Prints plan and peak side by side (on a GPU the allocator's peak, on a CPU the process's), and exits 1 if they differ by
more than a tenth. No weights are downloaded: memory does not depend on what they are.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_scope.model import LoadedModel, model_sizes
from qwen_scope.sae import Identity, TopK, catalog
from qwen_scope.scope import Scope, config_of, plan


class OneLayer:
    """Stands where the SAEs of a scope stand: one random SAE, whatever the layer."""

    def __init__(self, sae: TopK, layer: int) -> None:
        self.source, self.layers, self.d_model, self.sae = "random", [layer], sae.d_model, sae

    def __getitem__(self, layer: int) -> TopK:
        return self.sae


def peak(device: torch.device) -> int:
    """Peak bytes: of the allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def random_sae(group: catalog.Group, layer: int, device: torch.device, dtype: torch.dtype) -> TopK:
    W_enc = torch.randn(group.d_sae, group.d_model, device=device, dtype=dtype).mul_(group.d_model**-0.5)
    W_dec = torch.randn(group.d_model, group.d_sae, device=device, dtype=dtype)
    zeros = torch.zeros(group.d_sae, device=device), torch.zeros(group.d_model, device=device)
    return TopK(W_enc, W_dec, *zeros, k=group.k, identity=Identity("random", layer, ""))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of one forward pass")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    group = catalog.find(args.group)
    layer = group.layers // 2 if args.layer is None else args.layer
    before = peak(device)
    config = config_of(group.model)
    torch.set_default_dtype(dtype)
    with device:
        model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    # Any tokenizer will do: its ids lie within the vocabulary.
    tokenizer = AutoTokenizer.from_pretrained(catalog.find("lab").model)
    planned = plan(model_sizes(config), group.d_sae, 1, dtype=args.dtype, on_gpu=device.type != "cpu")
    results = []
    for sae_dtype in ("float32", "bfloat16"):
        sae = random_sae(group, layer, device, getattr(torch, sae_dtype))
        scope = Scope(LoadedModel(model, tokenizer, group.model), OneLayer(sae, layer))  # type: ignore[arg-type]
        text = "The weather is fine today. " * args.tokens
        began = time.perf_counter()
        seen = scope.features([tokenizer.decode(tokenizer(text, verbose=False)["input_ids"][: args.tokens])], [layer])
        seconds = time.perf_counter() - began
        acts = seen.of(0, layer)
        results.append(
            {"sae": sae_dtype, "tokens": len(seen.tokens[0]), "L0": float(acts.active().float().mean()), "s": seconds}
        )
        if sae_dtype == "float32":
            measured = peak(device) - before
        del sae, scope
    ratio = measured / planned.one_at_a_time
    where = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    summary = {"group": group.name, "device": where, "planned": planned.one_at_a_time, "measured": measured}
    print(json.dumps({**summary, "ratio": round(ratio, 3), "runs": results}, indent=1))
    return 0 if abs(ratio - 1) <= 0.1 else 1


if __name__ == "__main__":
    sys.exit(main())
