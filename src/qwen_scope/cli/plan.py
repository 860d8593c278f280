"""`qwen-scope plan`: what a model and its SAEs take, and whether that fits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import NotFoundError

from . import options, output

if TYPE_CHECKING:
    from qwen_scope.model import ModelSizes
    from qwen_scope.sae import Group
    from qwen_scope.scope import ModelPlan, Plan
    from qwen_scope.train import MemoryPlan, RunPlan, TrainConfig


def plan(
    group: Annotated[
        str,
        typer.Argument(help="A group of the catalog, a folder of SAEs, or a model: a folder, an adapter or a GGUF."),
    ] = "lab",
    model: Annotated[
        str | None, typer.Option("--model", help="Of a folder of SAEs. Default: what its files or its name say.")
    ] = None,
    layers: options.Layers = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Type of the model's weights. Default: bfloat16; of a GGUF packed.")
    ] = None,
    sae_dtype: Annotated[str, typer.Option("--sae-dtype", help="Type of the SAEs' weights in memory.")] = "float32",
    device: Annotated[str | None, typer.Option("--device-memory", help="The device's size, such as 24GB.")] = None,
    training: Annotated[bool, typer.Option("--train", help="Also what training SAEs of this shape takes.")] = False,
    d_sae: Annotated[
        int | None, typer.Option("--d-sae", help="Features to train on a model. Default: 16 per dimension.", min=1)
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Features active per token, of a model's SAEs to train.", min=1)] = 50,
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Training tokens: a short run holds fewer residuals.", min=1)
    ] = None,
    batch: Annotated[int, typer.Option("--batch", help="Tokens per training step.", min=1)] = 4096,
    buffer: Annotated[str, typer.Option("--buffer", help="Memory for shuffled residuals in training.")] = "1GB",
    why: Annotated[
        int | None,
        typer.Option("--why", help="Also what a graph of a prompt of this many tokens takes.", min=1),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Say what a group or a language model needs on disk and in memory, and whether this machine has it.

    Nothing is loaded. --device-memory names another machine's size; with --train also what training SAEs takes, per
    layer and in all. With --why TOKENS also what an attribution graph takes beside the model and its SAEs.
    """
    from qwen_scope.model import model_sizes
    from qwen_scope.sae import catalog
    from qwen_scope.scope import config_of, is_model, plan_folder, plan_group, plan_model
    from qwen_scope.train import TrainConfig, memory_plan

    limit = None if device is None else options.parse_size(device)
    wanted = options.parse_layers(layers)
    if catalog.lookup(group) is None and is_model(Path(group)):
        shape, whole = None, plan_model(Path(group), dtype=dtype)
        if training:
            width = d_sae or 16 * whole.sizes.d_model
            held = options.parse_size(buffer)
            shape = TrainConfig(d_sae=width, k=k, tokens=tokens or max(batch, held), batch=batch), held
        graph = graph_of(whole.sizes, why, wanted, k, dtype)
        show_model(Path(group), whole, dtype, wanted, shape, limit, graph, as_json)
        return
    if catalog.lookup(group) is None and Path(group).is_dir():
        found, needs = plan_folder(Path(group), wanted, model=model, dtype=dtype or "bfloat16", sae_dtype=sae_dtype)
    else:
        found = catalog.find(group)
        needs = plan_group(found, wanted, dtype=dtype or "bfloat16", sae_dtype=sae_dtype)
    graph = None
    if why is not None:
        graph = graph_of(model_sizes(config_of(found.model)), why, wanted or found.layer_numbers, found.k, dtype)
    run = None
    if training:
        # The number of tokens trained on does not change what a step takes.
        config = TrainConfig(d_sae=found.d_sae, k=found.k, tokens=batch, batch=batch)
        run = memory_plan(config, found.d_model, needs.n_saes, buffer=options.parse_size(buffer))
    if as_json:
        data = {"group": found.name, **vars(needs), "fits": None if limit is None else needs.fits(limit)}
        data |= {} if graph is None else {"graph": graph[1]}
        output.print_json({**data, "training": None if run is None else {**vars(run), "total": run.total}})
        return
    show_group(found, needs, run, dtype or "bfloat16", sae_dtype, limit, graph)


def graph_of(
    sizes: ModelSizes, tokens: int | None, layers: Sequence[int] | None, k: int, dtype: str | None
) -> tuple[str, int] | None:
    """What an attribution graph takes, as a row; None where it was not asked for."""
    from qwen_scope.circuits import graph_bytes

    if tokens is None:
        return None
    chosen = range(len(sizes.blocks)) if layers is None else layers
    needs = graph_bytes(sizes, tokens, layers=chosen, k=k, dtype=dtype or "bfloat16")
    return f"graph of a prompt of {tokens:,} tokens, beside the above (estimate)", needs


