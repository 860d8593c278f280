"""`qwen-scope classify`: rules of features from a few labelled documents, beside honest baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.text import CorpusOptions

from . import options, output, transfer
from .analyze import show_result
from .commands import App
from .groups import LINES, grouped
from .labelled import labelled, name_of, read_documents

if TYPE_CHECKING:
    from qwen_scope.analysis import Dataset, Rule, Student
    from qwen_scope.scope import Scope
    from qwen_scope.text import Chat, Corpus, Document

app = App(help="Classifiers of a few features: fit, predict, and distil into one without a model.")
app.info.no_args_is_help = True

app.command("transfer")(transfer.transfer)

WINDOW = 512  # documents read at once: sorted by length, they share passes through the model


@app.command()
@grouped
def fit(
    positive: Annotated[str, typer.Argument(help="Documents with the property: a corpus, as extract reads it.")],
    negative: Annotated[str, typer.Argument(help="Documents without it.")],
    rule: Annotated[Path | None, typer.Option("--rule", "-r", help="Where to write the rule (JSON).")] = None,
    test_positive: Annotated[str | None, typer.Option("--test-positive", help="Held-out ones with it.")] = None,
    test_negative: Annotated[str | None, typer.Option("--test-negative", help="Held-out ones without it.")] = None,
    top: Annotated[int, typer.Option("--top", help="How many features of one layer, joined by OR.", min=1)] = 2,
    several: Annotated[
        int, typer.Option("--several", help="Instead the best feature of each of so many layers.", min=1)
    ] = 1,
    fpr: Annotated[
        float | None, typer.Option("--fpr", help="Raise thresholds until at most this share of negative seeds passes.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", help="Of the property. Default: the positive file's.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the split and the intervals.", **options.SEED)] = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for report.html and PNG figures.")] = None,
    reading: CorpusOptions = LINES,
    model: options.Model = "lab",
    sae: options.Sae = None,
    layers: options.Layers = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Find the features that tell two sets of documents apart, and test the rule beside the usual classifiers.

    Without test documents a third of the seeds is held out. The layer is the one with the largest top-1 difference.
    """
    from qwen_scope.analysis import try_rule
    from qwen_scope.files import check_output

    if (test_positive is None) != (test_negative is None):
        raise InputError("give both --test-positive and --test-negative, or neither")
    sources = [positive, negative] + [path for path in (test_positive, test_negative) if path is not None]
    given = [*options.files(*sources), *options.folders(model, sae)]
    if rule is not None:
        check_output(rule, *given)
    output.hold(out, *given)
    with output.status("opening the model"):
        scope = options.open_scope(model, sae, device, dtype, k)
    where = scope.check_layers(options.parse_layers(layers))
    with output.progress() as bar:
        # Each with a seed of its own, so that parts of the lab with the same factors share no document.
        asked = [replace(reading, seed=reading.seed + i) for i in range(len(sources))]
        read = [read_documents(scope, one, where, how, bar) for one, how in zip(sources, asked, strict=True)]
    seeds, pooled = labelled(read[:2], where)
    if len(read) == 4:
        test, test_pooled = labelled(read[2:], where)
    else:
        chosen, held = seeds.split(2 / 3, seed)
        test, test_pooled = seeds.take(held), {layer: x[held] for layer, x in pooled.items()}
        seeds, pooled = seeds.take(chosen), {layer: x[chosen] for layer, x in pooled.items()}
    with output.status("comparing classifiers"):
        found, result = try_rule(
            seeds,
            test,
            pooled,
            test_pooled,
            top=top,
            several=several,
            fpr=fpr,
            name=name or name_of(positive),
            seed=seed,
        )
    if rule is not None:
        found.save(rule)
    show_result(f"Rule for {found.name}", result, out, as_json)


@app.command()
@grouped
def predict(
    classifier: Annotated[Path, typer.Argument(metavar="RULE", help="A rule of classify fit, or a student of distil.")],
    source: Annotated[str, typer.Argument(metavar="CORPUS", help="The documents, as extract reads them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A .jsonl file. Default: standard output.")] = None,
    reading: CorpusOptions = LINES,
    model: options.Model = "lab",
    sae: options.Sae = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
) -> None:
    """Label a stream of documents, one JSON line each; a rule says which feature fired where. A student needs no model.

    A document longer than the model's context is read up to there.
    """
    from qwen_scope.files import check_output, write_whole

    # A shell may have sent standard output into the corpus, which would then never end.
    check_output(out or "/dev/stdout", classifier, *options.files(source), *options.folders(model, sae))
    loaded = load_classifier(classifier)
    corpus = options.read(source, reading)
    scope = None if not hasattr(loaded, "features") else options.open_scope(model, sae, device, dtype, k)
    with output.progress() as bar:
        report = lambda n: bar("labelling", corpus.progress or 0.0, f"{n:,} documents")  # noqa: E731
        lines = predictions(loaded, scope, corpus, reading.chat, report)
        if out is None:
            for line in lines:
                output.print_json_line(line)
        else:
            with write_whole(out) as part, part.open("w", encoding="utf-8", newline="") as file:
                for line in lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")


