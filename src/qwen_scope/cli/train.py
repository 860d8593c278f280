"""`qwen-scope train` and `qwen-scope eval`: make SAEs, and measure them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options, output, whose

if TYPE_CHECKING:
    from qwen_scope.train import EvalResult, StepReport, TrainRun

Data = Annotated[
    str,
    typer.Argument(help="Text: .txt, .jsonl, .parquet, a folder of them, a Hugging Face dataset, or 'lab'."),
]
Field = Annotated[str, typer.Option("--field", help="The column of text or messages.")]
Split = Annotated[str, typer.Option("--split", help="Of a Hugging Face dataset.")]
Subset = Annotated[str | None, typer.Option("--subset", help="Of a Hugging Face dataset.")]
ChatData = Annotated[bool, typer.Option("--chat", help="Render conversations with the chat template.")]
Row = Annotated[int, typer.Option("--row", help="Tokens per row of packed text.", min=2)]
Rows = Annotated[int, typer.Option("--rows", help="Rows per forward pass.", min=1)]


def train(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run.")],
    d_sae: Annotated[int, typer.Option("--d-sae", help="Features of each SAE.")],
    k: Annotated[int, typer.Option("--k", help="Features active per token.")],
    tokens: Annotated[int, typer.Option("--tokens", help="Training tokens per layer.")],
    model: options.Model = "lab",
    layers: options.Layers = None,
    architecture: Annotated[
        str, typer.Option("--architecture", help="topk, batchtopk, matryoshka or jumprelu.")
    ] = "topk",
    batch: Annotated[int, typer.Option("--batch", help="Tokens per step.")] = 4096,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Peak learning rate. Default: 2e-4 / sqrt(d_sae / 2^14).")
    ] = None,
    start_from: Annotated[str | None, typer.Option("--start-from", help="SAEs to continue from.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the start and the order.", **options.SEED)] = 0,
    group: Annotated[
        str | None, typer.Option("--group", help="The name of the set of SAEs. Default: from model, width and k.")
    ] = None,
    field: Field = "text",
    split: Split = "train",
    subset: Subset = None,
    chat: ChatData = False,
    skip_special: options.SkipSpecial = False,
    sinks: Annotated[
        float, typer.Option("--sink-multiple", help="Leave out norms above so many medians; 0 leaves none out.")
    ] = 10.0,
    row: Row = 256,
    rows: Rows = 16,
    budget: Annotated[str, typer.Option("--buffer", help="Memory for shuffled residuals.")] = "1GB",
    store: Annotated[str, typer.Option("--store", help="How residuals are held: float32 or bfloat16.")] = "float32",
    spread: Annotated[str, typer.Option("--spread", help="Under torchrun: data, layers or features.")] = "alone",
    checkpoint_every: Annotated[int, typer.Option("--checkpoint-every", help="Steps between checkpoints.")] = 1000,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard scalars.")] = False,
    wandb: Annotated[str | None, typer.Option("--wandb", help="Also log to this W&B project.")] = None,
    eval_tokens: Annotated[int, typer.Option("--eval-tokens", help="Tokens to measure on; 0 for none.")] = 65536,
    exports: Annotated[str | None, typer.Option("--exports", help="Further layouts: sae_lens,sparsify.")] = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Train SAEs on a model's residuals.

    Writes the official layout with a card, metrics and plots; the next `--sae OUT/GROUP` just works.
    """
    from qwen_scope.train import TrainConfig, TrainRun

    options.quiet()
    config = TrainConfig(
        d_sae=d_sae, k=k, tokens=tokens, architecture=architecture, batch=batch, lr=lr, sink_multiple=sinks or None,
        seed=seed,
    )  # fmt: skip
    wanted = options.parse_layers(layers)
    run = TrainRun(
        model=model, data=data, out=out, train=config, layers=None if wanted is None else tuple(wanted), group=group,
        start_from=start_from, field=field, split=split, subset=subset, chat=chat, skip_special=skip_special, row=row,
        rows=rows, budget=options.parse_size(budget), store=store, dtype=dtype, device=device,
        spread=options.one_of("--spread", spread, ("alone", "data", "layers", "features")),
        checkpoint_every=checkpoint_every, resume=resume, tensorboard=tensorboard, wandb=wandb,
        eval_tokens=eval_tokens, exports=tuple(exports.split(",")) if exports else (),
    )  # fmt: skip
    carry_out(run, model, as_json)


