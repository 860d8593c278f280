"""`qwen-scope catalog`: the released SAEs."""

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
    """List the released SAEs, or say all about one group."""
    from qwen_scope.report import size
    from qwen_scope.sae import catalog as released

    groups = [released.find(name)] if name else list(released.groups())
    if as_json:
        output.print_json([describe(group) for group in groups])
        return
    if name:
        output.show(groups[0].name, ("", "value"), list(describe(groups[0]).items()))
        return
    rows = [(g.name, g.layers, g.d_model, g.d_sae, g.k, size(g.bytes_per_layer())) for g in groups]
    title = f"{len(groups)} groups, {sum(g.layers for g in groups)} SAEs; a file is one layer in fp32"
    output.show(title, ("group", "layers", "d_model", "d_sae", "k", "file"), rows)
    output.console().print("All about one: qwen-scope catalog GROUP. What it needs: qwen-scope plan GROUP.")


def describe(group: released.Group) -> dict[str, str | int]:
    """All that the catalog knows of a group, as plain data."""
    return {
        "name": group.name,
        "repository": group.repo or f"bundled: {group.folder}",
        "language model": group.model,
        "language model is": group.kind,
        "layers": group.layers,
        "d_model": group.d_model,
        "d_sae": group.d_sae,
        "k": group.k,
        "hook point": f"layers.N.{group.hook_point}",
        "aliases": ", ".join(group.aliases),
        "bytes per layer, fp32": group.bytes_per_layer("float32"),
        "bytes per layer, bf16": group.bytes_per_layer("bfloat16"),
        "bytes in all, fp32": group.total_bytes("float32"),
    }