def load_classifier(path: Path) -> Rule | Student:
    """A rule or a student, by what its file says."""
    from qwen_scope.analysis import Rule, Student
    from qwen_scope.files import read_object

    return Student.load(path) if read_object(path).get("format") == "qwen-scope-student" else Rule.load(path)


def predictions(
    loaded: Any, scope: Scope | None, corpus: Corpus, chat: Chat | None, report: Any
) -> Iterator[dict[str, Any]]:
    """One answer per document, in order; a rule has none for a conversation without `chat`."""
    done = 0
    for documents in windows(corpus, any_kind=scope is None or chat is not None):
        where = [
            {"source": d.source, "row": d.row, **({"id": d.meta["id"]} if "id" in d.meta else {})} for d in documents
        ]
        if scope is None:
            scores = loaded.scores([text_of(document) for document in documents])
            yield from ({**w, "label": bool(s > 0), "score": float(s)} for w, s in zip(where, scores, strict=True))
        else:
            yield from label_window(loaded, scope, [document.text for document in documents], where, chat)
        done += len(documents)
        report(done)
    if not done:
        raise InputError(f"there is no document to label in {corpus.name}{corpus.other_columns()}")


def label_window(
    rule: Rule, scope: Scope, texts: list[Any], where: list[dict], chat: Chat | None = None
) -> Iterator[dict[str, Any]]:
    """The answers of a rule, each with its evidence: feature, layer, position and token."""
    found, tokens = rule_firings(rule, scope, texts, chat)
    called, scores = rule.decide(found), rule.scores(found)
    for i, place in enumerate(where):
        because = [{**asdict(e), "token": tokens[i][e.position]} for e in rule.trace(found, i)] if called[i] else []
        yield {**place, "label": bool(called[i]), "score": float(scores[i]), "because": because}


def check_rule(rule: Rule, scope: Scope) -> None:
    """Refuse SAEs that the rule was not made with.

    Raises:
        MismatchError: other SAEs, or features that they do not have.   NotFoundError: no SAE for one of its layers.
    """
    for layer in rule.layers:
        sae = scope.saes[layer]
        try:
            rule.check_sae(layer, sae.identity.fingerprint, sae.d_sae)
        except MismatchError as error:
            raise MismatchError(f"{error}; name its model and SAEs with --model and --sae") from error


def rule_firings(
    rule: Rule, scope: Scope, texts: list[Any], chat: Chat | None = None
) -> tuple[dict[int, Dataset], list[list[str]]]:
    """The firings of a rule's features alone, by `max`, and the tokens; with `chat` texts may be conversations."""
    import numpy as np

    from qwen_scope.analysis import Dataset

    check_rule(rule, scope)
    seen = scope.features(texts, rule.layers, chat=chat, truncate=True)
    ids, found = tuple(map(str, range(len(texts)))), {}
    for layer in rule.layers:
        acts = seen.acts[layer]
        indices, values = acts.indices.numpy(), acts.values.float().numpy()
        wanted = np.isin(indices, [f.feature for f in rule.features if f.layer == layer]) & (values > 0)
        item, position, slot = np.nonzero(wanted)
        feature, value = indices[item, position, slot], values[item, position, slot]
        # Per item and feature the largest value, at its first position.
        order = np.lexsort((position, -value, feature, item))
        first = np.unique(np.stack([item[order], feature[order]]), axis=1, return_index=True)[1]
        rows = order[first]
        columns = (
            item[rows].astype(np.int32),
            feature[rows].astype(np.int32),
            value[rows],
            position[rows].astype(np.int32),
        )
        found[layer] = Dataset("documents", ids, layer, acts.width, scope.saes[layer].identity.fingerprint, *columns)
    return found, seen.tokens


