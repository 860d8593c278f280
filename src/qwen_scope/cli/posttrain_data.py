"""What the commands of `posttrain` read: samples to learn from, prompts, and texts to watch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError

from . import options

if TYPE_CHECKING:
    from collections import Counter

    from qwen_scope.posttrain import Row, Sample

PROBES = 64
"""At most so many texts, and so many prompts, are measured by the monitor."""


def given_files(*sources: str | Path | None) -> list[str | Path]:
    """What is read of this machine's files, of sources that may also be the lab or left out."""
    return [source for source in sources if source is not None and source != "lab"]


def check_run(out: Path, model: str, sae: str | None, *sources: str | Path | None) -> None:
    """Refuse a folder of a run in which it would write over what it reads."""
    from qwen_scope.files import check_folder
    from qwen_scope.posttrain import WRITTEN

    check_folder(out, WRITTEN, *given_files(*sources), *options.folders(model, sae))


def training_samples(
    corpus: str,
    column: str,
    prompt_column: str,
    group_column: str,
    n: int | None,
    seed: int,
    unused: Counter[str] | None = None,
) -> list[Sample]:
    """Rows to learn from; of the lab its chats, those that drift into another language among them."""
    from qwen_scope.posttrain import chats_only, read_samples

    found = read_samples(
        corpus,
        column=column,
        prompt_column=prompt_column,
        group_column=group_column,
        n=n,
        seed=seed,
        kinds=["chat", "drift"],
        unused=unused,
    )
    return chats_only(found) if corpus == "lab" else found


def read_rows(
    source: str,
    prompt_column: str,
    answer_column: str | None,
    n: int,
    seed: int,
    *,
    held_out: bool = False,
    unused: Counter[str] | None = None,
) -> list[Row]:
    """Prompts of a file with their answers, or of the lab: questions and sums, with what its reward asks for."""
    from collections import Counter

    from qwen_scope.corpus import Corpus, Document, by_reason
    from qwen_scope.posttrain import PassOver, lab_rows, only_text, usable

    if source == "lab":
        return lab_rows(n, seed, split="heldout_sentences" if held_out else "train")
    lacking = f"without the column {answer_column!r}"

    def row_of(found: Document) -> Row:
        row = {"prompt": only_text(found)}
        if answer_column is None:
            return row
        if found.meta.get(answer_column) is None:
            raise PassOver(lacking)
        return {**row, "answer": str(found.meta[answer_column])}

    counts: Counter[str] = Counter() if unused is None else unused
    corpus = Corpus(source, column=prompt_column, unit="line", seed=seed)
    rows = usable(corpus, row_of, n, counts)
    if not rows and counts[lacking]:
        raise InputError(f"no row of {source} has a column {answer_column!r}; name it with --answer-column")
    if len(rows) < 2:
        why = corpus.other_columns("prompt_column") or f" in a column {prompt_column!r}; two are the least"
        raise InputError(f"{source} has {len(rows)} prompts{why}" + (f" ({by_reason(counts)})" if counts else ""))
    return rows


def probe_texts(source: str) -> list[str]:
    """Texts to measure features on: those of a file, or held-out chats of the lab."""
    from qwen_scope.corpus import Corpus
    from qwen_scope.lab import documents
    from qwen_scope.posttrain import only_text, usable

    if source == "lab":
        return [found.text for found in documents(split="heldout_sentences", seed=2, n=PROBES, kinds=["chat"])]
    found = usable(Corpus(source, unit="line", sample=PROBES), only_text)
    if len(found) < 2:
        raise InputError(
            f"--monitor needs at least two texts; {source} has {len(found)} in lines or in a column 'text'"
        )
    return found
