"""What steering costs: tokens per second under `add` and `clamp` beside the unsteered model, in one run.

    python bench/steer_cost.py [--tokens 24] [--rounds 7]

A random-weight Qwen3 of 8 layers, d_model 1,024 and a vocabulary of 151,936, with an SAE of width 16,384. Rounds run
every arm in turn; a share compares the fastest round of each, which other work on the machine disturbs least.
`clamp` is measured on a feature that is almost never active and on one that always is, which costs a full encode.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from qwen_scope.sae import TopK
from qwen_scope.steer import Intervention, steering

LAYER, WIDTH, D_MODEL, K = 4, 16_384, 1024, 50


def build() -> tuple[Qwen3ForCausalLM, TopK]:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=D_MODEL,
        intermediate_size=3072,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    bias = torch.zeros(WIDTH)
    bias[1] = 1e4  # feature 1 is always active
    sae = TopK(torch.randn(WIDTH, D_MODEL) / 32, torch.randn(D_MODEL, WIDTH) / 32, bias, torch.zeros(D_MODEL), K)
    return Qwen3ForCausalLM(config).eval(), sae


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    model, sae = build()
    ids = torch.randint(0, 1000, (1, 16))

    def seconds(interventions: list[Intervention], tokens: int) -> float:
        config = GenerationConfig(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)
        with steering(model, interventions, {LAYER: sae}, prompt_lengths=[16]):
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            return time.perf_counter() - start

    arms = {
        "unsteered": [],
        "add": [Intervention.add(layer=LAYER, feature=3, amount=2.0)],
        "clamp": [Intervention.clamp(layer=LAYER, feature=3, amount=2.0)],
        "clamp, always active": [Intervention.clamp(layer=LAYER, feature=1, amount=2.0)],
    }
    for interventions in arms.values():
        seconds(interventions, 2)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(args.rounds):
        for name, interventions in arms.items():
            times[name].append(seconds(interventions, args.tokens))
    best = {name: min(values) for name, values in times.items()}
    rows = {
        name: {"tokens_per_second": args.tokens / value, "share": best["unsteered"] / value}
        for name, value in best.items()
    }
    print(json.dumps({"threads": torch.get_num_threads(), **rows}, indent=2))


if __name__ == "__main__":
    main()