def carry_out(run: TrainRun, model: str, as_json: bool) -> None:
    """Run the training with a progress bar and print what came out."""
    from qwen_scope.train import run_train

    whose.say_whose()
    with output.progress() as report:
        result = run_train(
            run,
            lambda step: report("training", step.step / step.steps, status_line(step)),
            lambda stage, share: report(stage, share, ""),
        )
    quality = {str(name): found.plain() for name, found in result.quality.items()}
    if as_json:
        output.print_json({"folder": str(result.folder), "layers": sorted(map(str, result.saes)), "quality": quality})
        return
    show_quality(f"Trained {len(result.saes)} SAEs", quality)
    out = output.console()
    out.print(f"Written to {result.folder}. Look at them:", soft_wrap=True)
    out.print(f"  qwen-scope features TEXT --model {model} --sae {result.folder}", soft_wrap=True)


def status_line(step: StepReport) -> str:
    """Loss, FVU, L0 and dead share, averaged over layers, and the speed."""
    layers = list(step.layers.values())

    def mean(name: str) -> float:
        return sum(float(getattr(layer, name)) for layer in layers) / len(layers)

    speed = step.tokens / max(step.seconds, 1e-9)
    figures = f"loss {mean('loss'):.3f}  FVU {mean('fvu'):.3f}  L0 {mean('l0'):.0f}  dead {mean('dead'):.1%}"
    return f"{figures}  {speed:,.0f} tokens/s"


def evaluate(
    data: Data,
    model: options.Model = "lab",
    sae: options.Sae = None,
    post: Annotated[
        str | None, typer.Option("--post", help="Another checkpoint: may these SAEs be used on it, too?")
    ] = None,
    layers: options.Layers = None,
    tokens: Annotated[int, typer.Option("--tokens", help="About how many to measure on.", min=2)] = 65536,
    field: Field = "text",
    split: Split = "train",
    subset: Subset = None,
    chat: ChatData = False,
    row: Row = 256,
    rows: Rows = 16,
    skip_special: options.SkipSpecial = False,
    sinks: options.Sinks = None,
    loss: Annotated[bool, typer.Option("--loss/--no-loss", help="Measure what the predictions lose, too.")] = True,
    seed: Annotated[int, typer.Option("--seed", help="Of the resampling of the transfer report.", **options.SEED)] = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure SAEs: reconstruction, sparsity, and the loss of the model.

    With --post also the transfer report: the same SAEs on another checkpoint, with 95% intervals.
    """
    from qwen_scope.train import EvalRun, run_eval

    options.quiet()
    whose.refuse_other_saes(sae)
    wanted = options.parse_layers(layers)
    run = EvalRun(
        model=model,
        sae=options.sae_source(model, sae),
        data=data,
        post=post,
        layers=None if wanted is None else tuple(wanted),
        tokens=tokens,
        field=field,
        split=split,
        subset=subset,
        chat=chat,
        row=row,
        rows=rows,
        loss=loss,
        skip_special=skip_special,
        sink_multiple=sinks,
        dtype=dtype,
        device=device,
        seed=seed,
    )
    whose.say_whose()
    with output.progress() as report:
        result = run_eval(run, lambda done, share: report(done, share, ""))
    if as_json:
        output.print_json(plain(result))
        return
    data_ = plain(result)
    show_quality(f"{run.sae} on {model}", data_["quality"])
    if data_["transfer"]:
        show_transfer(f"The same SAEs on {post}, with 95% intervals", data_["transfer"])


def plain(result: EvalResult) -> dict[str, Any]:
    return {
        "quality": {str(point): found.plain() for point, found in result.quality.items()},
        "transfer": {str(point): found.plain() for point, found in result.transfer.items()},
    }


def show_quality(title: str, quality: dict[str, Any]) -> None:
    """The figures people ask for first; the rest is in the JSON."""
    if not quality:
        return
    names = ("fvu", "fvu_without_first", "explained_variance_per_token", "cosine", "l0", "dead", "ce_recovered", "kl")
    heads = ("hook point", "FVU", "w/o first", "EV/token", "cosine", "L0", "dead", "CE rec.", "KL")
    rows = [(point, *(figures.get(name) for name in names)) for point, figures in quality.items()]
    output.show(title, heads, rows)


def show_transfer(title: str, transfer: dict[str, Any]) -> None:
    names = ("fvu_base", "fvu_post", "fvu_rise", "jaccard", "cosine_post")

    def cell(estimate: dict[str, float]) -> str:
        return f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f})"

    rows = [(point, *(cell(figures[name]) for name in names)) for point, figures in transfer.items()]
    output.show(title, ("hook point", "FVU base", "FVU here", "rise", "Jaccard", "cosine"), rows)
