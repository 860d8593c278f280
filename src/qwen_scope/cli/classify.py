"""`qwen-scope classify`: rules of features from a few labelled documents, beside honest baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen_scope.analysis import FitOptions
from qwen_scope.cluster import WorkerOptions
from qwen_scope.errors import InputError, MismatchError
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import labelled, names, options, output, tables, transfer
from .analyze import show_result
from .commands import App
from .groups import LINES, OPTIONS, grouped
from .workers import WORKERS, reading_on

if TYPE_CHECKING:
    from qwen_scope.analysis import Answer, Rule, Student
    from qwen_scope.scope import Runner, Scope
    from qwen_scope.store import Firings
    from qwen_scope.text import Chat, Corpus, Document

app = App(help="Classifiers of a few features: fit, predict, and distil into one without a model.")
app.info.no_args_is_help = True

app.command("transfer")(transfer.transfer)

OUT = "Folder for report.html and PNG figures; with --label also a .csv, .parquet or .json file: its rows, judged."
PREDICTED = "A .jsonl file; or your rows with columns added: .csv, .parquet or .json. Default: standard output."
SCOPE, FIT = ScopeOptions(), FitOptions()
SPREAD = 2**13
"""Documents that workers are given together: they open the model for each such set."""
OPTIONS[FitOptions] = {
    "top": Annotated[
        int | None,
        typer.Option(
            "--top", help="How many features of one layer. Default: 2 joined by OR, or 16 with weights.", min=1
        ),
    ],
    "weighted": Annotated[
        bool,
        typer.Option("--weighted", help="Weigh the features by logistic regression instead of joining them by OR."),
    ],
    "several": Annotated[
        int, typer.Option("--several", help="Instead the best feature of each of this many layers.", min=1)
    ],
    "fpr": Annotated[
        float | None,
        typer.Option("--fpr", help="Raise thresholds until at most this share of negative documents passes."),
    ],
    "name": Annotated[str | None, typer.Option("--name", help="Of the property. Default: the positive file's.")],
    "seed": Annotated[int, typer.Option("--seed", help="Of the split, the sample and the intervals.", **options.SEED)],
}


def name_of(source: str) -> str:
    """What a set of documents is called by default: a file's name without its ending."""
    return source if source.startswith("lab:") else Path(source.removesuffix(".gz")).stem


@app.command()
@grouped
def fit(
    positive: Annotated[str, typer.Argument(help="Documents with the property: a corpus, as extract reads it.")],
    negative: Annotated[str | None, typer.Argument(help="Documents without it; not with --label.")] = None,
    label: Annotated[
        str | None,
        typer.Option("--label", help="The first argument holds both: column=value tells which rows have the property."),
    ] = None,
    rule: Annotated[Path | None, typer.Option("--rule", "-r", help="Where to write the rule (JSON).")] = None,
    test_positive: Annotated[str | None, typer.Option("--test-positive", help="Held-out ones with it.")] = None,
    test_negative: Annotated[str | None, typer.Option("--test-negative", help="Held-out ones without it.")] = None,
    made: FitOptions = FIT,
    out: Annotated[Path | None, typer.Option("--out", "-o", help=OUT)] = None,
    reading: CorpusOptions = LINES,
    asked: ScopeOptions = SCOPE,
    layers: options.Layers = None,
    phase: options.Phase = None,
    spread: WorkerOptions = WORKERS,
    as_json: options.Json = False,
) -> None:
    """Find the features that tell two sets of documents apart, and test the rule beside the usual classifiers.

    Without test documents a third of the seeds is held out. The layer is the one with the largest top-1 difference.

    A labelled table goes in with --label COLUMN=VALUE (or a column of true and false), and its rows come back with
    columns added in --out FILE.
    """
    from qwen_scope.analysis import fit as run
    from qwen_scope.files import check_output
    from qwen_scope.scope import ExtractOptions
    from qwen_scope.text import tell_unused

    if (test_positive is None) != (test_negative is None):
        raise InputError("give both --test-positive and --test-negative, or neither")
    if (negative is None) is (label is None):
        raise InputError("name the documents without the property as well, or the column of labels with --label")
    if label is None and tables.is_file(out):
        raise InputError(f"--out {out} takes the rows of a table with --label; name a folder for the report")
    every = (positive, negative, test_positive, test_negative)
    sources = [path for path in every if path is not None]
    given = [*options.files(*sources), *options.folders_of(asked)]
    if rule is not None:
        check_output(rule, *given)
    output.hold(out, *given)
    name, corpora = name_of(positive), [(one, name_of(one)) for one in sources]
    if label is not None:
        name, *both = labelled.sides(positive, label, reading)
        corpora = [(both[0], name), (both[1], f"not {name}"), *corpora[1:]]
    counted, phases = asked.counted, options.check_phases(phase)
    scope = options.open_asked(asked)
    where = scope.check_layers(options.parse_layers(layers))
    with reading_on(spread, asked) as runner, output.progress() as bar:
        # Each with a seed of its own, so that parts of the lab with the same factors share no document.
        read: list[Firings] = []
        for i, (one, called) in enumerate(corpora):
            # What `sides` has read is a list, of which the sample is drawn already.
            seeded = replace(reading, seed=reading.seed + i)
            corpus = options.read(one, seeded if isinstance(one, str) else replace(seeded, sample=None))
            how = ExtractOptions(counted=counted, phases=phases, chat=reading.chat)
            read.append(scope.firings(corpus, where, how, name=called, runner=runner, progress=bar))
            tell_unused(read[-1].left_out, len(read[-1]) + sum(read[-1].left_out.values()), corpus.name)
            counted = read[0].counted
    with output.status("comparing classifiers"):
        found, result = run(read[0], read[1], (read[2], read[3]) if len(read) == 4 else None, made)
    if rule is not None:
        found.save(rule)
    if out is not None and tables.is_file(out):
        corpus = options.read(positive, reading)
        with output.status("judging the rows"):
            rows = answered(found, scope, corpus, reading.chat, lambda _: None)
            output.save([labelled.added(rows, found.name, reading)], out)
        out = None
    show_result(f"Rule for {found.name}", result, out, as_json)


