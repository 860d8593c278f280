"""What a graph of features costs: a 64-token prompt and 200 nodes, beside a forward and backward pass of the model.

    python bench/why.py [--rounds 7] [--write]

The lab, which has an SAE at every layer. All ways run alternately; a ratio is the median over rounds of a way's time
over that of the forward and backward pass (gradients of all parameters, loss on every token) of the same round.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from side_by_side import alternate, markdown, write

from qwen_scope import load_scope
from qwen_scope.circuits import Place, Quantity, WhyOptions, ablated, explain, read
from qwen_scope.lab import documents

TOKENS, NODES, EXACT, AIM = 64, 200, 50, 30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write the section of docs/performance.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scope = load_scope("lab", device="cpu")
    texts = (scope.tokenizer(one.text)["input_ids"] for one in documents(seed=8, n=50))
    ids = next(one for one in texts if len(one) > TOKENS)
    answer, ids = ids[TOKENS], ids[:TOKENS]
    whole = torch.tensor([ids])
    trained = load_scope("lab", device="cpu").model.requires_grad_(True)

    def both_ways() -> None:
        trained(whole, labels=whole, use_cache=False).loss.backward()
        trained.zero_grad()

    def graph(method: str) -> int:
        options = WhyOptions(method=method, nodes=NODES, node_share=1.0, exact=0)
        return len(explain(read(scope, ids, Quantity.logit(answer)), options).features)

    reading = read(scope, ids, Quantity.logit(answer))
    one = reading.active[2]
    places = [Place(2, int(one.positions[n]), int(one.features[n])) for n in range(EXACT)]
    assert graph("gradient") == graph("relp") == NODES
    ways = {
        "forward and backward": both_ways,
        "graph, gradient": lambda: graph("gradient"),
        "graph, relp": lambda: graph("relp"),
        f"ablation of {EXACT} nodes": lambda: ablated(reading, [[place] for place in places]),
    }
    both_ways()
    times = alternate(ways, args.rounds)
    base = times["forward and backward"]
    rows = []
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, base, strict=True))
        aim = f"{AIM}{'' if ratio <= AIM else ' (missed)'}" if name.startswith("graph") else ""
        rows.append((name, f"{1000 * statistics.median(own):.0f}", f"{ratio:.1f}", aim))
    words = (
        f"The lab with SAEs at all six layers, one thread, {TOKENS} tokens, {NODES} features; the graph with effects,"
        f" edges in two parts and ladders, ablation apart; {args.rounds} rounds in turn."
    )
    made = markdown(("way", "ms", "times a forward and backward pass", "aim, at most"), rows)
    print(f"{words}\n\n{made}")
    if args.write:
        write("why.py", [words, "", made])


if __name__ == "__main__":
    main()
