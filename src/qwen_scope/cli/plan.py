"""`qwen-scope plan`: what a model and its SAEs take, and whether that fits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options, output


def plan(
    group: Annotated[
        str, typer.Argument(help="A group of the catalog, a folder of SAEs or of a model, or a GGUF file.")
    ] = "lab",
    model: Annotated[
        str | None, typer.Option("--model", help="Of a folder of SAEs. Default: what its files or its name say.")
    ] = None,
    layers: options.Layers = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Type of the model's weights.")] = "bfloat16",
    sae_dtype: Annotated[str, typer.Option("--sae-dtype", help="Type of the SAEs' weights in memory.")] = "float32",
    device: Annotated[str | None, typer.Option("--device-memory", help="The device's size, such as 24GB.")] = None,
    training: Annotated[bool, typer.Option("--train", help="Also what training SAEs of this shape takes.")] = False,
    batch: Annotated[int, typer.Option("--batch", help="Tokens per training step.", min=1)] = 4096,
    buffer: Annotated[str, typer.Option("--buffer", help="Memory for shuffled residuals in training.")] = "1GB",
    as_json: options.Json = False,
) -> None:
    """Say what a group needs on disk and in memory.

    With --device-memory also what fits on a device of that size, with --train also what training such SAEs takes.
    """
    from qwen_scope.report import size
    from qwen_scope.sae import catalog
    from qwen_scope.scope import is_model, plan_folder, plan_group
    from qwen_scope.train import TrainConfig, memory_plan

    limit = None if device is None else options.parse_size(device)
    wanted = options.parse_layers(layers)
    if catalog.lookup(group) is None and is_model(Path(group)):
        show_model(Path(group), dtype, limit, as_json)
        return
    if catalog.lookup(group) is None and Path(group).is_dir():
        found, needs = plan_folder(Path(group), wanted, model=model, dtype=dtype, sae_dtype=sae_dtype)
    else:
        found = catalog.find(group)
        needs = plan_group(found, wanted, dtype=dtype, sae_dtype=sae_dtype)
    run = None
    if training:
        # The number of tokens trained on does not change what a step takes.
        config = TrainConfig(d_sae=found.d_sae, k=found.k, tokens=batch, batch=batch)
        run = memory_plan(config, found.d_model, needs.n_saes, buffer=options.parse_size(buffer))
    if as_json:
        data = {"group": found.name, **vars(needs), "fits": None if limit is None else needs.fits(limit)}
        output.print_json({**data, "training": None if run is None else {**vars(run), "total": run.total}})
        return
    types = {None: "type not known; fp32 at most", "float32": "fp32", "bfloat16": "bf16"}
    released = types.get(found.stored, found.stored)
    rows = [
        (f"download, SAEs as released ({released})", size(needs.disk)),
        (f"language model in {dtype}", size(needs.model)),
        (f"one SAE in {sae_dtype}", size(needs.sae)),
        ("working memory of one batch (estimate)", size(needs.working)),
        ("device, one SAE at a time", size(needs.one_at_a_time)),
        (f"device, all {needs.n_saes} SAEs", size(needs.all_at_once)),
        ("host beside a GPU, while an SAE is copied", size(needs.host)),
    ]
    if run is not None:
        rows += [
            (f"training: weights of {needs.n_saes} SAEs", size(run.weights)),
            ("training: Adam's moments", size(run.optimiser)),
            ("training: gradients and one batch", size(run.gradients + run.batch)),
            ("training: buffer of residuals", size(run.buffer)),
            ("training, in all, with the language model", size(run.total + needs.model)),
        ]
    output.show(f"{found.name}: {needs.n_saes} layers", ("what", "bytes"), rows)
    if limit is not None:
        output.console().print(f"On a device of {size(limit)}: {needs.fits(limit)}.")


def show_model(folder: Path, dtype: str, limit: int | None, as_json: bool) -> None:
    """What a model alone needs; its SAEs are planned by their own name or folder."""
    from qwen_scope.report import size
    from qwen_scope.scope import plan_model

    needs = plan_model(folder, dtype=dtype)
    total = needs.get("packed", needs["model"]) + needs["working"]
    if as_json:
        output.print_json({"folder": str(folder), **needs, "fits": None if limit is None else total <= limit})
        return
    unpacked = f", unpacked from {needs['quantised']}" if "quantised" in needs and "packed" not in needs else ""
    rows = [
        ("files of weights", size(needs["disk"])),
        *([("language model, packed", size(needs["packed"]))] if "packed" in needs else []),
        (f"language model in {dtype}" + unpacked, size(needs["model"])),
        ("working memory of one batch (estimate)", size(needs["working"])),
        ("device, without SAEs" + (", packed" if "packed" in needs else ""), size(total)),
    ]
    title = f"{folder}: {needs['layers']} layers, {needs['parameters']:,} parameters"
    output.show(title, ("what", "bytes"), rows)
    if limit is not None:
        output.console().print(f"On a device of {size(limit)}: {'fits' if total <= limit else 'does not fit'}.")