def show_group(
    found: Group,
    needs: Plan,
    run: MemoryPlan | None,
    dtype: str,
    sae_dtype: str,
    limit: int | None,
    graph: tuple[str, int] | None,
) -> None:
    """What a group's SAEs and their language model need."""
    from qwen_scope.report import size

    types = {None: "type not known; fp32 at most", "float32": "fp32", "bfloat16": "bf16"}
    released = types.get(found.stored, found.stored)
    rows = [
        (f"download, SAEs as released ({released})", size(needs.disk)),
        (f"language model in {dtype}", size(needs.model)),
        (f"one SAE in {sae_dtype}", size(needs.sae)),
        ("working memory of one batch (estimate)", size(needs.working)),
        ("device, one SAE at a time", size(needs.one_at_a_time)),
        ("device, layers in one pass (two SAEs at most)", size(needs.in_turn)),
        (f"device, all {needs.n_saes} SAEs", size(needs.all_at_once)),
        ("host beside a GPU, while an SAE is copied", size(needs.host)),
        *([] if graph is None else [(graph[0], size(graph[1]))]),
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


def show_model(
    folder: Path,
    needs: ModelPlan,
    dtype: str | None,
    layers: list[int] | None,
    training: tuple[TrainConfig, int] | None,
    limit: int | None,
    graph: tuple[str, int] | None,
    as_json: bool,
) -> None:
    """What a model needs without SAEs, and what training some of its layers takes."""
    from qwen_scope.report import size
    from qwen_scope.scope import machine
    from qwen_scope.train import run_plan

    n = len(needs.sizes.blocks)
    if missing := [layer for layer in layers or () if layer >= n]:
        raise NotFoundError(f"layer {missing[0]} does not exist: {folder} has {n} layers, 0 to {n - 1}")
    where, has = ("a device of that size", limit) if limit is not None else machine()
    run = None
    if training is not None:
        run = run_plan(
            training[0],
            needs.sizes,
            n if layers is None else len(layers),
            dtype=dtype or "bfloat16",
            model=needs.weights,
            vocabulary=needs.vocabulary,
            buffer=training[1],
            on_cpu=where != "the GPU",
        )
    total = needs.total if run is None else run.total
    if as_json:
        print_model_json(folder, needs, run, limit, has, graph)
        return
    unpacked = f", unpacked from {needs.quantised}" if needs.quantised and needs.packed is None else ""
    rows = [
        ("files of weights", size(needs.disk)),
        *([("language model, packed", size(needs.packed))] if needs.packed is not None else []),
        (f"language model in {dtype or 'bfloat16'}{unpacked}", size(needs.model)),
        ("working memory of one batch (estimate)", size(needs.working)),
        (f"KV cache of a text of {needs.context or 4096:,} tokens", size(needs.cache)),
        ("device, without SAEs" + (", packed" if needs.weights == needs.packed else ""), size(needs.total)),
        *([] if graph is None else [(graph[0], size(graph[1]))]),
    ]
    if run is not None:
        one, steps = run.layer, run.steps
        rows += [
            (f"training: one layer of {training[0].d_sae:,} features" if training else "", size(one)),
            (f"training: weights of {n if layers is None else len(layers)} SAEs", size(steps.weights)),
            ("training: Adam's moments", size(steps.optimiser)),
            ("training: gradients and one batch", size(steps.gradients + steps.batch)),
            ("training: buffer of residuals", size(steps.buffer)),
            ("training: the language model at work", size(run.capture)),
            ("measuring at the end", size(run.measuring)),
            ("training, in all, at the peak", size(run.total)),
        ]
    title = f"{folder}: {n} layers, {needs.sizes.parameters:,} parameters"
    output.show(title + (f", an adapter of {needs.base}" if needs.base else ""), ("what", "bytes"), rows)
    verdict = "fits" if total <= has else f"does not fit: {(total - has) / 1e9:.1f} GB short"
    said = "On a device of" if limit is not None else f"On {where}, which has"
    output.console().print(f"{said} {size(has)}: {verdict}.")


def print_model_json(
    folder: Path, needs: ModelPlan, run: RunPlan | None, limit: int | None, has: int, graph: tuple[str, int] | None
) -> None:
    total = needs.total if run is None else run.total
    data = {
        "folder": str(folder),
        "disk": needs.disk,
        **({} if needs.packed is None else {"packed": needs.packed}),
        **({"quantised": needs.quantised} if needs.quantised else {}),
        "model": needs.model,
        "working": needs.working,
        "context": needs.context,
        "cache": needs.cache,
        "parameters": needs.sizes.parameters,
        "d_model": needs.sizes.d_model,
        "layers": len(needs.sizes.blocks),
        "base": needs.base,
        **({} if graph is None else {"graph": graph[1]}),
        "total": total,
        "fits": None if limit is None else total <= limit,
        "machine": {"bytes": has, "fits": total <= has} if limit is None else None,
        "training": None if run is None else {**vars(run), "steps": vars(run.steps), "total": run.total},
    }
    output.print_json(data)
