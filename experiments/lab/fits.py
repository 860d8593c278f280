"""Is the verdict right on checkpoints for which the answer is known?

    python -m experiments.lab.fits [--write]

The bundled SAEs on: the lab itself; the lab fine-tuned on one language, a little and a lot; the lab with its blocks
moved by one place; new weights; another model of the lab's shape, trained from other weights on other documents; and
the lab with the dimensions of its residual stream in another order, which predicts exactly what the lab does. Each
beside the lab, and alone.

The rule is that of docs/fits.md. Right is `fits` for the lab itself, anything but `do not use` for a fine-tuned one,
and `do not use` for the others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoints import reordered, reset, shuffled
from experiments.harness import At, Experiment, Row, main
from experiments.lab.bundled import lab
from experiments.lab.tuned import fine_tune
from experiments.sections import paragraph, table
from qwen_scope.foundry import PretrainConfig, pack, pretrain
from qwen_scope.lab import documents
from qwen_scope.scope import DO_NOT_USE, FITS
from qwen_scope.text import CorpusOptions
from qwen_scope.train import EvalRun, Fit, run_eval

TITLE = "Whether SAEs fit a checkpoint"
LAYERS = (2, 5)
TUNED = {"fine-tuned a little": (640, 1e-4), "fine-tuned": (2400, 1e-3)}
OTHER = "trained from another seed"
PAIRS = ("the same", *TUNED, "blocks moved", "new weights", OTHER, "other dimensions")
SEPARATE = PretrainConfig(tokens=1_200_000, warmup=40, seed=1)
FIRST_SEED, DOCUMENTS = 9000, 16_000  # of the documents that the other model is trained on


@dataclass(frozen=True)
class Sizes:
    """Tokens that are measured on, and that the other model is trained on."""

    tokens: int = 8192
    training: int = SEPARATE.tokens


def checkpoint(at: At[Sizes], pair: str) -> Path:
    """The folder of a checkpoint, made once."""
    folder = at.folder / pair.replace(" ", "-")
    if (folder / "model" / "config.json").is_file():
        return folder / "model"
    if pair in TUNED:
        samples, lr = TUNED[pair]
        fine_tune(folder, "ja", 1, samples, lr=lr)
        return folder / "model"
    model = lab().model
    made = {
        "the same": lambda: model,
        "blocks moved": lambda: shuffled(model),
        "new weights": lambda: reset(model),
        OTHER: lambda: separate(at),
        "other dimensions": lambda: reordered(model),
    }[pair]()
    made.save_pretrained(folder / "model")
    lab().tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def separate(at: At[Sizes]) -> Any:
    """A model of the lab's shape that shares nothing with it but the tokenizer and the kind of text."""
    other, tokenizer = reset(lab().model, seed=1), lab().tokenizer
    texts = (one.text for one in documents(seed=FIRST_SEED, n=DOCUMENTS))
    rows = pack(tokenizer, texts, SEPARATE.row)
    train, held = rows[:-64], rows[-64:]
    pretrain(other.float().requires_grad_(), train, replace(SEPARATE, tokens=at.sizes.training))
    with torch.no_grad():
        losses = [float(one(input_ids=held, labels=held).loss) for one in (other.eval(), lab().model)]
    at.kept("losses", lambda: dict(zip(("other", "lab"), losses, strict=True)))
    return other


def run(at: At[Sizes], pair: str) -> dict[str, Any]:
    """The verdicts of one checkpoint, beside the lab and alone."""
    post = str(checkpoint(at, pair))
    asked = {
        "data": "lab", "sae": "lab", "post": post, "layers": LAYERS, "tokens": at.sizes.tokens, "remember": False,
        "corpus": CorpusOptions(split="heldout_sentences"), "context_length": 128, "dtype": "float32", "device": "cpu",
    }  # fmt: skip
    both, alone = run_eval(EvalRun(model="lab", **asked)), run_eval(EvalRun(model=None, **asked))
    found: dict[str, Any] = {
        str(point.layer): {"beside": brief(fit), "alone": alone.fits[point].verdict} for point, fit in both.fits.items()
    }
    return found | {"losses": at.kept("losses", dict)} if pair == OTHER else found


def brief(fit: Fit) -> dict[str, Any]:
    """What the table shows of a verdict."""
    figures = {name: [one.value, one.low, one.high] for name, one in fit.figures.items()}
    moves = None if fit.moves is None else [fit.moves.moved, fit.moves.tested]
    return {"verdict": fit.verdict, "figures": figures, "moves": moves, "tokens": fit.tokens, "n": fit.documents}


def right(pair: str, verdict: str) -> bool:
    """Whether a verdict is the one that is known."""
    if pair == "the same":
        return verdict == FITS
    return (verdict == DO_NOT_USE) is (pair not in TUNED)


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    cells, hits, alone_hits, n = [], 0, 0, 0
    sizes = [row[str(layer)]["beside"] for row in rows for layer in LAYERS]
    for row in rows:
        for layer in LAYERS:
            found = row[str(layer)]
            beside = found["beside"]
            shown = [cell(beside["figures"].get(name)) for name in ("ev_base", "ev_post", "ce_post", "jaccard")]
            moved = "{} of {}".format(*beside["moves"])
            cells.append((row["pair"], layer, beside["verdict"], *shown, moved, found["alone"]))
            n += 1
            hits += right(row["pair"], beside["verdict"])
            alone_hits += right(row["pair"], found["alone"])
    losses = next((row["losses"] for row in rows if "losses" in row), None)
    told = (
        f"""Trained from another seed: a model of the lab's shape, from other weights, on {at.sizes.training:,} tokens
        of other documents; its loss on further ones is {losses["other"]:.2f} nats, the lab's {losses["lab"]:.2f}."""
        if losses
        else ""
    )
    how = f"""`python -m experiments.lab.fits --write`: the bundled SAEs on checkpoints of the lab's shape, judged by
        the rule of [fits.md](fits.md), which was written before. Fine-tuned: every weight, on Japanese talk and chats,
        {TUNED["fine-tuned a little"][0]} samples at a learning rate of {TUNED["fine-tuned a little"][1]:g}, and
        {TUNED["fine-tuned"][0]:,} at {TUNED["fine-tuned"][1]:g}. Blocks moved: each one place on, the last one first.
        Other dimensions: the lab with the dimensions of its residual stream in another order, which predicts what the
        lab predicts. {told} Over
        {min(one["tokens"] for one in sizes):,} to {max(one["tokens"] for one in sizes):,} tokens that count on both
        checkpoints, in {min(one["n"] for one in sizes)} held-out documents or more, with 95% intervals over documents.
        EV is the explained variance, CE the CE loss recovered on the checkpoint, Jaccard the overlap of the active
        features with those on the lab; moved are features with q <= 0.05 of those that were tested."""
    what = f"""Right beside the lab: {hits} of {n}; alone: {alone_hits} of {n}. Right is `fits` for the same weights,
        anything but `do not use` for a fine-tuned checkpoint, and `do not use` for all others."""
    columns = ("checkpoint", "layer", "verdict", "EV, lab", "EV", "CE", "Jaccard", "moved", "verdict alone")
    return "\n\n".join([paragraph(how), table(columns, cells), paragraph(what)])


def cell(values: list[float] | None) -> str:
    """A value with its interval."""
    return "not told" if values is None else "{:.3f} [{:.3f}, {:.3f}]".format(*values)


experiment = Experiment(
    title=TITLE,
    varies={"pair": PAIRS},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"pair": ("the same", "blocks moved")},
    quick_sizes=Sizes(tokens=2600, training=20_000),
)

if __name__ == "__main__":
    main(experiment)
