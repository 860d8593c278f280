"""Extraction end to end beside the bare forward pass to that layer plus the bare bf16 product.

    python bench/extract.py [--layer 3] [--tokens 2048] [--rounds 3]

A model of the shape of Qwen3-1.7B with random weights in bf16, the lab's tokenizer and texts, 32,768 features. Ours
reads text, tokenizes, captures, encodes and writes a store; the floor has the ids and keeps nothing. The layer is an
early one, where encoding is a large share of the work; the second table sweeps all layers up to it.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from side_by_side import PAGE, Way, alternate, at_most, random_model, ratio, table, tensors, write

import torch  # isort: skip
from transformers import Qwen3Config, Qwen3ForCausalLM  # isort: skip

from qwen_scope import load_scope  # isort: skip
from qwen_scope.scope import ExtractOptions, extract  # isort: skip
from qwen_scope.text import Corpus

from qwen_scope.lab import documents  # isort: skip
from qwen_scope.model import LoadedModel  # isort: skip
from qwen_scope.text import by_length

from qwen_scope.sae import Identity, TopK, fingerprint  # isort: skip

D_SAE, K, BATCH = 32768, 50, 4096
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8,
    "head_dim": 128,
}  # fmt: skip
GOAL = 1.3


def model_of(blocks: int, vocab: int) -> Qwen3ForCausalLM:
    return random_model(Qwen3Config(num_hidden_layers=blocks, vocab_size=vocab, **SHAPE))


def bare(model: Qwen3ForCausalLM, rows: list[list[int]], layers: list[int], W_low: torch.Tensor) -> Way:
    """The same batches through the blocks, and the products of what comes out, in tiles, written over each other."""
    batches = []
    for batch in by_length([len(row) for row in rows], BATCH):
        ids = torch.zeros(len(batch), max(len(rows[i]) for i in batch), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for j, i in enumerate(batch):
            ids[j, : len(rows[i])] = torch.tensor(rows[i])
            mask[j, : len(rows[i])] = 1
        batches.append((ids, mask))
    room = torch.empty(512, len(W_low), dtype=torch.bfloat16)

    def way() -> None:
        for ids, mask in batches:
            h = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            for tile in h[mask.bool()].split(512):
                for _ in layers:
                    torch.mm(tile, W_low.T, out=room[: len(tile)])

    return way


def measure(layers: list[int], rounds: int, tokens: int) -> list[str]:
    lab = load_scope("lab", device="cpu")
    deepest = max(layers)
    # The block after the layer too: capture has to stop before it.
    model, floor_model = (model_of(deepest + more, len(lab.tokenizer)) for more in (2, 1))
    texts, rows, total = [], [], 0
    for document in documents(seed=1, n=2000):
        texts.append(document.text)
        rows.append(lab.tokenizer(document.text, verbose=False)["input_ids"])
        total += len(rows[-1])
        if total >= tokens:
            break
    _, W, b = tensors(SHAPE["hidden_size"], D_SAE, 1)
    weights = W, W.T, b, torch.zeros(SHAPE["hidden_size"])
    saes = {layer: TopK(*weights, k=K, identity=Identity("random", layer, fingerprint(*weights))) for layer in layers}
    loaded = LoadedModel(model, lab.tokenizer, "random")

    def ours() -> int:
        with tempfile.TemporaryDirectory() as folder:
            corpus, options = Corpus(texts, name="bench"), ExtractOptions(batch_tokens=BATCH)
            with extract(corpus, loaded, saes, f"{folder}/store", options) as made:
                return made.manifest.tokens

    if ours() != total:
        raise SystemExit("the store holds another number of tokens than the floor reads")
    floor = f"bare forward pass to layer {deepest}, and {len(layers)} bare bf16 product{'s' * (len(layers) > 1)}"
    ways: dict[str, Way] = {"qwen-scope extract": ours, floor: bare(floor_model, rows, layers, W.bfloat16())}
    ways[floor]()
    times = alternate(ways, rounds)
    goal = at_most(ratio(times, "qwen-scope extract", floor), GOAL)
    name = f"layer {deepest}" if len(layers) == 1 else f"layers {min(layers)} to {deepest}"
    title = f"{total:,} tokens of {len(texts):,} texts, {name}, d_model 2,048, d_sae {D_SAE:,}, k {K}, bf16"
    stats = saes[deepest].encode_stats
    assert stats is not None
    return [f"\n### {title}\n", f"Path `{stats.path}`.\n", *table(times, "qwen-scope extract", {floor: goal})]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layer", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=PAGE)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    lines = measure([args.layer], args.rounds, args.tokens)
    lines += measure(list(range(args.layer + 1)), args.rounds, args.tokens)
    write("extract.py", lines, args.out)


if __name__ == "__main__":
    main()
