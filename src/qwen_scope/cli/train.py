"""`qwen-scope train`: make SAEs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen_scope.text import CorpusOptions
from qwen_scope.train import TrainConfig, TrainRun

from . import options, output, whose
from .evaluate import Places, seeded, show_quality
from .groups import OPTIONS, Read, generated, grouped
from .workers import is_first

OPTIONS[TrainConfig] = {
    "d_sae": Annotated[int, typer.Option("--d-sae", help="Features of each SAE.")],
    "k": Annotated[int, typer.Option("--k", help="Features active per token.")],
    "tokens": Annotated[int, typer.Option("--tokens", help="Training tokens per layer.")],
    "architecture": Annotated[str, typer.Option("--architecture", help="topk, batchtopk, matryoshka or jumprelu.")],
    "batch": Annotated[int, typer.Option("--batch", help="Tokens per step.")],
    "lr": Annotated[
        float | None,
        typer.Option("--lr", help="Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2^14), more for a short run."),
    ],
    "decay": Annotated[float, typer.Option("--decay", help="Last share of the run, in which the rate falls to zero.")],
    "betas": Annotated[
        str,
        typer.Option("--betas", help="Adam's beta 1 and beta 2."),
        Read(options.numbers_tuple, ",".join(map(str, TrainConfig.betas))),
    ],
    "seed": Annotated[int, typer.Option("--seed", help="Of the start and the order.", **options.SEED)],
}
OPTIONS[TrainRun] = {
    "data": Places,
    "out": Annotated[Path, typer.Option("--out", "-o", help="The folder of the run.")],
    "train": TrainConfig,
    "model": options.Model,
    "layers": Annotated[options.StartLayers, Read(options.layers_tuple)],
    "start_from": Annotated[str | None, typer.Option("--start-from", help="SAEs to continue from.")],
    "against_scratch": Annotated[
        bool, typer.Option("--against-scratch", help="Also train SAEs from scratch on the same tokens, and compare.")
    ],
    "group": Annotated[
        str | None, typer.Option("--group", help="The name of the set of SAEs. Default: from model, width and k.")
    ],
    "corpus": CorpusOptions,
    "shuffle": Annotated[
        bool,
        typer.Option("--shuffle/--no-shuffle", help="Mix documents of all sources, or read them one after the other."),
    ],
    "counted": Annotated[options.Count, Read(options.parse_count)],
    "context_length": Annotated[int, typer.Option("--context-length", help="Tokens per row of packed text.", min=2)],
    "batch_size": Annotated[int, typer.Option("--batch-size", help="Rows per forward pass.", min=1)],
    "budget": Annotated[
        str, typer.Option("--buffer", help="Memory for shuffled residuals."), Read(options.parse_size, "1GB")
    ],
    "store": Annotated[str, typer.Option("--store", help="How residuals are held: float32 or bfloat16.")],
    "parallel": Annotated[
        str,
        typer.Option("--parallel", help="Under torchrun: data, layers or features."),
        Read(partial(options.one_of, "--parallel", known=("alone", "data", "layers", "features")), "alone"),
    ],
    "checkpoint_every": Annotated[int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")],
    "resume": Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")],
    "tensorboard": Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard scalars.")],
    "wandb": Annotated[str | None, typer.Option("--wandb", help="Also log to this W&B project.")],
    "eval_tokens": Annotated[
        int | None,
        typer.Option(
            "--eval-tokens", help="Tokens to measure on; 0 for none. Default: a tenth of --tokens, 65536 at most."
        ),
    ],
    "exports": Annotated[
        str | None,
        typer.Option("--exports", help="Further layouts: sae_lens,sparsify."),
        Read(options.names_tuple),
    ],
    "device": options.Device,
    "dtype": options.Dtype,
}


def own_options() -> dict[str, Any]:
    """The options that single architectures have, from their dataclasses."""
    from qwen_scope.train import ARCHITECTURES

    return {
        name: option
        for architecture, kind in ARCHITECTURES.items()
        for name, option in generated(kind, architecture).items()
    }


@partial(grouped, late=own_options)
def train(run: TrainRun, more: Mapping[str, Any], as_json: options.Json = False) -> None:
    """Train SAEs on a model's residuals.

    Writes the official layout with a card, metrics and plots; the next `--sae OUT/GROUP` just works.
    """
    from qwen_scope.train import architecture, run_train

    options.quiet()
    first = is_first(run.parallel, "train")
    whose.say_whose()
    kind = architecture(str(run.train.architecture), **more)
    run = replace(run, train=replace(run.train, architecture=kind))
    with output.progress() if first else nullcontext() as report:
        result = run_train(seeded(run, run.train.seed), progress=report)
    if not first:
        return
    quality = {str(name): found.plain() for name, found in result.quality.items()}
    began = {name: found.plain() for name, found in result.began.items()}
    if as_json:
        layers = sorted(map(str, result.saes))
        output.print_json({"folder": str(result.folder), "layers": layers, "quality": quality, "began": began})
        return
    show_quality(f"Trained {len(result.saes)} SAEs", quality)
    out = output.console()
    if run.eval_tokens is None and run.measured_on == run.train.tokens // 10:
        out.print("Measured on few tokens, as the run was short; --eval-tokens names more.")
    show_began(quality, began)
    out.print(f"Written to {result.folder}. Look at them:", soft_wrap=True)
    out.print(f"  qwen-scope features TEXT --model {run.model} --sae {result.folder}", soft_wrap=True)


def show_began(quality: dict[str, Any], began: dict[str, Any]) -> None:
    """SAEs that were continued, before and after, and beside those from scratch."""
    if not began:
        return
    beside = any("scratch" in one for one in began.values())
    rows = []
    for point, one in began.items():
        moved, measured = one["moved"], [one.get("before", {}), quality.get(point, {}), one.get("scratch", {})]
        fvus = [found.get("fvu") for found in measured[: 3 if beside else 2]]
        rows.append((point, *fvus, moved["median"], moved["low"], moved["below_50"]))
    fvu = ["FVU before", "FVU now", "from scratch"][: 3 if beside else 2]
    group = next(iter(began.values()))["history"][-1]["group"]
    columns = ("hook point", *fvu, "cosine of features", "5% quantile", "below 0.5")
    output.show(f"Continued from {group}", columns, rows)
