"""The part of a card about SAEs that were continued: what they began as, how far features moved, and what it gained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import SCRATCH

SMOOTH = 20  # a curve is compared by means over this share of its lines


def began(
    run: Mapping[str, Any], quality: Mapping[str, Mapping[str, Any]], lines: Sequence[Mapping[str, Any]]
) -> list[str]:
    """The sections as Markdown; none where training began anew.

    Args:
        run: what `run.json` holds.
        quality: per hook point its figures, with what it began as under `began`.
        lines: of the metrics, for the curves.
    """
    found = {name: figures["began"] for name, figures in quality.items() if "began" in figures}
    if not found:
        return []
    out = ["## What they began as", "", *ancestors(run, quality, found), ""]
    out += ["## How far features moved", "", *moves(found), ""]
    if any("before" in one for one in found.values()):
        out += ["## Before, after, and from scratch", "", *gains(run, quality, found, lines), ""]
    return out


def ancestors(
    run: Mapping[str, Any], quality: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Each step from the first SAE to this one."""
    out = [
        "Training went on from finished SAEs. A feature has the number it had there.",
        "",
        "| layer | SAE | fingerprint | model | tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        for before in one["history"]:
            tokens = "not known" if before["tokens"] is None else f"{before['tokens']:,}"
            model = before["model"] or "not known"
            out.append(f"| {name} | {before['group']} | {before['fingerprint'][:12]} | {model} | {tokens} |")
        trained = quality[name].get("trained_on")
        tokens = "" if trained is None else f"{trained:,}"
        out.append(f"| {name} | {run['group']} | this one | {run['model']} | {tokens} |")
    if others := {name: one["k"] for name, one in found.items() if one["k"] not in (None, run["train"]["k"])}:
        said = ", ".join(f"{k} at {name}" for name, k in others.items())
        out += ["", f"k was {said}, and is {run['train']['k']} here."]
    return out


def moves(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The cosines in a few numbers."""
    out = [
        "The cosine of each feature's decoder direction with the one it began with. A feature below 0.5 is another one"
        " now: labels and recipes of the old one don't hold for it. `moved/` has every feature.",
        "",
        "| layer | median | 5% quantile | least | below 0.9 | below 0.5 | moved most |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        m = one["moved"]
        most = ", ".join(f"{feature} ({cosine:.2f})" for feature, cosine in m["most"][:5])
        shares = f"{m['below_90']:.2%} | {m['below_50']:.2%}"
        out.append(f"| {name} | {m['median']:.4f} | {m['low']:.4f} | {m['least']:.4f} | {shares} | {most} |")
    return out


def gains(
    run: Mapping[str, Any],
    quality: Mapping[str, Mapping[str, Any]],
    found: Mapping[str, Mapping[str, Any]],
    lines: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Quality on the same held-out tokens of three SAEs: the one it began as, this one, and one from scratch."""
    beside = any("scratch" in one for one in found.values())
    out = [
        "On the same held-out tokens of this model:",
        "",
        "| layer | SAE | FVU | cosine | dead | CE recovered |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found.items():
        three = {"before": one.get("before"), "now": quality[name], "from scratch": one.get("scratch")}
        for what, figures in three.items():
            if figures:
                loss = f"{figures['ce_recovered']:.4f}" if "ce_recovered" in figures else ""
                shown = f"{figures['fvu']:.4f} | {figures['cosine']:.4f} | {figures['dead']:.2%} | {loss}"
                out.append(f"| {name} | {what} | {shown} |")
    if not beside:
        return [*out, "", "`--against-scratch` also trains SAEs from scratch on the same tokens, to compare with."]
    rate = f"learning rate {run['train']['lr']:.3g}, that from scratch {run['scratch']['lr']:.3g}"
    out += [
        "",
        f"From scratch: {run['train']['tokens']:,} tokens, the same batches in the same order, by the defaults for new"
        f" SAEs (peak {rate}).",
        "",
    ]
    for name in found:
        at = reached(lines, name)
        when = "did not reach it" if at is None else f"reached it after {at:,} tokens"
        out.append(
            f"- {name}: what the SAE from scratch has at the end of training (FVU of its batches), this one {when}."
        )
    return out


def reached(lines: Sequence[Mapping[str, Any]], name: str) -> int | None:
    """Tokens after which the FVU of the batches, averaged over a twentieth of the lines, is at most what the SAE from
    scratch has over the last twentieth; None where it never is."""
    both = [
        (one["tokens"], one["layers"][name]["fvu"], one["layers"][SCRATCH + name]["fvu"])
        for one in lines
        if {name, SCRATCH + name} <= set(one["layers"])
    ]
    width = max(1, len(both) // SMOOTH)
    if not both:
        return None
    goal = sum(scratch for _, _, scratch in both[-width:]) / width
    for end in range(width, len(both) + 1):
        if sum(fvu for _, fvu, _ in both[end - width : end]) / width <= goal:
            return int(both[end - 1][0])
    return None
