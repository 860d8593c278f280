"""SAEs of a real model by our trainer and by its peers, on the same residuals.

    python -m experiments.real.saes --model FOLDER --data FOLDER [--layer 12] [--budgets 1024000,10240000] [--write]

Beside our SAE of the released kind, with `k` features at every token, stands one of ours by BatchTopK, with `k` of them
on average; what was wanted is asked of both, and peers are compared with the first, which is their kind, too.

Residuals of one layer are read once (`experiments.real.residuals`; `--residuals` names a folder of them), without first
and special tokens and sinks. On as many of them, in the same order, every batch from all over them, each of qwen-scope,
sae_lens, sparsify and dictionary_learning trains an SAE of the same width and k, the peers in their own environments
(`tests/peers/run.sh`), with our warm-up, decay, rates of Adam, AuxK weight and dead window as far as they have them
(`experiments.lab.trainers` compares those with their own defaults, which are behind; of the peers sae_lens alone lets
Adam's rates be chosen).

Learning rates are tuned for each trainer: runs of `tune` tokens at `RATES`, and outwards by factors of three while the
best is at an edge; the lowest FVU on the `judge` training tokens after those wins. Runs of more than 1,200 steps take
that rate times `sqrt(1200 / steps)`, whoever the trainer is. Beyond three million tokens ours are trained alone.

Measured on held-out documents, of which no text is among the training documents: explained variance (`1 - FVU`, and its
mean over tokens), how much of the next-token loss is recovered when the reconstruction takes the residual's place, and
features that fire on none of the held-out tokens. Beside the SAEs stands a projection on as many principal components
as an SAE has active features.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from experiments.harness import ROOT, At, Experiment, Row, main
from experiments.lab.trainers import PEERS, QUIET
from experiments.real.quality import ROWS, STRETCH, ahead, bounds, components, errors, figures, fvu, measured
from experiments.real.residuals import HELD_OUT, PASSES, TRAINING, Residuals, distinct
from experiments.sections import paragraph, table
from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint
from qwen_scope.sae import SAE, Identity, JumpReLU, TopK, fingerprint, save_sae
from qwen_scope.stats import share

OURS, BATCHES, COMPONENTS = "qwen-scope", "qwen-scope-batchtopk", "components"
OWN = (OURS, BATCHES)
TRAINERS = (*OWN, *PEERS)
RATES, STEP = (1.3e-3, 4e-3, 1.2e-2), 3.0
WANTED, WANTED_FROM = {"ev": 0.87, "recovered": 0.98, "dead": 0.05}, 10_000_000
TITLE = "SAEs of a real model by four trainers"


@dataclass(frozen=True)
class Sizes:
    """Tokens per step, of a run that tunes, that judge it, held out; rows for the loss; passes of the model in a piece
    of residuals."""

    batch: int = 1024
    tune: int = 262_144
    judge: int = 65_536
    held_out: int = 1_000_000
    rows: int = 128
    passes: int = PASSES


def residuals(at: At[Sizes], tokens: int, held_out: int) -> Residuals:
    """So many residuals for training and for measuring, read where they are missing."""
    folder, data = at.options["residuals"] or at.folder / "residuals", at.options["data"]
    sizes = {TRAINING: tokens, HELD_OUT: held_out}
    documents = distinct(data, "en", folder / "documents")
    layers = (at.options["layer"],)
    found = Residuals(folder, str(at.options["model"]), str(documents), layers, sizes, at.sizes.passes)
    found.record()
    return found


def trained(at: At[Sizes], kept: Residuals, trainer: str, tokens: int, rate: float) -> dict[str, Any]:
    """One SAE by one trainer in its own environment; where its weights are, and how long it took."""
    layer = at.options["layer"]
    folder = at.folder.resolve() / "saes" / f"{trainer}-{tokens}-{rate:.2e}"
    weights = folder / "weights.safetensors"
    if weights.is_file():
        return {"weights": str(weights), "seconds": float((folder / "seconds").read_text())}
    python = sys.executable if trainer in OWN else str(ROOT / f".venv-{trainer}/bin/python")
    if not Path(python).exists():
        raise InputError(f"there is no {python}; run tests/peers/run.sh {trainer}, or leave it out of --trainers")
    folder.mkdir(parents=True, exist_ok=True)
    worker = ROOT / "experiments" / "lab" / "trainers_worker.py"
    width = kept.of(TRAINING, layer, 1).shape[1]
    command = [python, str(worker), trainer, str(folder), "--setting", "ours", "--lr", str(rate)]
    command += ["--residuals", str(kept.path(TRAINING, layer).resolve()), "--d-model", str(width)]
    command += ["--tokens", str(tokens), "--batch", str(at.sizes.batch)]
    command += ["--d-sae", str(at.options["features"]), "--k", str(at.options["k"])]
    began = time.monotonic()
    environment = {**os.environ, **QUIET, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise InputError(f"{trainer} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    seconds = time.monotonic() - began
    (folder / "seconds").write_text(f"{seconds:.1f}")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return {"weights": str(weights), "seconds": seconds}


def sae_of(at: At[Sizes], weights: str) -> SAE:
    w = load_file(weights)
    layer, shape = at.options["layer"], f"W{at.options['features']}-L0_{at.options['k']}"
    identity = Identity(f"SAE-Res-{at.options['model'].name}-{shape}", layer, fingerprint(**w))
    if "threshold" in w:
        return JumpReLU(**w, hook_point=str(HookPoint(layer)), identity=identity)
    return TopK(**w, k=at.options["k"], hook_point=str(HookPoint(layer)), identity=identity)


def tuned(at: At[Sizes], kept: Residuals, trainer: str) -> dict[str, float]:
    """FVU by learning rate, of rates around the best one."""
    sizes, tried = at.sizes, {}
    layer = at.options["layer"]
    held = kept.of(TRAINING, layer, sizes.tune + sizes.judge)[sizes.tune :]

    def measure(rate: float) -> None:
        def make() -> float:
            made = trained(at, kept, trainer, sizes.tune, rate)
            return fvu(errors(sae_of(at, made["weights"]), held))

        tried[rate] = at.kept(f"rate-{trainer}-{rate:.2e}", make)

    for rate in RATES:
        measure(rate)
    while (best := min(tried, key=tried.__getitem__)) in (low := min(tried), high := max(tried)):
        if len(tried) >= len(RATES) + 2:
            break
        measure(low / STEP if best == low else high * STEP)
    return {f"{rate:.2e}": found for rate, found in sorted(tried.items())}


def run(at: At[Sizes], trainer: str, budget: int) -> Mapping[str, Any]:
    """One trainer at one number of tokens: its rate tuned, the SAE trained and measured."""
    torch.set_num_threads(1)
    sizes = at.sizes
    some = residuals(at, sizes.tune + sizes.judge, 0)
    rates = at.kept(f"rates-{trainer}", lambda: tuned(at, some, trainer))
    rate = min(1.0, math.sqrt(1200 * sizes.batch / budget)) * float(min(rates, key=rates.__getitem__))
    made = trained(at, residuals(at, budget, 0), trainer, budget, rate)
    kept = residuals(at, budget, sizes.held_out)
    sae = sae_of(at, made["weights"])
    if trainer == OURS and not (folder := at.folder / f"official-{budget}").exists():
        save_sae(sae, folder, dtype=torch.bfloat16)
    about = {"rates": rates, "rate": rate, "seconds": made["seconds"], "fingerprint": sae.identity.fingerprint}
    return {**about, **held_out(at, kept, sae)}


def held_out(at: At[Sizes], kept: Residuals, sae: SAE) -> dict[str, Any]:
    """`measured`, the losses that are the same for every SAE once."""
    layer, rows = at.options["layer"], at.sizes.rows
    return measured(kept, layer, sae, rows, at.kept("bounds", lambda: bounds(kept, layer, rows)))


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    sizes = at.sizes
    budgets = sorted({row["budget"] for row in rows})
    most = max((row["budget"] for row in rows if row["trainer"] in OWN), default=budgets[-1])
    kept = residuals(at, max(*budgets, sizes.tune + sizes.judge), sizes.held_out)
    x = kept.of(TRAINING, at.options["layer"], sizes.tune)
    plain = at.kept(COMPONENTS, lambda: held_out(at, kept, components(x, at.options["k"])))
    command = f"python -m experiments.real.saes --model FOLDER --data FOLDER --budgets {','.join(map(str, budgets))}"
    if set(at.levels["trainer"]) != set(TRAINERS):
        command += f" --trainers {','.join(at.levels['trainer'])}"
    if at.options["apart"]:
        command += f" --apart '{at.options['apart']}'"
    how = f"""`{command} --write`: {at.options["model"].name}, layer {at.options["layer"]}, {at.options["features"]:,}
        features, k {at.options["k"]}, batch {sizes.batch:,}, seed 0 of every trainer, on the same residuals in the same
        order, every batch from all over them, without first and special tokens and sinks. Rates tuned on
        {sizes.tune:,} tokens. Measured on
        {sizes.held_out:,} tokens of held-out documents: explained variance, its mean per token, and features that never
        fired, with 95% intervals over stretches of {STRETCH:,} tokens, for features that of a share; loss recovered on
        {sizes.rows} held-out rows of 256 tokens, over draws of {ROWS} rows. "Components" projects on
        {at.options["k"]} principal components. The machine ran other work, so seconds are only indicative."""
    cells = []
    for row in sorted(rows, key=lambda row: (row["budget"], TRAINERS.index(row["trainer"]))):
        found, dead = figures(row), share(row["never"], at.options["features"])
        three = [f"{found[name]:.4f}" for name in ("ev", "per_token", "recovered")]
        cells.append([f"{row['budget']:,}", row["trainer"], f"{row['rate']:.2g}", *three, f"{dead:.2%}"])
        cells[-1] += [f"{row['l0']:.1f}", f"{row['seconds']:.0f}"]
    found = figures(plain)
    three = [f"{found[name]:.4f}" for name in ("ev", "per_token", "recovered")]
    cells.append(["", COMPONENTS, "", *three, "", "", ""])
    columns = ("tokens", "trainer", "rate", "explained", "per token", "loss recovered", "never fired", "L0", "seconds")
    gaps = [
        [f"{row['budget']:,}", row["trainer"], *(f"{one:+.4f}" for one in ahead(mine, row).values())]
        for mine, row in sorted(against_ours(rows), key=lambda pair: pair[0]["budget"])
    ]
    rates = [
        [row["trainer"], ", ".join(f"{float(rate):.2g}: {value:.4f}" for rate, value in row["rates"].items())]
        for row in {row["trainer"]: row for row in rows}.values()
    ]
    hashes = "; ".join(
        f"{row['trainer']}, {row['budget']:,} tokens {row['fingerprint'][:16]}" for row in rows if row["trainer"] in OWN
    )
    weights = f"Fingerprints of our SAEs, which are not kept here but made again by the command: {hashes}."
    parts = [paragraph(verdict(at, rows, most)), paragraph(how), table(columns, cells)]
    mine = [row for row in rows if row["trainer"] in OWN and row["budget"] == most]
    parts += where_it_misses(at, kept, mine) if mine else []
    if gaps:
        parts += [f"{OURS} less each of the others, at equal tokens and on the same text:"]
        parts += [table(("tokens", "less", "explained", "loss recovered"), gaps)]
    return "\n\n".join([*parts, "FVU by learning rate of the short runs:", table(("trainer", "rates"), rates), weights])


def against_ours(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Ours and each other SAE, at equal tokens."""
    mine = {row["budget"]: row for row in rows if row["trainer"] == OURS}
    return [(mine[row["budget"]], row) for row in rows if row["trainer"] != OURS and row["budget"] in mine]


