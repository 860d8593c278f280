"""`qwen-scope convert`: SAEs in another type or layout, and what that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen_scope.errors import NotFoundError, nearest

from . import options, output

# Residuals are taken from these when the lab is converted; other models bring their own with --model and --text.
SAMPLE = "The weather is fine today. Where is the station? 12 + 30 = 42. Das ist gut. 你好，今天天气很好。"


def convert(
    source: Annotated[str, typer.Argument(help="A group (name, alias, Hub id), a folder or a file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    layout: Annotated[
        str, typer.Option("--layout", help="safetensors, official, sae_lens, sparsify or dictionary_learning.")
    ] = "safetensors",
    weights: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="float32, bfloat16, float16 or, in the layout safetensors, int8: half of bfloat16, and another SAE "
            "by fingerprint. Default: bfloat16 in our own layouts, whose arithmetic is fp32 either way; float32 in the "
            "others, whose tools compute in the stored type.",
        ),
    ] = None,
    layers: options.Layers = None,
    k: options.K = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Measure the agreement on this model's residuals, not on random ones.")
    ] = None,
    text: Annotated[str, typer.Option("--text", help="The text whose residuals are used with --model.")] = SAMPLE,
    as_json: options.Json = False,
) -> None:
    """Write SAEs in another layout or number type.

    Reports their size in memory and on the disk, and how far their features still agree.
    Agreement is against the original weights: the mean Jaccard index of the sets of active features, and the
    relative error of all activations.
    """
    from qwen_scope.report import size
    from qwen_scope.sae import LAYOUTS, compare_saes, folder_name, layers_of, load_sae, save_sae
    from qwen_scope.scope import ScopeOptions

    wanted = options.parse_layers(layers)
    if layout not in LAYOUTS:
        raise NotFoundError(f"no layout {layout!r}; {nearest(layout, LAYOUTS)}")
    dtype = options.weight_type(weights or ("float32" if LAYOUTS[layout].computes_as_stored else "bfloat16"))
    output.hold(out, *options.folders(source, model))
    chosen = layers_of(source) if wanted is None else wanted
    rows = []
    residuals = None
    if model is not None:
        with output.status("reading residuals"):
            scope = options.open_scope(ScopeOptions(model, source, k=k))
            tokens = scope.tokenize([options.typed(text)])
            residuals = {layer: h[0].cpu() for layer, h in scope.capture(tokens, wanted or scope.layers).items()}
    for layer in chosen:
        with output.status(f"layer {layer}"):
            sae = load_sae(source, layer, k=k)
            # A layout that holds one SAE per folder gets a folder for each layer.
            where = out / folder_name(sae) if len(chosen) > 1 and not LAYOUTS[layout].shared else out
            save_sae(sae, where, layout=layout, dtype=dtype)
            again = load_sae(out, layer)
            file = where / LAYOUTS[layout].weights_name(sae.identity.layer)
            x = None if residuals is None else residuals[layer]
            agreement = compare_saes(sae, again, x)
        rows.append(
            {
                "layer": layer,
                "bytes_before": sae.nbytes,
                "bytes_after": again.nbytes,
                "file_bytes": file.stat().st_size,
                "jaccard": agreement.jaccard,
                "value_error": agreement.value_error,
            }
        )
    if as_json:
        output.print_json({"source": source, "layout": layout, "residuals": model or "random", "layers": rows})
        return
    sizes = ("bytes_before", "bytes_after", "file_bytes")
    shown = [(r["layer"], *(size(r[name]) for name in sizes), r["jaccard"], r["value_error"]) for r in rows]
    measured = f"on residuals of {model}" if model else "on random residuals; name --model for real ones"
    columns = ("layer", "before", "after", "file", "mean Jaccard", "value error")
    output.show(f"{source} to {out}, agreement {measured}", columns, shown)
