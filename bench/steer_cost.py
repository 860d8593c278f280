"""What steering costs: tokens per second under `add` and `clamp` beside the unsteered model, in one run.

    python bench/steer_cost.py [--seconds 150] [--tokens 8] [--write]

A random-weight Qwen3 of 8 layers, d_model 1,024 and a vocabulary of 151,936, with an SAE of width 16,384. Every round
runs all conditions, in an order that rotates; a share compares a condition with the unsteered run of its own round, so
that other work on the machine, which comes and goes slower than a round, touches both. `clamp` is measured on a feature
that is almost never active and on one that always is, which costs a full encode.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from side_by_side import markdown, write
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from qwen_scope.sae import TopK
from qwen_scope.steer import Intervention, steering

LAYER, WIDTH, D_MODEL, K = 4, 16_384, 1024, 50


def build() -> tuple[Any, TopK]:
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


def median_interval(values: np.ndarray) -> tuple[float, float, float]:
    """The median with its bootstrap interval."""
    draws = np.random.default_rng(0).integers(0, len(values), (2000, len(values)))
    low, high = np.quantile(np.median(values[draws], 1), (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    args = parser.parse_args()
    model, sae = build()
    ids = torch.randint(0, 1000, (1, 4))
    config = GenerationConfig(
        max_new_tokens=args.tokens, min_new_tokens=args.tokens, do_sample=False, pad_token_id=0, eos_token_id=None
    )

    def seconds(interventions: list[Intervention]) -> float:
        with steering(model, interventions, {LAYER: sae}, prompt_lengths=[4]):
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            return time.perf_counter() - start

    conditions = {
        "unsteered": [],
        "add": [Intervention.add(layer=LAYER, feature=3, amount=2.0)],
        "clamp": [Intervention.clamp(layer=LAYER, feature=3, amount=2.0)],
        "clamp, always active": [Intervention.clamp(layer=LAYER, feature=1, amount=2.0)],
    }
    names = list(conditions)
    times: dict[str, list[float]] = {name: [] for name in conditions}
    for interventions in conditions.values():
        seconds(interventions)
    end = time.monotonic() + args.seconds
    for turn in range(10**6):
        for name in names[turn % 4 :] + names[: turn % 4]:
            times[name].append(seconds(conditions[name]))
        if time.monotonic() > end:
            break
    plain = np.array(times["unsteered"])
    rows = []
    for name in names:
        own = np.array(times[name])
        share, low, high = median_interval(plain / own)
        aim = {"unsteered": "", "add": "0.97"}.get(name, "0.90")
        rows.append((name, args.tokens / float(np.median(own)), f"{share:.3f} [{low:.3f}, {high:.3f}]", aim))
        print(json.dumps({"condition": name, "rounds": len(own), "share": share, "low": low, "high": high}), flush=True)
    words = (
        f"A random-weight Qwen3 of 8 layers, d_model {D_MODEL:,} and a vocabulary of 151,936 in fp32, an SAE of width"
        f" {WIDTH:,}, batch 1; {len(plain)} rounds of {args.tokens} tokens, conditions in rotating order."
        " Share of unsteered: the median over rounds of the ratio within a round, with its 95% interval."
    )
    made = markdown(("condition", "tokens per second", "share of unsteered", "aim, at least"), rows)
    print(f"{words}\n\n{made}")
    if args.write:
        write("steer_cost.py", [words, "", made])


if __name__ == "__main__":
    main()