@app.command()
@partial(grouped, without=["asked.counted"])
def predict(
    classifier: Annotated[Path, typer.Argument(metavar="RULE", help="A rule of classify fit, or a student of distil.")],
    source: Annotated[str, typer.Argument(metavar="CORPUS", help="The documents, as extract reads them.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help=PREDICTED)] = None,
    reading: CorpusOptions = LINES,
    asked: ScopeOptions = SCOPE,
    spread: WorkerOptions = WORKERS,
) -> None:
    """Label a stream of documents, one JSON line each; a rule says which feature fired where. A student needs no model.

    A document longer than the model's context is read up to there.
    """
    from qwen_scope.files import check_output, write_whole

    # A shell may have sent standard output into the corpus, which would then never end.
    check_output(out or "/dev/stdout", classifier, *options.files(source), *options.folders_of(asked))
    loaded = load_classifier(classifier)
    corpus = options.read(source, reading)
    scope = None if not hasattr(loaded, "features") else options.open_asked(asked)
    if scope is None and spread.on is not None:
        raise InputError(f"{classifier} is a student, which needs no model and no workers; leave --on out")
    with reading_on(spread, asked) as runner, output.progress() as bar:
        report = lambda n: bar("labelling", corpus.progress or 0.0, f"{n:,} documents")  # noqa: E731
        lines = answered(loaded, scope, corpus, reading.chat, report, runner)
        if out is None:
            for _, line in lines:
                output.print_json_line(line)
        elif tables.is_file(out):
            called = str(getattr(loaded, "name", classifier.stem))  # a student is called as its file
            output.save([labelled.added(lines, called, reading)], out)
        else:
            with write_whole(out) as part, part.open("w", encoding="utf-8", newline="") as file:
                for _, line in lines:
                    file.write(json.dumps(names.within(line), ensure_ascii=False) + "\n")


def load_classifier(path: Path) -> Rule | Student:
    """A rule or a student, by what its file says."""
    from qwen_scope.analysis import Rule, Student
    from qwen_scope.files import read_object

    return Student.load(path) if read_object(path).get("format") == "qwen-scope-student" else Rule.load(path)


def answered(
    loaded: Any,
    scope: Scope | None,
    corpus: Corpus,
    chat: Chat | None,
    report: Any,
    runner: Runner | None = None,
) -> Iterator[tuple[Document, dict[str, Any]]]:
    """Each document with its answer, in order; a rule has none for a conversation without `chat`."""
    from qwen_scope.text import windows

    done, together = 0, {} if runner is None else {"n": SPREAD}
    for documents in windows(corpus, **together, any_kind=scope is None or chat is not None):
        where = [
            {"source": d.source, "row": d.row, **({"id": d.meta["id"]} if "id" in d.meta else {})} for d in documents
        ]
        if scope is None:
            scores = loaded.scores([document.plain for document in documents])
            said = ({**w, "label": bool(s > 0), "score": float(s)} for w, s in zip(where, scores, strict=True))
            yield from zip(documents, said, strict=True)
        else:
            yield from zip(documents, label_window(loaded, scope, documents, where, chat, runner), strict=True)
        done += len(documents)
        report(done)
    if not done:
        raise InputError(f"there is no document to label in {corpus.name}{corpus.other_columns()}")


def label_window(
    rule: Rule,
    scope: Scope,
    documents: list[Document],
    where: list[dict[str, Any]],
    chat: Chat | None = None,
    runner: Runner | None = None,
) -> Iterator[dict[str, Any]]:
    """The answers of a rule, each with its evidence: feature, layer, position and token."""
    for place, answer in zip(where, answers_of(rule, scope, documents, chat, runner), strict=True):
        because = [
            {**asdict(evidence), "token": token} for evidence, token in zip(answer.because, answer.tokens, strict=True)
        ]
        yield {**place, "label": answer.label, "score": answer.score, "because": because}


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


def answers_of(
    rule: Rule, scope: Scope, documents: list[Document], chat: Chat | None, runner: Runner | None = None
) -> list[Answer]:
    """An answer per document, on the tokens that counted when the rule was fitted; negative where none does."""
    from qwen_scope.analysis import Answer, counted_by, features_of
    from qwen_scope.analysis import predict as run
    from qwen_scope.model import context_length
    from qwen_scope.scope import ExtractOptions
    from qwen_scope.text import Corpus

    check_rule(rule, scope)
    rows = [{**one.meta, "text": one.text} for one in documents]
    # A document is read up to the end of the model's context.
    how = ExtractOptions(counted=counted_by(rule), max_tokens=context_length(scope.model), chat=chat)
    read = scope.firings(Corpus(rows), rule.layers, how, features=features_of(rule), runner=runner)
    found = {answer.row: answer for answer in run(rule, read)}
    return [found.get(i) or Answer(i, False, 0.0, (), ()) for i in range(1, len(documents) + 1)]


@app.command()
@partial(grouped, without=["asked.counted"])
def distil(
    rule: Annotated[Path, typer.Argument(help="A rule of classify fit.")],
    source: Annotated[str, typer.Argument(metavar="CORPUS", help="Unlabelled documents, as extract reads them.")],
    student: Annotated[Path, typer.Option("--student", "-s", help="Where to write the student (JSON).")],
    truth: Annotated[
        str | None, typer.Option("--truth", help="A column with true labels (true/false or 1/0), to measure both.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the fifth that is held out.", **options.SEED)] = 0,
    reading: CorpusOptions = LINES,
    asked: ScopeOptions = SCOPE,
    as_json: options.Json = False,
) -> None:
    """Train a small model of the bare text on a rule's labels, for places where no language model runs.

    A fifth of the documents is held out: there the student is compared with the rule, and both with the truth.
    """
    from qwen_scope.analysis import Rule, as_truth
    from qwen_scope.analysis import distil as run
    from qwen_scope.files import check_output
    from qwen_scope.text import windows

    check_output(student, rule, *options.files(source), *options.folders_of(asked))
    loaded = Rule.load(rule)
    corpus = options.read(source, reading)
    scope = options.open_asked(asked)
    texts, labels, true = [], [], []
    with output.progress() as bar:
        for documents in windows(corpus, any_kind=reading.chat is not None):
            labels += [answer.label for answer in answers_of(loaded, scope, documents, reading.chat)]
            texts += [document.plain for document in documents]
            true += [as_truth(document, truth) for document in documents] if truth else []
            bar("labelling", corpus.progress or 0.0, f"{len(texts):,} documents")
    made, result = run(loaded.name, texts, labels, true if truth else None, seed=seed)
    made.save(student)
    show_result("Student", replace(result, data={**result.data, "student": str(student)}), None, as_json)
