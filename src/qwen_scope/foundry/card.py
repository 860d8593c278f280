"""The card of a lab: what it is made of and how good it is, written from its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WHAT = """\
A tiny Qwen, trained on a small corpus whose factors are known, with one sparse autoencoder per layer in the layout of
the released Qwen-Scope SAEs. It ships inside the package, so that every command, test and example runs on real features
without a download. Remake it with `qwen-scope lab build -o DIR`: the promise is the figures within tolerance, not the
bytes. This page is written from the measurements of the bundled build by `qwen-scope lab card`.
"""

NOT = """\
## What it is not

- Not a language model to talk to: it has seen a grammar of everyday sentences, sums, and a little real code and prose.
- Not evidence about Qwen's released models or SAEs: a factor that one feature carries here may take many there.
- Not a benchmark of training methods beyond its own scale.
- Its insults are mild and its rude register is a label for experiments, not a safety data set.

The code and prose are excerpts of CPython, under the PSF licence that lies beside them in `qwen_scope/lab/real/`.
"""


def card(metrics: Mapping[str, Any]) -> str:
    """The card as Markdown."""
    config, run = metrics["config"], metrics["config"]["pretrain"]
    seconds = metrics["seconds"]
    lines = [
        f"# The lab ({metrics['group']})",
        "",
        WHAT,
        "## Data",
        "",
        f"{config['n_documents']:,} training documents from seed {config['seed']}: talk in nine languages and four"
        " registers, chats, sums, Python code, English prose, and small labelled shares that drift between languages or"
        " repeat. Held out are sentences, whole templates, and combinations of words and templates.",
        "",
        "## Sizes",
        "",
        *rows(
            ("", "value"),
            [
                ("family", config["family"]),
                ("layers, d_model", f"{config['n_layers']}, {config['d_model']}"),
                ("vocabulary, context", f"{config['vocab_size']:,}, {config['context']}"),
                ("training of the model", f"{run['tokens']:,} tokens in rows of {run['row']}, peak lr {run['lr']:g}"),
                ("SAEs, one per layer", f"d_sae {config['d_sae']:,}, k {config['k']}"),
                ("training of each SAE", f"{config['sae_tokens']:,} tokens"),
                ("made in", f"{seconds['language model']} s and {seconds['saes']} s, on the maker's machine"),
            ],
        ),
        "",
        "## Losses of the language model",
        "",
        "Nats per token, fresh documents of each split.",
        "",
        *rows(("split", "loss"), [(name, f"{loss:.3f}") for name, loss in metrics["loss"].items()]),
        "",
        "## Reconstruction",
        "",
        "On held-out text, first tokens included. Explained variance is `1 - sum|x - x_hat|^2 / sum|x - mean|^2`.",
        "",
        *rows(
            ("layer", "explained variance", "L0", "never fired here", "median norm"),
            [
                (
                    layer,
                    f"{r['explained_variance']:.4f}",
                    f"{r['L0']:.1f}",
                    f"{r['never_fired']:.1%}",
                    f"{r['median_norm']:.1f}",
                )
                for layer, r in metrics["reconstruction"].items()
            ],
        ),
        "",
        "## Single features that detect a factor",
        "",
        "The feature and threshold with the best F1 on training documents, scored on held-out ones: a document is"
        " called positive if the maximum or the mean of the feature over its tokens exceeds the threshold. A register"
        " is told from the other registers of its language.",
        "",
        *rows(
            ("factor", "layer", "feature", "is above", "F1", "F1 in training", "documents"),
            [
                (
                    d["factor"],
                    d["layer"],
                    d["feature"],
                    f"{d['reduction']} > {d['threshold']:.3g}",
                    f"{d['f1']:.3f}",
                    f"{d['f1_train']:.3f}",
                    f"{d['positives']} + {d['negatives']}",
                )
                for d in metrics["detectors"]
            ],
        ),
        "",
        NOT,
    ]
    return "\n".join(lines)


def rows(columns: Sequence[str], body: Sequence[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *body]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
