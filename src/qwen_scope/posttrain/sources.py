"""What runs of post-training read: samples to learn from, prompts, and texts to watch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwen_scope.errors import InputError
from qwen_scope.files import check_folder
from qwen_scope.lab import chat_prompts, documents
from qwen_scope.model import load_tokenizer
from qwen_scope.scope import model_source
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus, CorpusOptions, Document, PassOver, by_reason, is_lab, only_text, usable

from .options import WRITTEN
from .rewards import lab_rows
from .samples import Row, Sample, chats_only, prompt_text, read_samples, responses, with_chat

PROBES = 64
"""At most this many texts, and this many prompts, are measured by the monitor."""

LAB_DOCUMENTS = 1000
"""Of the lab, which has no end, where no sample is asked for."""


SEEDS = 200
"""Of the lab, where it is a corpus to complete."""


def given_files(*sources: str | Path | None) -> list[str | Path]:
    """Of sources that may also be the lab or left out those that are files."""
    return [source for source in sources if source is not None and source != "lab"]


def local(*names: str | None) -> list[str]:
    """Of names of models and SAEs those that are folders of this machine; a bare name is one of the catalog."""
    return [name for name in names if name is not None and ("/" in name or os.sep in name)]


def check_run(out: Path, model: str, sae: str | None, *sources: str | Path | None) -> None:
    """Refuse a folder of a run in which it would write over what it reads."""
    check_folder(out, WRITTEN, *given_files(*sources), *local(model, sae))


def read(source: str, reading: CorpusOptions, lab: int = LAB_DOCUMENTS) -> Corpus:
    """The documents of a source; of the lab `lab` where no sample is asked for."""
    if is_lab(source) and reading.sample is None:
        reading = replace(reading, sample=lab)
    return Corpus.of(source, reading)


def seed_corpus(source: str, reading: CorpusOptions) -> Corpus | FeatureStore:
    """A corpus to complete, or its store; of the lab two hundred documents."""
    if (Path(source) / "manifest.json").is_file():
        return FeatureStore(source)
    return read(source, reading, SEEDS)


def training_samples(
    source: str,
    reading: CorpusOptions,
    prompt_column: str,
    group_column: str,
    model: str | None = None,
    unused: Counter[str] | None = None,
) -> list[Sample]:
    """Rows to learn from; of the lab its chats, those that drift into another language among them.

    Args:
        model: whose chat template they are written with, where `reading` asks for one.
    """
    found = samples_of(
        source, reading, group_column, prompt_column=prompt_column, kinds=["chat", "drift"], unused=unused
    )
    if source == "lab":  # which are written as the model reads them
        return chats_only(found)
    if reading.chat is None or model is None:
        return found
    return with_chat(found, load_tokenizer(model_source(model)), reading.chat)


def prompts_in(model: str, reading: CorpusOptions) -> Callable[[Document], str]:
    """What reads the prompt in a row, up to where the answer begins: its text, or with a chat template what the model's
    makes of the text or the conversation."""
    chat = reading.chat
    if chat is None:
        return only_text
    tokenizer = load_tokenizer(model_source(model))

    def read(found: Document) -> str:
        if not isinstance(found.text, str) and found.text[-1]["role"] == "assistant":
            raise PassOver("a conversation that is answered, not a prompt")
        return prompt_text(tokenizer, found.text, chat)

    return read


def labelled_texts(source: str, reading: CorpusOptions, group_column: str) -> list[tuple[str, str]]:
    """Texts with the name of their group; of the lab its talk, by language."""
    return responses(samples_of(source, reading, group_column, kinds=["talk"]))


def samples_of(source: str, reading: CorpusOptions, group_column: str, **more: Any) -> list[Sample]:
    """Samples of a source read with the options; `more` goes to `read_samples`."""
    return read_samples(
        source,
        column=reading.column,
        group_column=group_column,
        n=reading.sample,
        seed=reading.seed,
        split=reading.split,
        unit=reading.unit,
        subset=reading.subset,
        template=reading.template,
        **more,
    )


def read_rows(
    source: str,
    reading: CorpusOptions,
    answer_column: str | None,
    n: int,
    model: str,
    *,
    held_out: bool = False,
    unused: Counter[str] | None = None,
) -> list[Row]:
    """Prompts of a source with their answers, or of the lab: questions and sums, with what its reward asks for."""
    if source == "lab":
        return lab_rows(reading.sample or n, reading.seed, split="heldout_sentences" if held_out else reading.split)
    lacking, prompt_of = f"without the column {answer_column!r}", prompts_in(model, reading)

    def row_of(found: Document) -> Row:
        row: dict[str, Any] = {"prompt": prompt_of(found)}
        if answer_column is None:
            return row
        if found.meta.get(answer_column) is None:
            raise PassOver(lacking)
        return {**row, "answer": str(found.meta[answer_column])}

    counts: Counter[str] = Counter() if unused is None else unused
    corpus = read(source, reading)
    rows = usable(corpus, row_of, n, counts)
    if not rows and counts[lacking]:
        raise InputError(f"no row of {source} has a column {answer_column!r}; name it with answer_column=")
    if len(rows) < 2:
        why = corpus.other_columns() or f" in a column {reading.column!r}; two are the least"
        raise InputError(f"{source} has {len(rows)} prompts{why}" + (f" ({by_reason(counts)})" if counts else ""))
    return rows


def read_prompts(
    source: str, reading: CorpusOptions, group_column: str, groups: Sequence[str] | None, n: int | None, model: str
) -> list[str]:
    """The prompts of a source, or questions of the lab."""
    if source == "lab":
        asked = chat_prompts(
            seed=reading.seed,
            n=reading.sample or n or 100,
            languages=None if groups is None else list(groups),
            split=reading.split,
        )
        return [prompt.text for prompt in asked]
    corpus, prompt_of = read(source, reading), prompts_in(model, reading)
    found = usable(
        corpus, lambda row: prompt_of(row) if groups is None or row.meta.get(group_column) in groups else None, n
    )
    if not found:
        where = corpus.other_columns("prompt_column") or f" in a column {reading.column!r}"
        raise InputError(f"{source} has no prompt" + (" of these groups" if groups else "") + where)
    return found


def probe_texts(source: str) -> list[str]:
    """Texts to measure features on: those of a source, or held-out chats of the lab."""
    if source == "lab":
        return [found.text for found in documents(split="heldout_sentences", seed=2, n=PROBES, kinds=["chat"])]
    found = usable(Corpus(source, unit="line", sample=PROBES), only_text)
    if len(found) < 2:
        raise InputError(f"monitor= needs at least two texts; {source} has {len(found)} in lines or in a column 'text'")
    return found
