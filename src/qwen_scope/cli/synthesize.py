"""`qwen-scope synthesize`: texts for features that a corpus lacks."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.posttrain import SynthesisOptions, TargetOptions, WriterOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import options, output
from .groups import OPTIONS, PARAGRAPHS, Read, grouped
from .posttrain import given
from .show import scope_of

if TYPE_CHECKING:
    from qwen_scope.posttrain import Price

OPTIONS[TargetOptions] = {
    "features": Annotated[
        str | None,
        typer.Option("--features", "-f", help="The targets: LAYER/FEATURE, as in 2/3,2/40-50."),
    ],
    "search": Annotated[str | None, typer.Option("--search", help="Targets: features whose label has these words.")],
    "concept": Annotated[
        str | None, typer.Option("--concept", help="Targets: features the judge finds relevant to this.")
    ],
    "tau": Annotated[float, typer.Option("--tau", help="How relevant, from 0 to 1.", min=0, max=1)],
    "strength": Annotated[
        float,
        typer.Option("--strength", help="Fire above this share of a feature's own activations; 0: at all.", min=0),
    ],
    "layer": Annotated[
        int | None, typer.Option("--layer", help="Of targets named without one. Default: the only one.")
    ],
}
OPTIONS[SynthesisOptions] = {
    "want": Annotated[
        int, typer.Option("--want", help="Documents in which each target should fire, SEED's included.", min=1)
    ],
    "budget": Annotated[int, typer.Option("--budget", help="Answers in all, over all runs.", min=1)],
    "tries": Annotated[int, typer.Option("--tries", help="Answers for one target before it is given up.", min=1)],
    "shown": Annotated[int, typer.Option("--shown", help="Contexts in a prompt.", min=1)],
    "max_answer_tokens": Annotated[int, typer.Option("--max-answer-tokens", help="Of one answer.", min=1)],
    "temperature": Annotated[float, typer.Option("--temperature", help="Of the writer.", min=0, max=2)],
    "pairs": Annotated[
        bool, typer.Option("--pairs", help="Also each text without its feature: prompt, chosen, rejected.")
    ],
    "instruction": Annotated[
        str,
        typer.Option("--instruction", help="The prompt of the pairs."),
        Read(options.typed, "Write a short text."),
    ],
    "seed": Annotated[int, typer.Option("--seed", help="Of the contexts shown, and of samples.", **options.SEED)],
}
OPTIONS[WriterOptions] = {
    "writer": Annotated[
        str | None, typer.Option("--writer", help="The model to ask, or 'lab'. Default: OPENAI_MODEL.")
    ],
    "max_tokens": Annotated[
        int | None, typer.Option("--max-tokens", help="Stop this run after this many tokens.", min=1)
    ],
    "concurrency": Annotated[int, typer.Option("--concurrency", help="Requests at a time.", min=1)],
    "timeout": Annotated[float, typer.Option("--timeout", help="Seconds for one request.", min=0.1)],
    "price_in": Annotated[float | None, typer.Option("--price-in", help="Of a million tokens of prompts.", min=0)],
    "price_out": Annotated[float | None, typer.Option("--price-out", help="Of a million tokens of answers.", min=0)],
}


@grouped
def synthesize(
    source: Annotated[
        str,
        typer.Argument(metavar="SEED", help="The corpus to complete: a file, folder, dataset, store, or 'lab'."),
    ],
    store: Annotated[
        Path, typer.Option("--store", help="A store in which the targets fire: their labels and contexts.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the run; a stopped run goes on.")],
    targets: TargetOptions,
    how: SynthesisOptions,
    writer: WriterOptions,
    model: options.StoreModel = None,
    sae: options.Sae = None,
    against: Annotated[
        str | None, typer.Option("--against", help="More documents like SEED's: measure both controls too.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask nothing; say what it would take.")] = False,
    sample: Annotated[
        int | None,
        typer.Option("--sample", help="At most this many, drawn evenly. Default: all; of the lab 200.", min=1),
    ] = None,
    reading: CorpusOptions = PARAGRAPHS,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Ask a language model for texts that set off features missing from a corpus; keep those in which they fire.

    The writer is any OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY; 'lab' is one that
    knows the lab's grammar. OUT gets data.jsonl and data.parquet with the provenance of every text.
    """
    from qwen_scope.files import check_folder, check_output
    from qwen_scope.posttrain import MADE, chosen_targets, price, seed_corpus, synthesize, writer_endpoint
    from qwen_scope.store import FeatureStore

    check_output(out / MADE[0])
    check_folder(out, MADE, store, *given(source, against), *options.folders(model, sae))
    how = replace(how, chat=reading.chat)
    with FeatureStore(store) as opened, writer_endpoint(writer, out / "cache", ask=not dry_run) as endpoint:
        corpus = seed_corpus(source, reading)
        more = None
        if against is not None:
            more = seed_corpus(against, replace(reading, sample=how.budget, seed=how.seed + 1))
        if isinstance(more, FeatureStore):
            raise InputError(f"--against takes documents to read, not a store such as {against}")
        with output.status("choosing targets"):
            chosen = chosen_targets(opened, targets, endpoint, how.seed, ask=not dry_run)
        with output.status("opening the model"):
            scope = scope_of(opened, model, ScopeOptions(sae=sae, device=device, dtype=dtype))
        if dry_run:
            show_price(*price(scope, corpus, chosen, out, how, per_million=writer.per_million), as_json)
            return
        with output.progress() as bar:
            found = synthesize(scope, corpus, chosen, endpoint, out, how, natural=more, progress=bar)
    show_made(found, out, as_json)


def show_price(found: Price, counts: dict[str, int], as_json: bool) -> None:
    """What a job would take."""
    if as_json:
        output.print_json({**counts, **asdict(found)})
        return
    pairs = {"requests": found.requests, "prompt tokens": found.prompt_tokens, "answer tokens": found.answer_tokens}
    rows = [(name, f"{low:,}", f"{high:,}") for name, (low, high) in pairs.items()]
    if found.cost is not None:
        rows.append(("cost", f"{found.cost[0]:.4f}", f"{found.cost[1]:.4f}"))
    told = (
        f"{counts['targets']} targets, {counts['missing']} missing from the seed corpus, {counts['open']} to write for"
    )
    output.show(told, ("", "every first answer kept", "at most"), rows)


def show_made(found: dict, out: Path, as_json: bool) -> None:
    """What came out."""
    if as_json:
        output.print_json({"folder": str(out), **found})
        return
    rows = [
        ("targets", found["targets"]),
        ("covered before", f"{found['coverage_before']:.2%}"),
        ("covered now", f"{found['coverage']:.2%}"),
        ("answers", found["answers"]),
        *((f"  {name}", count) for name, count in found["outcomes"].items()),
        ("ended", found["ended"]),
        *(
            (f"covered by {name}", f"{covered / found['targets']:.2%} with {n} texts")
            for name, (n, covered) in found.get("controls", {}).items()
        ),
        *((f"pairs: {name}", count) for name, count in found.get("pairs", {}).items()),
        *((f"{name} of this run", count) for name, count in found["spent"].items()),
    ]
    output.show("Synthesis", ("figure", "value"), rows)
    output.console().print(f"Written to {out}.", soft_wrap=True)
