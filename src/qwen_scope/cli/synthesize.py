"""`qwen-scope synthesize`: texts for features that a corpus lacks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.errors import InputError
from qwen_scope.text import CorpusOptions

from . import options, output
from .groups import PARAGRAPHS, grouped
from .posttrain import given
from .show import scope_of
from .store import the_layer

if TYPE_CHECKING:
    from qwen_scope.features import Endpoint
    from qwen_scope.posttrain import Target
    from qwen_scope.store import FeatureStore
    from qwen_scope.text import Corpus

LAB_DOCUMENTS = 200
NOTHING = "http://localhost:1/v1"
"""The address of an endpoint that is never asked."""


SeedCorpus = Annotated[
    str, typer.Argument(metavar="SEED", help="The corpus to complete: a file, folder, dataset, store, or 'lab'.")
]
Store = Annotated[Path, typer.Option("--store", help="A store in which the targets fire: their labels and contexts.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder of the run; a stopped run goes on.")]
Features = Annotated[str | None, typer.Option("--features", "-f", help="The targets, such as 3,17,40-50.")]
Search = Annotated[str | None, typer.Option("--search", help="Targets: features whose label has these words.")]
Concept = Annotated[str | None, typer.Option("--concept", help="Targets: features the judge finds relevant to this.")]
Tau = Annotated[float, typer.Option("--tau", help="How relevant, from 0 to 1.", min=0, max=1)]
Strength = Annotated[
    float, typer.Option("--strength", help="Fire above this share of a feature's own activations; 0: at all.", min=0)
]
Layer = Annotated[int | None, typer.Option("--layer", help="Of the targets. Default: the store's only one.")]
Want = Annotated[
    int, typer.Option("--want", help="Documents in which each target should fire, SEED's included.", min=1)
]
Budget = Annotated[int, typer.Option("--budget", help="Answers in all, over all runs.", min=1)]
Tokens = Annotated[int | None, typer.Option("--max-tokens", help="Stop this run after so many tokens.", min=1)]
Tries = Annotated[int, typer.Option("--tries", help="Answers for one target before it is given up.", min=1)]
Shown = Annotated[int, typer.Option("--shown", help="Contexts in a prompt.", min=1)]
AnswerTokens = Annotated[int, typer.Option("--max-answer-tokens", help="Of one answer.", min=1)]
Temperature = Annotated[float, typer.Option("--temperature", help="Of the writer.", min=0, max=2)]
Pairs = Annotated[bool, typer.Option("--pairs", help="Also each text without its feature: prompt, chosen, rejected.")]
Instruction = Annotated[str, typer.Option("--instruction", help="The prompt of the pairs.")]
Against = Annotated[
    str | None, typer.Option("--against", help="More documents like SEED's: measure both controls too.")
]
Writer = Annotated[str | None, typer.Option("--writer", help="The model to ask, or 'lab'. Default: OPENAI_MODEL.")]
Concurrency = Annotated[int, typer.Option("--concurrency", help="Requests at a time.", min=1)]
Timeout = Annotated[float, typer.Option("--timeout", help="Seconds for one request.", min=0.1)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Ask nothing; say what it would take.")]
PriceIn = Annotated[float | None, typer.Option("--price-in", help="Of a million tokens of prompts.", min=0)]
PriceOut = Annotated[float | None, typer.Option("--price-out", help="Of a million tokens of answers.", min=0)]
Sample = Annotated[
    int | None,
    typer.Option("--sample", help="Only so many documents, drawn evenly. Default: all; of the lab 200.", min=1),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the contexts shown, and of samples.", **options.SEED)]


@grouped
def synthesize(
    seed_corpus: SeedCorpus,
    store: Store,
    out: Out,
    features: Features = None,
    search: Search = None,
    concept: Concept = None,
    tau: Tau = 0.5,
    strength: Strength = 0.0,
    model: options.StoreModel = None,
    sae: options.Sae = None,
    layer: Layer = None,
    want: Want = 1,
    budget: Budget = 1000,
    tokens: Tokens = None,
    tries: Tries = 8,
    shown: Shown = 5,
    answer_tokens: AnswerTokens = 300,
    temperature: Temperature = 1.0,
    pairs: Pairs = False,
    instruction: Instruction = "Write a short text.",
    against: Against = None,
    writer: Writer = None,
    concurrency: Concurrency = 8,
    timeout: Timeout = 120.0,
    dry_run: DryRun = False,
    price_in: PriceIn = None,
    price_out: PriceOut = None,
    sample: Sample = None,
    reading: CorpusOptions = PARAGRAPHS,
    seed: Seed = 0,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    as_json: options.Json = False,
) -> None:
    """Ask a language model for texts that set off features missing from a corpus; keep those in which they fire.

    The writer is any OpenAI-compatible endpoint: OPENAI_BASE_URL, OPENAI_MODEL and OPENAI_API_KEY; 'lab' is one that
    knows the lab's grammar. OUT gets data.jsonl and data.parquet with the provenance of every text.
    """
    from qwen_scope.files import check_folder, check_output
    from qwen_scope.posttrain import MADE, SynthesisOptions, price, synthesize
    from qwen_scope.store import FeatureStore

    check_output(out / MADE[0])
    check_folder(out, MADE, store, *given(seed_corpus, against), *options.folders(model, sae))
    instruction = options.typed(instruction)
    settings = SynthesisOptions(want, budget, tries, 64, shown, answer_tokens, temperature, pairs, instruction, seed)
    settings = replace(settings, chat=reading.chat)
    if sum(given is not None for given in (features, search, concept)) != 1:
        raise InputError("say which targets: one of --features 3,17,40-50, --search WORDS or --concept TEXT")
    if (price_in is None) != (price_out is None):
        raise InputError("a price needs both: --price-in and --price-out, per million tokens")
    per_million = None if price_in is None or price_out is None else (price_in, price_out)
    with FeatureStore(store) as opened, asked(writer, out, tokens, concurrency, timeout, dry_run) as endpoint:
        corpus = seed_of(seed_corpus, reading)
        more = None if against is None else seed_of(against, replace(reading, sample=budget, seed=seed + 1))
        if isinstance(more, FeatureStore):
            raise InputError(f"--against takes documents to read, not a store such as {against}")
        with output.status("choosing targets"):
            place = the_layer(opened, layer)
            chosen = targets_of(opened, place, features, search, concept, endpoint, tau, strength, seed, dry_run)
        with output.status("opening the model"):
            scope = scope_of(opened, model, sae, device, dtype, None)
        if dry_run:
            show_price(*price(scope, corpus, chosen, out, settings, per_million=per_million), as_json)
            return
        with output.progress() as bar:
            found = synthesize(scope, corpus, chosen, endpoint, out, settings, natural=more, progress=bar)
    show_made(found, out, as_json)


@contextmanager
def asked(
    writer: str | None, out: Path, tokens: int | None, concurrency: int, timeout: float, dry_run: bool
) -> Iterator[Endpoint]:
    """The endpoint of the environment, or the lab's own."""
    from qwen_scope.features import Endpoint
    from qwen_scope.posttrain import serving_lab

    limits = {"max_tokens": tokens, "concurrency": concurrency, "timeout": timeout, "cache": out / "cache"}
    if writer == "lab":
        with serving_lab() as server:
            yield Endpoint(server.url, "lab", **limits)
        return
    found = Endpoint.from_environment(model=writer, **limits)
    if found is None and not dry_run:
        raise InputError(
            "no language model to ask: set OPENAI_BASE_URL, OPENAI_MODEL and, where it needs one, OPENAI_API_KEY, or"
            " take --writer lab"
        )
    yield found or Endpoint(os.environ.get("OPENAI_BASE_URL") or NOTHING, writer or "none", **limits)


