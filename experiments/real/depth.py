"""SAEs of several layers of a real model, early to late, by the command that users type.

    python -m experiments.real.depth --model FOLDER --data FOLDER [--layers 2,6,12,18,24,28] [--language en] [--write]

The documents of `corpus/LANGUAGE.SOURCE.jsonl` are divided by their text: those whose SHA-256 begins with a byte that
ends in 0 in decimal are held out, each text is taken once. `qwen-scope train` then trains one SAE per layer on the
others, shuffled across sources, all in one run, into `run` in the folder of finished cells; a run that was stopped goes
on, a finished one is used as it is. Thresholds for sinks, learning rate and all else are the command's own choice.

Measured on held-out documents, mixed as those to train on, by the run's own rule of which tokens count: explained
variance (`1 - FVU`, and its mean over tokens, where every token weighs the same), how much of the next-token loss is
recovered when the reconstruction takes the residual's place, and features that fire on none of the tokens. The control
for explained variance are as many principal components as an SAE has active features, fitted on the very tokens that
are measured, so it is the best that one fixed set of so many directions can do; for the loss it is zeros, which count
as nothing recovered. The learning curve is the explained variance of training batches before their step, from the run's
metrics, as the mean over the logged steps of the last twentieth before each point.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.harness import At, Experiment, Row, main
from experiments.real.quality import ROWS, STRETCH, components, errors, figures, losses
from experiments.sections import paragraph, table
from qwen_scope.errors import InputError
from qwen_scope.files import read_object, write_text
from qwen_scope.model import HookPoint, LoadedModel, capture, counted_of, load_model
from qwen_scope.sae import SAE, layers_of, load_sae
from qwen_scope.stats import share
from qwen_scope.text import Corpus, Counted, TokenRows, longest_text, tally
from qwen_scope.train.held_out import held_out_of
from qwen_scope.train.metrics import read_metrics

TITLE = "SAEs at several layers of a real model"
TRAINING, HELD_OUT = "training", "held-out"
POINTS = (0.1, 0.25, 0.5, 0.75, 1.0)  # of the run, in its learning curve
BEFORE = 0.05  # of the run, over which a point is the mean
SHUFFLE, CONTEXT, AT_ONCE = 1, 256, 16


@dataclass(frozen=True)
class Sizes:
    """Tokens per step of training and steps between checkpoints; held-out tokens, and rows of them for the loss."""

    batch: int = 1024
    every: int = 100
    held_out: int = 65_536
    rows: int = 40


def divided(at: At[Sizes]) -> Path:
    """The folder with the documents to train on and those to measure on; written once."""
    folder, data = at.folder / "documents", at.options["data"]
    name = f"{at.options['language'] or '*'}.*.jsonl"
    sources = sorted((data / "corpus").glob(name))
    if not sources:
        raise InputError(f"--data needs a folder corpus with documents; {data / 'corpus'} has no {name}")
    if (folder / "whole").is_file():
        return folder
    seen: set[bytes] = set()
    for path in sources:
        parts: dict[str, list[str]] = {TRAINING: [], HELD_OUT: []}
        for text in (json.loads(line)["text"] for line in path.read_text(encoding="utf-8").split("\n") if line):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                part = HELD_OUT if digest[0] % 10 == 0 else TRAINING
                parts[part].append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
        for part, lines in parts.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            write_text(folder / part / path.name, "".join(lines))
    write_text(folder / "whole", "")
    return folder


def recipe(at: At[Sizes], documents: str, out: str, model: str) -> list[str]:
    """The words of the command after `qwen-scope`."""
    options, layers = at.options, ",".join(map(str, at.levels["layer"]))
    words = ["train", documents, "--out", out, "--model", model, "--dtype", "bfloat16", "--layers", layers]
    words += ["--d-sae", options["d-sae"], "--k", options["k"], "--tokens", options["tokens"]]
    words += ["--batch", at.sizes.batch, "--checkpoint-every", at.sizes.every, "--eval-tokens", 0, "--resume"]
    return [str(word) for word in words]


def trained(at: At[Sizes]) -> dict[int, SAE]:
    """The SAEs by layer, from a run that is finished first.

    Raises:
        InputError: the run failed, or the folder holds one of other settings or documents.
    """
    documents, out = divided(at) / TRAINING, at.folder / "run"
    if not saved(at, out):
        words = recipe(at, str(documents), str(out), str(at.options["model"]))
        done = subprocess.run([sys.executable, "-m", "qwen_scope.cli", *words], check=False, stdout=sys.stderr)
        if done.returncode:
            raise InputError("qwen-scope train failed, as it says above")
    if not (folder := saved(at, out)):
        raise InputError(f"{out} holds a run of other layers; name another folder with --keep")
    found = {layer: load_sae(folder, layer) for layer in at.levels["layer"]}
    record = held_out_of(found.values())
    if record is None or not record.is_of(Corpus(str(documents))):
        raise InputError(f"the SAEs in {folder} were trained on other documents than those in {documents}")
    return found


def saved(at: At[Sizes], out: Path) -> Path | None:
    """The folder with the SAEs of the run's layers, which are saved when it ends; None before.

    Raises:
        InputError: it is a run of other settings.
    """
    if not (out / "run.json").is_file():
        return None
    run = read_object(out / "run.json")
    wanted = {name.replace("-", "_"): at.options[name] for name in ("d-sae", "k", "tokens")}
    wanted |= {"batch": at.sizes.batch, "model": at.options["model"].name, "layers": list(at.levels["layer"])}
    has = {**run["train"], "model": Path(run["model"]).name, "layers": run["layers"]}
    other = [f"{name} {has[name]}, now {value}" for name, value in wanted.items() if has[name] != value]
    if other:
        raise InputError(f"{out} holds a run of other settings ({'; '.join(other)}); name another folder with --keep")
    folder = out / run["group"]
    done = folder.is_dir() and set(layers_of(folder)) >= set(at.levels["layer"])
    return folder if done else None


@torch.inference_mode()
def held_out(at: At[Sizes]) -> dict[int, dict[str, Any]]:
    """By layer, from one pass of the model: the held-out residuals that count, how many tokens did not and why, and
    the longest residual beside the median one; kept for the cells of the other layers."""
    path = at.folder / "held-out.pt"
    if not path.is_file():
        loaded, counted = opened(at), counted_by(at)
        points = [HookPoint(layer) for layer in at.levels["layer"]]
        parts: dict[int, list[Tensor]] = {point.layer: [] for point in points}
        norms: dict[int, list[Tensor]] = {point.layer: [] for point in points}
        left_out: dict[int, dict[str, int]] = {point.layer: {} for point in points}
        for ids in tokens(at, loaded).take(at.sizes.held_out):
            for point, h in capture(loaded.model, ids, points).items():
                reasons = counted.reasons(ids, sinks=counted.sinks(h, point))
                parts[point.layer].append(h[reasons == 0].to(torch.bfloat16))
                norms[point.layer].append(torch.linalg.vector_norm(h, dim=-1, dtype=torch.float32).flatten())
                for reason, n in tally(reasons).items():
                    left_out[point.layer][reason] = left_out[point.layer].get(reason, 0) + n
        found = {
            layer: {
                "residuals": torch.cat(parts[layer]),
                "left_out": left_out[layer],
                "longest": float(torch.cat(norms[layer]).max()),
                "median": float(torch.cat(norms[layer]).median()),
            }
            for layer in parts
        }
        torch.save(found, path)
    return torch.load(path, mmap=True)


def opened(at: At[Sizes]) -> LoadedModel:
    return load_model(str(at.options["model"]), device="cpu", dtype="bfloat16")


def tokens(at: At[Sizes], loaded: LoadedModel) -> TokenRows:
    """The held-out documents in rows."""
    corpus = Corpus(str(divided(at) / HELD_OUT), shuffle=SHUFFLE, longest=longest_text(CONTEXT), quiet=True)
    return TokenRows(corpus, loaded.tokenizer, context_length=CONTEXT, batch_size=AT_ONCE)


def counted_by(at: At[Sizes]) -> Counted:
    """Which tokens counted in training."""
    found = counted_of(trained(at).values())
    assert found is not None
    return found


def run(at: At[Sizes], layer: int) -> Mapping[str, Any]:
    """One layer: its SAE measured on held-out documents."""
    torch.set_num_threads(1)
    sae, counted, point = trained(at)[layer], counted_by(at), HookPoint(layer)
    found = held_out(at)[layer]
    x = found.pop("residuals")
    loaded = opened(at)
    rows = tokens(at, loaded).take(at.sizes.rows * CONTEXT)
    clean = at.kept("clean", lambda: losses(loaded.model, rows, counted, point))
    spliced = losses(loaded.model, rows, counted, point, lambda h: sae.decode(sae.encode(h)))
    zero = losses(loaded.model, rows, counted, point, torch.zeros_like)
    return {
        **errors(sae, x),
        "losses": list(zip(clean, spliced, zero, strict=True)),
        "components": errors(components(x, at.options["k"]), x)["sums"],
        "counts": len(x),
        **found,
        "threshold": counted.norms[str(point)],
        "fingerprint": sae.identity.fingerprint,
        "curve": curve(at, str(point)),
    }


def curve(at: At[Sizes], name: str) -> list[float]:
    """The explained variance of training batches at `POINTS` of the run."""
    lines = read_metrics([at.folder / "run" / "metrics.jsonl"])
    spent = np.array([line["tokens"] for line in lines]) / lines[-1]["tokens"]
    explained = np.array([1 - line["layers"][name]["fvu"] for line in lines])
    found = []
    for point in POINTS:
        until = spent <= max(point, spent[0])
        some = explained[until & (spent > point - BEFORE)]
        found.append(float(some.mean()) if len(some) else float(explained[until][-1]))  # few steps are logged
    return found


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    options, k = at.options, at.options["k"]
    cells, curves, sinks = [], [], []
    for row in rows:
        found = figures(row)
        of_components = figures({**row, "sums": row["components"]})["ev"]
        dead = share(row["never"], options["d-sae"])
        cells.append([row["layer"], *(f"{found[name]:.3f}" for name in ("ev", "per_token")), f"{of_components:.3f}"])
        cells[-1] += [f"{found['recovered']:.3f}", f"{dead:.2%}"]
        cells[-1] += [f"{row['l0']:.1f}"]
        curves.append([row["layer"], *(f"{value:.3f}" for value in row["curve"])])
        limit = "none" if row["threshold"] is None else f"{row['threshold']:.4g}"
        seen = sum(row["left_out"].values())
        sinks.append([row["layer"], f"{row['median']:.4g}", f"{row['longest'] / row['median']:.3g}", limit])
        sinks[-1] += [f"{row['left_out'].get('sink', 0):,} of {seen:,}", f"{row['left_out'].get('first', 0):,}"]
        sinks[-1] += [row["fingerprint"][:16]]
    words = recipe(at, f"documents/{TRAINING}", "run", options["model"].name)
    levels = ",".join(map(str, at.levels["layer"]))
    command = f"python -m experiments.real.depth --model FOLDER --data FOLDER --layers {levels}"
    command += f" --language {options['language']}" if options["language"] else ""
    command += f" --tokens {options['tokens']}"
    how = f"""`{command} --write`: {options["model"].name}, {options["d-sae"]:,} features, k {k}, {options["tokens"]:,}
        tokens of {"all languages" if not options["language"] else options["language"]} of the corpus, seed 0, one run
        for all layers. Measured on {sum(rows[0]["left_out"].values()):,} tokens of held-out documents (by a hash of
        their text), with 95% intervals over stretches of {STRETCH:,} tokens; loss recovered on {at.sizes.rows} rows of
        {CONTEXT} tokens, over draws of {ROWS} rows; features that never fired with an interval of a share, which is
        higher than on more tokens. "Components" is the control: the {k} principal components of the very tokens that
        are measured. The model runs in bfloat16."""
    columns = ("layer", "explained", "per token", "components", "loss recovered", "never fired", "L0")
    spent = [f"{point:.0%}" for point in POINTS]
    norm = ("layer", "median norm", "longest, in medians", "threshold", "sinks left out", "first tokens", "fingerprint")
    return "\n\n".join(
        [
            paragraph(verdict(rows)),
            paragraph(how),
            table(columns, cells),
            f"Explained variance of training batches after a share of the {options['tokens']:,} tokens:",
            table(("layer", *spent), curves),
            "Norms on the held-out tokens, which of these are left out as sinks, and the SAEs that the recipe makes:",
            table(norm, sinks),
            f"The recipe, whose weights are not kept here:\n\n```text\nqwen-scope {shlex.join(words)}\n```",
        ]
    )


def verdict(rows: list[Row]) -> str:
    """Where the SAEs are better than the control, and where they are worst."""
    pairs = [(row["layer"], figures(row), figures({**row, "sums": row["components"]})["ev"]) for row in rows]
    behind = [str(layer) for layer, found, plain in pairs if found["ev"].low <= plain.high]
    apart = [str(layer) for layer, found, _ in pairs if abs(found["ev"].estimate - found["per_token"].estimate) > 0.05]
    low = min(pairs, key=lambda pair: pair[1]["per_token"].estimate)
    lost = min(pairs, key=lambda pair: pair[1]["recovered"].estimate)
    first = (
        f"At layers {', '.join(behind)} the SAE explains no more than the control within the intervals."
        if behind
        else "At every layer the SAE explains more than as many principal components, beyond the intervals."
    )
    unequal = (
        f"""At layers {", ".join(apart)} the two figures of explained variance differ by more than 0.05: few tokens of
        large norm carry the total there, and the mean per token is the one to compare."""
        if apart
        else "The two figures of explained variance differ by at most 0.05 everywhere."
    )
    return f"""{first} {unequal} Least is explained at layer {low[0]} (per token {low[1]["per_token"].estimate:.3f}),
        and least loss recovered at layer {lost[0]} ({lost[1]["recovered"].estimate:.3f})."""


experiment = Experiment(
    title=TITLE,
    varies={"layer": (2, 6, 12, 18, 24, 28)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"layer": (1, 2)},
    quick_sizes=Sizes(batch=256, every=50, held_out=8192, rows=8),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "data": {"type": Path, "required": True, "help": "a folder that holds corpus/LANGUAGE.SOURCE.jsonl"},
        "language": {"help": "the documents of one language; default: of all"},
        "d-sae": {"type": int, "default": 4096, "help": "features of an SAE"},
        "k": {"type": int, "default": 32, "help": "active features per token"},
        "tokens": {"type": int, "default": 614_400, "help": "training tokens per layer"},
    },
    variant=lambda at: at.options["model"].name,
)

if __name__ == "__main__":
    main(experiment)