def where_it_misses(at: At[Sizes], kept: Residuals, rows: list[Row]) -> list[str]:
    """What SAEs explain of held-out text by quarters, of their own last training tokens, and of others like those."""
    n, cells = at.sizes.judge, []
    for row in rows:
        gap, spread = np.array(row["sums"]).T[:2]
        count = min(4, len(gap))
        parts = zip(np.array_split(gap, count), np.array_split(spread, count), strict=True)
        quarters = ", ".join(f"{1 - a.sum() / b.sum():.3f}" for a, b in parts)
        own = [f"{one:.3f}" for one in of_its_own(at, kept, row)] or ["", ""]
        cells.append([row["trainer"], f"{row['budget']:,}", quarters, *own])
    how = f"""Explained of the held-out text by quarters, of the last {n:,} tokens that an SAE was trained on, and of as
        many after them, mixed like them and never seen. What lies between the last two columns is what it learnt of its
        own tokens alone; what then remains to the held-out figure is which documents were held out."""
    columns = ("trainer", "tokens", "held-out quarters", "own tokens", "later tokens")
    return [paragraph(how), table(columns, cells)]


def of_its_own(at: At[Sizes], kept: Residuals, row: Row) -> list[float]:
    """Explained of the last tokens it was trained on and of those after them; nothing where those were not read."""
    budget, n = row["budget"], at.sizes.judge
    if kept.have(TRAINING) < budget + n:
        return []

    def both() -> list[float]:
        sae = sae_of(at, trained(at, kept, row["trainer"], budget, row["rate"])["weights"])
        x = kept.of(TRAINING, at.options["layer"], budget + n)
        return [1 - fvu(errors(sae, part)) for part in (x[budget - n : budget], x[budget:])]

    return at.kept(f"own-{row['trainer']}-{budget}", both)


