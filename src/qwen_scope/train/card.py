"""The model card of a trained group: what was trained, how, and how good it is, with plots where matplotlib is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.files import write_text, write_whole
from qwen_scope.text import Counted, summary

from .card_began import began
from .evaluate import DENSITY_EDGES
from .metrics import read_metrics

COLUMNS = (
    ("FVU", "fvu", "{:.4f}"),
    ("FVU without first tokens", "fvu_without_first", "{:.4f}"),
    ("explained variance", "explained_variance", "{:.4f}"),
    ("per token", "explained_variance_per_token", "{:.4f}"),
    ("cosine", "cosine", "{:.4f}"),
    ("L0", "l0", "{:.1f}"),
    ("dead", "dead", "{:.2%}"),
    ("CE recovered", "ce_recovered", "{:.4f}"),
    ("KL", "kl", "{:.4f}"),
)

EXPLAINED = """\
`FVU = sum |x - x_hat|^2 / sum |x - mean|^2` over all evaluated tokens; explained variance is `1 - FVU`; "per token" is
the mean over tokens of `1 - |x - x_hat|^2 / |x - mean|^2`, `mean` being that of all evaluated tokens (sae_lens'
`explained_variance_legacy` takes the mean of each batch). `dead` is the share of features that fired on none of the
evaluated tokens. `CE recovered` is `(zeros - spliced) / (zeros - clean)` of the next-token loss when the reconstruction
takes the residual's place, at that one layer and at every token that counts; `KL` is the divergence of that prediction
from the clean one, in nats per token.
"""


def write_card(
    folder: Path, run: Mapping[str, Any], quality: Mapping[str, Mapping[str, Any]], metrics: Sequence[Path] = ()
) -> Path:
    """Write `README.md` into `folder`, and plots beside it; returns the card.

    Args:
        folder: of the group.
        run: what `run.json` holds: config, model, data, versions, counts.
        quality: per hook point what `Quality.plain()` gives.
        metrics: files that `JsonlMetrics` wrote, for the curves.
    """
    history = read_metrics(metrics)
    plots = draw(folder / "plots", history, quality)
    path = folder / "README.md"
    write_text(path, text_of(run, quality, plots, history))
    return path


def text_of(
    run: Mapping[str, Any],
    quality: Mapping[str, Mapping[str, Any]],
    plots: Sequence[str],
    history: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card as Markdown."""
    config, group = run["train"], run["group"]
    head = [
        "---",
        "tags:",
        "- sparse-autoencoder",
        "- qwen-scope",
        f"base_model: {run['model']}",
        "---",
        "",
        f"# {group}",
        "",
    ]
    what = (
        f"Sparse autoencoders ({config['architecture']}, {config['d_sae']:,} features, k {config['k']}) on the residual"
        f" stream of `{run['model']}` after the blocks named below, each trained on {config['tokens']:,} tokens of"
        f" {run['data'] if isinstance(run['data'], str) else ', '.join(run['data'])}."
    )
    first = next(iter(quality), "layers.0.resid_post")
    use = [
        "```python",
        "from qwen_scope import load_sae",
        "",
        f'sae = load_sae("{group}", layer="{first}")   # a folder or a Hub id',
        "```",
    ]
    lines = [*head, what, "", *use, "", "## Quality", "", *table(quality), "", EXPLAINED]
    if quality:
        tokens = next(iter(quality.values()))["tokens"]
        lines += [f"Measured on {tokens:,} tokens of {run['eval_data']}.", ""]
    lines += began(run, quality, history)
    lines += ["## Which tokens count", "", *which_count(run, quality), ""]
    if plots:
        lines += ["## Curves", "", *(f"![{Path(plot).stem}](plots/{plot})" for plot in plots), ""]
    lines += ["## Configuration", "", "```json", json.dumps(run, indent=1), "```", ""]
    return "\n".join(lines)


def which_count(run: Mapping[str, Any], quality: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which tokens were left out of training and measuring, why, and how many."""
    counted = Counted.from_json(run["counted"])
    what = []
    if counted.first:
        what.append(f"the first {'token' if counted.first == 1 else f'{counted.first} tokens'} of each row")
    if counted.special:
        what.append(f"special tokens ({len(counted.special):,} ids)")
    if counted.norms:
        what.append(f"sinks, whose norm is above a threshold measured on {counted.sample}")
    if not what:
        return ["All tokens were trained and measured on, sinks and special ones too."]
    lines = [
        f"Left out of training and measuring, because such tokens would outweigh all others: {'; '.join(what)}.",
        "",
        f"Read for training, {summary(run['tokens_read'])}; besides, sinks of each layer:",
        "",
        "| layer | threshold | sinks in training | measured |",
        "| --- | --- | --- | --- |",
    ]
    for name, dropped in run["dropped"].items():
        limit = counted.norms.get(name)
        seen = summary(quality[name]["reasons"]) if name in quality else ""
        lines.append(f"| {name} | {'none' if limit is None else f'{limit:.4g}'} | {dropped:,} | {seen} |")
    return lines


def table(quality: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The figures as a Markdown table, without the columns that were not measured."""
    columns = [c for c in COLUMNS if all(c[1] in figures for figures in quality.values())]
    lines = [["layer", *(title for title, _, _ in columns)], ["---"] * (len(columns) + 1)]
    lines += [[name, *(form.format(figures[key]) for _, key, form in columns)] for name, figures in quality.items()]
    return ["| " + " | ".join(line) + " |" for line in lines]


def draw(folder: Path, history: Sequence[Mapping[str, Any]], quality: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Plots of loss, FVU, dead share and density as PNG; returns their file names."""
    # The object interface: no global state, and no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(exist_ok=True)
    drawn = []

    def plot(name: str, x_label: str, y_label: str, curves: Mapping[str, tuple[Any, Any]], log: bool) -> None:
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot()
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label, linewidth=1)
        axes.set(xlabel=x_label, ylabel=y_label, yscale="log" if log else "linear")
        axes.legend(fontsize="small")
        with write_whole(folder / f"{name}.png") as part:
            FigureCanvasAgg(figure).print_png(part)
        drawn.append(f"{name}.png")

    layers = list(history[-1]["layers"]) if history else []
    tokens = [entry["tokens"] for entry in history]
    for name, title, log in (("loss", "loss", True), ("fvu", "FVU", True), ("dead", "dead share", False)):
        if layers:
            curves = {layer: (tokens, [entry["layers"][layer][name] for entry in history]) for layer in layers}
            plot(name, "tokens", title, curves, log)
    if quality:
        curves = {layer: (DENSITY_EDGES[:-1], figures["density"]) for layer, figures in quality.items()}
        plot("density", "log10 of the share of tokens a feature fires on", "features", curves, False)
    return drawn
