"""Training end to end, from text to steps, beside the bare forward pass to that layer over the same rows.

    python bench/train_run.py [--tokens 16384] [--rounds 5]

A model of the shape of SmolLM2-135M with random weights in bf16, the lab's tokenizer and texts. Ours reads text, packs
rows, runs the model, shuffles residuals and trains; the forward pass has the rows and keeps nothing. The steps alone,
on residuals that lie in memory, tell what both take one after the other: on one CPU each of them wants every core, so
that sum is the floor.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import islice
from pathlib import Path

from side_by_side import PAGE, Way, alternate, random_model, table, write

import torch  # isort: skip
from transformers import Qwen3Config, Qwen3ForCausalLM  # isort: skip

from qwen_scope import load_scope  # isort: skip
from qwen_scope.lab import documents  # isort: skip
from qwen_scope.model import HookPoint  # isort: skip
from qwen_scope.text import Corpus, Counted, TokenRows  # isort: skip
from qwen_scope.train import ResidualBuffer, TrainConfig, train  # isort: skip

LAYER, D_SAE, K, BATCH, ROW, ROWS = 18, 4096, 32, 1024, 256, 16
SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
SHARE = 0.9


def model_of(blocks: int, vocab: int) -> Qwen3ForCausalLM:
    return random_model(Qwen3Config(num_hidden_layers=blocks, vocab_size=vocab, **SHAPE))


def measure(tokens: int, rounds: int) -> list[str]:
    tokenizer = load_scope("lab", device="cpu").tokenizer
    # The block after the layer too: capture has to stop before it.
    model, floor_model = (model_of(LAYER + more, len(tokenizer)) for more in (2, 1))
    point = HookPoint(LAYER)
    texts = [document.text for document in documents(seed=1, n=tokens // 8)]
    passes = max(1, tokens // (ROW * ROWS))

    def rows() -> TokenRows:
        return TokenRows(Corpus(texts, name="bench"), tokenizer, context_length=ROW, batch_size=ROWS)

    def source() -> ResidualBuffer:
        # One filling: what is read is what is trained on, but for less than a batch.
        budget = passes * ROWS * ROW * SHAPE["hidden_size"] * 4
        return ResidualBuffer(
            model, rows(), [point], batch=BATCH, budget=budget, counted=Counted.of(tokenizer), most=None
        )

    read = list(islice(rows(), passes))
    held = source().fill({}, iter(read))
    config = TrainConfig(d_sae=D_SAE, k=K, tokens=held // BATCH * BATCH, batch=BATCH)
    kept = [{name: x.clone() for name, x in batch.items()} for batch in islice(source(), config.steps)]

    def forward() -> None:
        for ids in read:
            with torch.no_grad():
                floor_model.model(input_ids=ids, use_cache=False)

    ours, bare, steps = "qwen-scope train", f"bare forward pass to layer {LAYER}", "the steps alone"
    ways: dict[str, Way] = {
        ours: lambda: train(config, source()), bare: forward, steps: lambda: train(config, iter(kept)),
    }  # fmt: skip
    for way in ways.values():
        way()
    times = alternate(ways, rounds)
    both = zip(times[bare], times[steps], times[ours], strict=True)
    share, whole = (
        statistics.median(values) for values in zip(*((a / c, (a + b) / c) for a, b, c in both), strict=True)
    )
    miss = "" if share >= SHARE else ": **misses**"
    verdicts = {
        bare: f"ours runs at {share:.0%} of its speed, wanted at least {SHARE:.0%}{miss}",
        steps: f"with the forward pass {whole:.2f}x ours: the floor where both want the same cores",
    }
    total = sum(ids.numel() for ids in read)
    title = f"{total:,} tokens, layer {LAYER}, d_model {SHAPE['hidden_size']}, d_sae {D_SAE:,}, k {K}, batch {BATCH:,}"
    return [f"\n### {title}, model in bf16\n", *table(times, ours, verdicts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    write("train_run.py", measure(args.tokens, args.rounds), args.out)


if __name__ == "__main__":
    main()
