"""A sweep as a figure."""

from __future__ import annotations

import os

from qwen_scope.errors import InputError
from qwen_scope.files import write_whole

from .sweep import Sweep


def plot_sweep(found: Sweep, path: str | os.PathLike[str]) -> None:
    """Effect with its interval over the amount, perplexity beside it, the proposal marked; written as PNG.

    Raises:
        InputError: the ending is not `.png`.
    """
    if not os.fspath(path).endswith(".png"):
        raise InputError(f"a figure is written as .png, not {os.fspath(path)!r}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    doses = sorted(found.doses, key=lambda dose: dose.amount)
    x = [dose.amount for dose in doses]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    left.fill_between(x, [d.effect.low for d in doses], [d.effect.high for d in doses], alpha=0.25, color="tab:blue")
    left.plot(x, [d.effect.estimate for d in doses], "o-", color="tab:blue")
    left.set_xlabel("amount")
    left.set_ylabel("effect on the target", color="tab:blue")
    right = left.twinx()
    right.plot(x, [d.perplexity for d in doses], "s--", color="tab:orange")
    right.axhline(found.reference * found.budget.perplexity_ratio, color="tab:orange", linewidth=0.8)
    right.set_yscale("log")
    right.set_ylabel("perplexity, and what the budget allows", color="tab:orange")
    if found.proposed is not None:
        left.axvline(found.proposed, color="tab:green", linewidth=0.8)
        left.set_title(f"proposed amount: {found.proposed:.3g}")
    with write_whole(path) as part:
        figure.savefig(part, dpi=120, format="png")
