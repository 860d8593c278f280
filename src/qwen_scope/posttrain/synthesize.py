"""Data for features that a corpus lacks: ask for texts, keep those in which the target fires on re-encoding.

Method: Qwen-Scope report (arXiv 2605.11887), section 6. Cov(D) is the share of targets that fire in some example of D.

```
out/
  run.json        the resolved settings, versions and seed
  targets.jsonl   the targets with label, relevance, and in how many documents they fire before and after
  seed/           the features of the seed corpus: a store, to be opened with FeatureStore
  cache/          every answer by request: nothing is paid twice
  rounds/         every attempt with its outcome, round by round; pairs/ and untargeted/ alike
  data.jsonl, data.parquet     the kept texts with their provenance
  pairs.jsonl, pairs.parquet   prompt, chosen and rejected, where pairs are wanted
  curves.json, coverage.png    coverage against answers, where there are controls
  metrics.json
```
"""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.features import Endpoint
from qwen_scope.files import lock_folder, room, write_text, write_whole
from qwen_scope.report import Curves, Line, Progress, save_png
from qwen_scope.scope import ExtractOptions, Scope
from qwen_scope.store import FeatureStore
from qwen_scope.text import Chat, Corpus, usable

from .journal import KEPT, OUTCOMES, Attempt, check_folder, write_lines
from .options import SynthesisOptions
from .targets import Target
from .writer import Made, Writer, activations, digest, fire
from .writing import Price, avoid_prompt, priced, write_prompt

PACKAGES = ("qwen-scope", "torch", "transformers", "pyarrow", "duckdb")
MADE = ("run.json", "data.jsonl", "data.parquet", "targets.jsonl", "rounds", "pairs", "untargeted", "pairs.jsonl")
MADE += ("pairs.parquet", "curves.json", "coverage.png", "metrics.json")
"""What a job writes in its folder, beside the store of the seed corpus and the cache."""

IMITATED = 2000
"""Texts of the seed corpus that the control may see."""