def verdict(at: At[Sizes], rows: list[Row], most: int) -> str:
    """Whether what was wanted holds, first."""
    long = [row for row in rows if row["budget"] == most and row["trainer"] in OWN]
    if not long:
        return "Our trainer was left out, so this compares its peers alone."
    said = [reached(row, at.options["features"], at.options["k"]) for row in long] if most >= WANTED_FROM else []
    pairs = [(mine, row) for mine, row in against_ours(rows) if row["trainer"] in PEERS]
    if pairs:
        behind = [
            f"{row['trainer']} at {row['budget']:,} tokens" for mine, row in pairs if ahead(mine, row)["ev"].high < 0
        ]
        against = f"ours is behind {', '.join(behind)}" if behind else "no peer explains more at equal tokens"
        said.append(f"By the interval of the difference, {against}.")
    if missing := [peer for peer in PEERS if peer not in {row["trainer"] for row in rows}]:
        said.append(f"Here without {' and '.join(missing)}.")
    return " ".join(said)


def reached(mine: Row, features: int, k: int) -> str:
    """Whether our longest run is as good as was wanted."""
    found = {**figures(mine), "dead": share(mine["never"], features)}
    misses = [
        f"{label} {found[name]:.3f} instead of {'at most' if name == 'dead' else 'at least'} {WANTED[name]}"
        for name, label in (("ev", "explained variance"), ("recovered", "loss recovered"), ("dead", "dead"))
        if (found[name].estimate - WANTED[name]) * (-1 if name == "dead" else 1) < 0
    ]
    which = f"{mine['trainer']} from {mine['budget']:,} training tokens"
    active = f"{k} features at every token" if mine["trainer"] == OURS else f"{mine['l0']:.1f} features a token"
    if misses:
        return f"What was wanted is missed with {active} ({which}): {'; '.join(misses)}."
    return f"""What was wanted is reached with {active} ({which}): explained variance {found["ev"]:.3f} of at least
        {WANTED["ev"]}, loss recovered {found["recovered"]:.3f} of at least {WANTED["recovered"]}, dead
        {found["dead"]:.2%} of at most {WANTED["dead"]:.0%}."""


experiment = Experiment(
    title=TITLE,
    varies={"trainer": TRAINERS, "budget": (1_024_000, 10_240_000)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    takes=lambda trainer, budget: budget <= 3_072_000 or trainer in OWN,
    quick={"trainer": (OURS,), "budget": (16_384,)},
    quick_sizes=Sizes(batch=256, tune=4096, judge=2048, held_out=8192, rows=8, passes=2),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "data": {"type": Path, "required": True, "help": "a folder that holds corpus/en.SOURCE.jsonl"},
        "layer": {"type": int, "default": 12, "help": "counted from 0"},
        "features": {"type": int, "default": 4096, "help": "of an SAE"},
        "k": {"type": int, "default": 32, "help": "active features per token"},
        "residuals": {"type": Path, "help": "a folder of residuals; default: in the folder of finished cells"},
        "apart": {"metavar": "NAME", "help": "a section of its own, such as of other trainers"},
    },
    variant=lambda at: at.options["apart"] or "",
)

if __name__ == "__main__":
    main(experiment)