def windows(corpus: Corpus, *, any_kind: bool) -> Iterator[list[Document]]:
    """The documents, some hundred at a time; conversations are passed over and counted unless they are taken too."""
    from qwen_scope.text import NO_CHAT, tell_unused

    stream, left_out, taken = iter(corpus), 0, 0
    while some := list(islice(stream, WINDOW)):
        kept = [one for one in some if any_kind or isinstance(one.text, str)]
        left_out, taken = left_out + len(some) - len(kept), taken + len(kept)
        if kept:
            yield kept
    if left_out and taken:
        tell_unused({NO_CHAT: left_out}, left_out + taken, corpus.name)
    elif left_out:
        raise InputError(f"{corpus.name} holds nothing but conversations; with --chat default they are read")


def text_of(document: Document) -> str:
    """The text of a document; messages one after the other."""
    if isinstance(document.text, str):
        return document.text
    return "\n".join(message["content"] for message in document.text)


@app.command()
@grouped
def distil(
    rule: Annotated[Path, typer.Argument(help="A rule of classify fit.")],
    source: Annotated[str, typer.Argument(metavar="CORPUS", help="Unlabelled documents, as extract reads them.")],
    student: Annotated[Path, typer.Option("--student", "-s", help="Where to write the student (JSON).")],
    truth: Annotated[
        str | None, typer.Option("--truth", help="A column with true labels (true/false or 1/0), to measure both.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the fifth that is held out.", **options.SEED)] = 0,
    reading: CorpusOptions = LINES,
    model: options.Model = "lab",
    sae: options.Sae = None,
    device: options.Device = None,
    dtype: options.Dtype = "auto",
    k: options.K = None,
    as_json: options.Json = False,
) -> None:
    """Train a small model of the bare text on a rule's labels, for places where no language model runs.

    A fifth of the documents is held out: there the student is compared with the rule, and both with the truth.
    """
    import numpy as np

    from qwen_scope.analysis import Result, Rule, Student, rates_table
    from qwen_scope.files import check_output
    from qwen_scope.stats import rates

    check_output(student, rule, *options.files(source), *options.folders(model, sae))
    loaded = Rule.load(rule)
    corpus = options.read(source, reading)
    scope = options.open_scope(model, sae, device, dtype, k)
    texts, labels, true = [], [], []
    with output.progress() as bar:
        for documents in windows(corpus, any_kind=reading.chat is not None):
            some: list[Any] = [document.text for document in documents]
            labels += loaded.decide(rule_firings(loaded, scope, some, reading.chat)[0]).tolist()
            texts += [text_of(document) for document in documents]
            true += [truth_of(document, truth) for document in documents] if truth else []
            bar("labelling", corpus.progress or 0.0, f"{len(texts):,} documents")
    y = np.array(labels, dtype=bool)
    order = np.random.default_rng(seed).permutation(len(texts))
    held, kept = np.sort(order[: len(order) // 5]), np.sort(order[len(order) // 5 :])
    made = Student.fit([texts[i] for i in kept], y[kept], {"rule": loaded.name, "documents": len(kept)})
    scores = made.scores([texts[i] for i in held])
    results = {"student, rule's labels": rates(scores > 0, y[held], scores)}
    if truth:
        real = np.array(true, dtype=bool)[held]
        results["rule, truth"] = rates(y[held], real)
        results["student, truth"] = rates(scores > 0, real, scores)
    made.save(student)
    agreement = float((y[held] == (scores > 0)).mean())
    data = {"documents": len(texts), "held_out": len(held), "agreement": agreement, "student": str(student)}
    data["results"] = {said: asdict(one) for said, one in results.items()}
    note = f"the student agrees with the rule on {agreement:.1%} of {len(held)} held-out documents"
    if truth:
        lost = results["rule, truth"].f1.estimate - results["student, truth"].f1.estimate
        note += f"; against the truth its F1 is {'lower' if lost > 0 else 'higher'} by {abs(lost):.3f}"
        data["lost_f1"] = lost
    show_result("Student", Result(data, rates_table("On held-out documents", results), (), (note,)), None, as_json)


def truth_of(document: Document, column: str) -> bool:
    """The true label of a document."""
    value = document.meta.get(column)
    known = {
        True: True,
        False: False,
        "true": True,
        "false": False,
        "1": True,
        "0": False,
        "True": True,
        "False": False,
    }
    if value not in known:
        raise InputError(f"row {document.row} of {document.source} has {value!r} in {column!r}, not true or false")
    return known[value]