def synthesize(
    scope: Scope,
    seed: Corpus | FeatureStore,
    targets: Sequence[Target],
    endpoint: Endpoint,
    out: Path,
    options: SynthesisOptions | None = None,
    *,
    natural: Corpus | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Complete a corpus where features of it are missing; returns what `metrics.json` holds.

    A run that was stopped, in whatever way, is repeated with the same arguments and goes on: the result is that of a
    run nobody disturbed, as long as the answers are the same. A larger budget goes on as well.

    Args:
        seed: the corpus to complete, or its store; a target of which too few documents make it fire is asked for.
        targets: from `listed_targets`, `searched_targets` or `judged_targets`.
        endpoint: who writes. Without a cache of its own it gets `out/cache`.
        out: the folder of the run.
        natural: more documents of the kind of the seed corpus. With it two controls are measured with as many texts as
            there were answers: these documents, and answers of the same endpoint with no feature in the prompt.

    Raises:
        MismatchError: a target or a store of another SAE.   NotFoundError: the server can't be reached at all.
        InputError: no target, a folder with other content or one that another process writes to, a full disk.
        QwenScopeError: what the server says.
    """
    o = options or SynthesisOptions()
    check_targets(scope, targets)
    with room(out, "what was answered"), lock_folder(out):
        request = _request(scope, seed, targets, endpoint, o)
        check_folder(out, request)
        with seed_store(scope, seed, [target.layer for target in targets], out / "seed", o.chat) as store:
            counts, (known, texts) = seed_counts(store, targets), seed_texts(store, o.seed)
        out.mkdir(parents=True, exist_ok=True)
        facts = {"request": request, "budget": o.budget, "endpoint": endpoint.shown, "versions": versions()}
        write_text(out / "run.json", _json({**facts, "concurrency": endpoint.concurrency}))
        asked = endpoint if endpoint.cache is not None else replace(endpoint, cache=out / "cache")
        writer = Writer(scope, targets, asked, out, o, known, texts, progress)
        made = writer.write(counts)
        write_data(out, targets, made, endpoint.model, o)
        metrics = figures(targets, counts, made)
        if o.pairs:
            metrics["pairs"] = write_pairs(out, targets, writer.contrast(made), endpoint.model, o)
        if natural is not None:
            control = writer.imitate(counts, len(made.attempts))
            more = usable(natural, lambda document: _plain(document.text), len(made.attempts))
            curves = {"targeted": made.curve, "untargeted": control.curve}
            curves["natural"] = curve_of(scope, more, targets, counts, o.batch)
            write_text(out / "curves.json", _json(curves))
            with write_whole(out / "coverage.png") as part:
                save_png(coverage_figure(curves, len(targets)), part)
            metrics["controls"] = {name: curve[-1] for name, curve in curves.items()}
        write_text(out / "metrics.json", _json(metrics))
    return {**metrics, "spent": asdict(asked.spent)}


def check_targets(scope: Scope, targets: Sequence[Target]) -> None:
    """Refuse targets of another SAE than the scope's.

    Raises:
        InputError: no target, or one twice.   MismatchError: another SAE.   NotFoundError: a layer without an SAE.
    """
    places = [target.place for target in targets]
    if not places or len(set(places)) < len(places):
        raise InputError(f"{len(places)} targets, {len(set(places))} of them different: name each once, at least one")
    scope.check_layers(sorted({target.layer for target in targets}))
    for target in targets:
        sae = scope.saes[target.layer]
        if target.sae != sae.identity.fingerprint or not 0 <= target.feature < sae.d_sae:
            raise MismatchError(
                f"the target layer {target.layer}, feature {target.feature} is about another SAE ({target.sae[:12]})"
                f" than {sae.identity}; take targets from a store that was made with this one"
            )


def seed_counts(store: FeatureStore, targets: Sequence[Target]) -> Int64[np.ndarray, " targets"]:
    """In how many documents of a store each target fires on any token."""
    found = store.sql(
        "SELECT number, count(DISTINCT document) AS documents FROM features JOIN (SELECT unnest($number::INTEGER[]) AS"
        " number, unnest($layer::INTEGER[]) AS layer, unnest($feature::INTEGER[]) AS feature,"
        " unnest($threshold::DOUBLE[]) AS threshold) USING (layer, feature) WHERE value > threshold GROUP BY number",
        {
            "number": list(range(len(targets))),
            **{name: [getattr(target, name) for target in targets] for name in ("layer", "feature", "threshold")},
        },
    )
    counts = np.zeros(len(targets), np.int64)
    counts[found["number"].to_numpy()] = found["documents"].to_numpy()
    return counts


@contextmanager
def seed_store(
    scope: Scope, seed: Corpus | FeatureStore, layers: Sequence[int], folder: Path, chat: Chat | None = None
) -> Iterator[FeatureStore]:
    """The features of the seed corpus: a store that is given, or one made in `folder`.

    Raises:
        MismatchError: a store made with another SAE.   InputError: no document.
    """
    saes = {layer: scope.saes[layer] for layer in sorted(set(layers))}
    if isinstance(seed, FeatureStore):
        for layer, sae in saes.items():
            seed.require(layer, sae)
        yield seed
        return
    with scope.extract(seed, folder, ExtractOptions(chat=chat), layers=list(saes)) as store:
        yield store


def seed_texts(store: FeatureStore, seed: int) -> tuple[set[str], list[str]]:
    """The digests of all texts of a store, and some of its texts drawn by a seed."""
    query = "SELECT string_agg(text, '' ORDER BY position) AS text FROM tokens GROUP BY document ORDER BY document"
    known, texts, rng = set[str](), list[str](), np.random.default_rng(seed)
    drawn = set(rng.permutation(store.manifest.documents)[:IMITATED].tolist())
    number = 0
    for batch in store.stream(query):
        for text in batch["text"].to_pylist():
            known.add(digest(text))
            if number in drawn:
                texts.append(text)
            number += 1
    return known, texts


def figures(targets: Sequence[Target], before: Int64[np.ndarray, " targets"], made: Made) -> dict[str, Any]:
    """The figures of a run: coverage is the share of targets that fire in at least one document."""
    outcomes = Counter(one.outcome for one in made.attempts)
    return {
        "targets": len(targets),
        "coverage_before": float((before > 0).mean()),
        "coverage": float((made.counts > 0).mean()),
        "missing_before": int((before == 0).sum()),
        "missing": int((made.counts == 0).sum()),
        "answers": len(made.attempts),
        "outcomes": {name: outcomes[name] for name in OUTCOMES if outcomes[name]},
        "ended": made.ended,
        "curve": made.curve,
    }


def write_data(out: Path, targets: Sequence[Target], made: Made, model: str, o: SynthesisOptions) -> None:
    """The kept texts with their provenance, as JSON lines and Parquet, and the targets."""
    by_place = {target.place: (i, target) for i, target in enumerate(targets)}
    rows = []
    for one in made.kept:
        _, target = by_place[one.place]
        asked = write_prompt(target, one.attempt, o.shown, o.seed)
        rows.append({"text": one.text, **provenance(one, target, asked, model)})
    save_rows(out / "data", rows, {"text": "string", **PROVENANCE})
    asked_for = Counter(one.place for one in made.attempts)
    kept = Counter(one.place for one in made.kept)
    lines = [
        {
            **{
                name: getattr(target, name)
                for name in ("layer", "feature", "sae", "label", "source", "relevance", "threshold")
            },
            "documents": int(made.counts[i]),
            "answers": asked_for[target.place],
            "kept": kept[target.place],
        }
        for i, target in by_place.values()
    ]
    write_lines(out / "targets.jsonl", lines)


def write_pairs(
    out: Path, targets: Sequence[Target], attempts: Sequence[Attempt], model: str, o: SynthesisOptions
) -> dict[str, int]:
    """The pairs in the columns that TRL's preference trainers read: the target fires in `chosen`, not in `rejected`."""
    by_place, rows = {target.place: target for target in targets}, []
    for one in attempts:
        if one.outcome == KEPT:
            target = by_place[one.place]
            asked = avoid_prompt(target, one.of, one.attempt, o.shown, o.seed)
            both = {"prompt": o.instruction, "chosen": one.of, "rejected": one.text}
            rows.append({**both, **provenance(one, target, asked, model)})
    save_rows(out / "pairs", rows, {"prompt": "string", "chosen": "string", "rejected": "string", **PROVENANCE})
    return {"pairs": len(rows), "answers": len(attempts)}


PROVENANCE = {
    "layer": "int32",
    "feature": "int32",
    "sae": "string",
    "label": "string",
    "label_source": "string",
    "relevance": "float64",
    "threshold": "float64",
    "attempt": "int32",
    "activation": "float64",
    "model": "string",
    "asked": "string",
}
"""What every row says about where it comes from; `asked` is the prompt, system message first, and `activation` the
target's largest in the answer (0 in a rejected text)."""


def provenance(one: Attempt, target: Target, asked: Sequence[Mapping[str, str]], model: str) -> dict[str, Any]:
    """Where a row comes from."""
    return {
        "layer": target.layer,
        "feature": target.feature,
        "sae": target.sae,
        "label": target.label,
        "label_source": target.source,
        "relevance": target.relevance,
        "threshold": target.threshold,
        "attempt": one.attempt,
        "activation": one.activation,
        "model": model,
        "asked": "\n\n".join(message["content"] for message in asked),
    }


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """The same rows as `.jsonl` and `.parquet`, each whole or not at all."""
    import pyarrow as pa
    from pyarrow import parquet

    write_lines(path.with_suffix(".jsonl"), rows)
    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
    with write_whole(path.with_suffix(".parquet")) as part:
        parquet.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), part)


