"""`qwen-scope catalog`: the released SAEs, Qwen's and others'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import options, output

if TYPE_CHECKING:
    from qwen_scope.sae import catalog as released


def catalog(
    name: Annotated[str | None, typer.Argument(help="One group: its name, Hub id or alias. Default: list all.")] = None,
    as_json: options.Json = False,
) -> None:
    """List the released SAEs, Qwen's and others', or say all about one group."""
    from qwen_scope.report import size
    from qwen_scope.sae import catalog as released

    groups = [released.find(name)] if name else list(released.groups())
    others = [] if name else list(released.community())
    if as_json:
        output.print_json([describe(group) for group in (*groups, *others)])
        return
    if name:
        output.show(groups[0].name, ("", "value"), list(describe(groups[0]).items()))
        return
    rows = [(g.name, g.layers, g.d_model, g.d_sae, g.k, size(g.bytes_per_layer())) for g in groups]
    title = f"{len(groups)} groups, {sum(g.layers for g in groups)} SAEs; a file is one layer in fp32"
    output.show(title, ("group", "layers", "d_model", "d_sae", "k", "file"), rows)
    rows = [(g.name, g.by, known_layers(g), g.d_sae or "not known", g.k) for g in others]
    title = f"{len(others)} groups of others, {sum(g.layers for g in others)} SAEs known; {CHECKED}"
    output.show(title, ("group", "by", "layers", "d_sae", "k"), rows)
    output.console().print("All about one: qwen-scope catalog GROUP. What it needs: qwen-scope plan GROUP.")


CHECKED = "layout checked, weights not"


def known_layers(group: released.Group) -> str:
    """How many layers are known, with a plus where the repository may hold more."""
    return f"{group.layers}{'' if group.complete else '+'}"


def describe(group: released.Group) -> dict[str, str | int]:
    """All that the catalog knows of a group, as plain data."""
    known = bool(group.d_sae)
    return {
        "name": group.name,
        "by": group.by if group.folder is None else "this package",
        "repository": group.repo or f"bundled: {group.folder}",
        "language model": group.model,
        "language model is": group.kind,
        "layers": group.layers,
        "layers are": layer_list(group),
        "d_model": group.d_model,
        "d_sae": group.d_sae or "not known",
        "k": group.k,
        "architecture": group.architecture,
        "layout": group.layout,
        "conventions": group.conventions,
        "checked": CHECKED if group.folder is None else "layout and weights",
        "hook point": f"layers.N.{group.hook_point}",
        "aliases": ", ".join(group.aliases),
        "bytes per layer, fp32": group.bytes_per_layer("float32") if known else "not known",
        "bytes per layer, bf16": group.bytes_per_layer("bfloat16") if known else "not known",
        "bytes in all, fp32": group.total_bytes("float32") if known else "not known",
    }


def layer_list(group: released.Group) -> str:
    """The numbers of the layers, as the catalog knows them."""
    numbers = group.layer_numbers
    if numbers == tuple(range(len(numbers))) and numbers:
        return f"0 to {numbers[-1]}"
    said = ", ".join(map(str, numbers)) or "not known"
    return said if group.complete or not numbers else f"{said}; others are not known"