def seed_of(source: str, reading: CorpusOptions) -> Corpus | FeatureStore:
    """The corpus to complete, or its store."""
    from qwen_scope.store import FeatureStore

    if (Path(source) / "manifest.json").is_file():
        return FeatureStore(source)
    return options.read(source, reading, LAB_DOCUMENTS)


def targets_of(
    store: FeatureStore,
    layer: int,
    features: str | None,
    search: str | None,
    concept: str | None,
    endpoint: Endpoint,
    tau: float,
    strength: float,
    seed: int,
    dry_run: bool,
) -> list[Target]:
    """The targets that were asked for; before anything may be asked, every label is one."""
    from qwen_scope.features import Notes
    from qwen_scope.posttrain import judged_targets, listed_targets, searched_targets

    if features is not None:
        return listed_targets(store, [(layer, i) for i in options.parse_features(features)], strength, seed)
    if search is not None:
        return searched_targets(store, search, strength, seed)
    if dry_run:
        return listed_targets(store, list(Notes(store).labels()), strength, seed)
    return judged_targets(store, concept or "", endpoint, tau, strength, seed)


def show_price(found: object, counts: dict[str, int], as_json: bool) -> None:
    """What a job would take."""
    from dataclasses import asdict

    from qwen_scope.posttrain import Price

    assert isinstance(found, Price)
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