def curve_of(
    scope: Scope, texts: Iterable[str], targets: Sequence[Target], counts: Int64[np.ndarray, " targets"], step: int
) -> list[tuple[int, int]]:
    """The coverage of targets as more texts are added to a seed corpus: texts so far and targets covered."""
    covered, some, out, done = counts > 0, list[str](), [(0, int((counts > 0).sum()))], 0
    everything = list(texts)
    for start in range(0, len(everything), step):
        some = everything[start : start + step]
        covered = covered | fire(activations(scope, some, targets), targets).any(0)
        done += len(some)
        out.append((done, int(covered.sum())))
    return out


def coverage_figure(curves: Mapping[str, Sequence[tuple[int, int]]], targets: int) -> Curves:
    """Coverage against texts added, one line per way to add them."""
    lines = [
        Line(name, [n for n, _ in curve], [covered / targets for _, covered in curve]) for name, curve in curves.items()
    ]
    return Curves("Targets that fire in some text", "texts added (targeted: answers asked for)", "share", lines)


def price(
    scope: Scope,
    seed: Corpus | FeatureStore,
    targets: Sequence[Target],
    out: Path,
    options: SynthesisOptions | None = None,
    *,
    per_million: tuple[float, float] | None = None,
) -> tuple[Price, dict[str, Any]]:
    """What a job would cost, and how far the seed corpus is from its aim; nothing is asked.

    The seed corpus is encoded into `out/seed`, where the job itself finds it.

    Args:
        per_million: the price of a million tokens of prompts, and of answers.

    Raises:
        as `synthesize`.
    """
    o = options or SynthesisOptions()
    check_targets(scope, targets)
    with (
        room(out, "what was answered"),
        lock_folder(out),
        seed_store(scope, seed, [target.layer for target in targets], out / "seed", o.chat) as store,
    ):
        counts = seed_counts(store, targets)
        typical = store.manifest.tokens / store.manifest.documents
    open_ = np.flatnonzero(counts < o.want)
    wanted = int(np.minimum(o.want - counts[open_], o.tries).sum())
    requests = (min(o.budget, wanted * (1 + o.pairs)), min(o.budget, len(open_) * o.tries * (1 + o.pairs)))
    some = [write_prompt(targets[i], 1, o.shown, o.seed) for i in open_[:50]]
    lengths = [len(scope.tokenizer.encode("\n".join(m["content"] for m in messages))) for messages in some]
    answer = (min(typical, o.max_answer_tokens), float(o.max_answer_tokens))
    found = priced(requests, float(np.mean(lengths)) if lengths else 0.0, answer, per_million)
    return found, {"targets": len(targets), "missing": int((counts == 0).sum()), "open": len(open_)}


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide a run."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _request(
    scope: Scope, seed: Corpus | FeatureStore, targets: Sequence[Target], endpoint: Endpoint, o: SynthesisOptions
) -> dict[str, Any]:
    """What decides the result of a run, as plain data."""
    named = [
        [*target.place, target.threshold, target.label, target.relevance, len(target.contexts)] for target in targets
    ]
    corpus = seed.manifest.request if isinstance(seed, FeatureStore) else seed.description
    settings = {name: value for name, value in asdict(o).items() if name != "budget" and value is not None}
    return {
        "model": scope.name,
        "saes": {str(layer): scope.saes[layer].identity.fingerprint for layer in sorted({t.layer for t in targets})},
        "seed corpus": corpus,
        "targets": named,
        "writer": endpoint.model,
        **settings,
    }


def _plain(text: str | list[dict[str, str]]) -> str:
    return text if isinstance(text, str) else "\n".join(message["content"] for message in text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
