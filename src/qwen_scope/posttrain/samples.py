"""Labelled samples: texts, prompts with completions, or chats, each with the name of its group."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from qwen_scope import lab
from qwen_scope.errors import InputError, check_count
from qwen_scope.text import (
    Chat,
    Corpus,
    CorpusOptions,
    Message,
    PassOver,
    by_reason,
    is_lab,
    render,
    start_ids,
    tell_unused,
    usable,
)

if TYPE_CHECKING:
    from datasets import Dataset

Sample = dict[str, Any]
"""`{"text"}`, or `{"prompt", "completion"}` (strings, or lists of messages), and `"group"`, a name or None."""

Row = dict[str, Any]
"""A prompt as the model reads it (or its messages) in `prompt`, and the columns that the reward asks for."""

ANSWER = "</think>\n\n"
END = "<|im_end|>"


def read_samples(
    source: str | os.PathLike[str],
    *,
    column: str = "text",
    prompt_column: str = "prompt",
    group_column: str = "group",
    n: int | None = None,
    seed: int = 0,
    split: str = "train",
    unit: str = "paragraph",
    subset: str | None = None,
    template: str | None = None,
    kinds: Iterable[str] | None = None,
    unused: Counter[str] | None = None,
) -> list[Sample]:
    """The samples of a corpus, or of the lab; rows that can't be used are passed over, and a warning says how many.

    Where any row has a prompt, those without one can't be used.

    Args:
        source: whatever `Corpus` reads, or `lab`.
        column: the text, the completion to a prompt, or a list of messages that ends with the assistant's.
        prompt_column: the prompt, where rows have one.
        group_column: the name of the group; a row without it has none. In the lab it is the language.
        n: at most this many, drawn evenly; of the lab 1,000 where it is None.
        seed, split: of the draw, and of the lab or a dataset.
        unit, subset, template: of a `.txt` file, a dataset and a table, as `Corpus` takes them.
        kinds: of the lab's documents; with conditions behind `lab:` those it names, if it names any.
        unused: gets the rows that can't be used added, by reason.

    Raises:
        InputError: no sample, none with a group, or an `n` below 1.   NotFoundError, FormatError: as `Corpus`.
    """
    if n is not None:
        check_count("n", n)
    check_count("seed", seed, 0)
    if os.fspath(source) == "lab":
        return lab_samples(lab.documents(split=split, seed=seed, n=1000 if n is None else n, kinds=kinds))
    n = 1000 if n is None and is_lab(source) else n
    asked = CorpusOptions(column, unit, n, seed, split, subset, template=template)
    corpus = Corpus.of(source, asked)
    counts: Counter[str] = Counter() if unused is None else unused
    samples = usable(
        corpus,
        lambda found: sample_of(found.text, found.meta.get(prompt_column), found.meta.get(group_column)),
        unused=counts,
    )
    if any("prompt" in sample for sample in samples):
        whole = len(samples)
        samples = chats_only(samples)
        if whole > len(samples):
            lacking = Counter({f"without a prompt in {prompt_column!r}": whole - len(samples)})
            tell_unused(lacking, whole, str(source))
            counts.update(lacking)
    if not samples:
        why = corpus.other_columns() or f": no text in {column!r}"
        raise InputError(
            f"there is no row to learn from in {source}{why}" + (f" ({by_reason(counts)})" if counts else "")
        )
    if all(sample["group"] is None for sample in samples):
        raise InputError(f"no row of {source} has a column {group_column!r} that names its group")
    return samples


def sample_of(text: str | list[dict[str, str]], prompt: Any, group: Any) -> Sample:
    """One row as TRL takes it.

    Raises:
        PassOver: it can't be learnt from.
    """
    named = None if group is None else str(group)
    if isinstance(prompt, str):
        if not prompt:
            raise PassOver("with an empty prompt")
        return {"prompt": prompt, "completion": text, "group": named}
    if isinstance(text, str):
        return {"text": text, "group": named}
    if len(text) < 2 or text[-1]["role"] != "assistant":
        raise PassOver("a conversation to learn from ends with a message of the assistant, after another message")
    return {"prompt": text[:-1], "completion": text[-1:], "group": named}


def lab_samples(documents: Iterable[lab.Document]) -> list[Sample]:
    """Documents of the lab: chats as prompt and answer, everything else as text; the group is the right language.

    For a chat that is the language its answer should be in, also where the answer drifts into another.
    """
    out: list[Sample] = []
    for found in documents:
        group = found.factors.get("answer_language", found.language)
        prompt, mark, answer = found.text.rpartition(ANSWER)
        if mark and answer.rstrip().endswith(END):
            out.append({"prompt": prompt + mark, "completion": answer.rstrip(), "group": group})
        else:
            out.append({"text": found.text, "group": group})
    return out


def chats_only(samples: Iterable[Sample]) -> list[Sample]:
    """The samples that have a prompt."""
    return [sample for sample in samples if "prompt" in sample]


def with_chat(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[Sample]:
    """Samples whose prompt and completion are the strings that the chat template makes of them; plain texts stay.

    Raises:
        InputError: a template that writes the prompt differently once it is answered.
    """
    return [_templated(sample, tokenizer, chat) if "prompt" in sample else sample for sample in samples]


def _templated(sample: Sample, tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Sample:
    asked, answer = sample["prompt"], sample["completion"]
    messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    answered = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    prompt = prompt_text(tokenizer, messages, chat)
    whole = prompt_text(tokenizer, [*messages, *answered], chat)
    # A template may write an empty thinking block for a prompt alone.
    start = next((one for one in (prompt, prompt_text(tokenizer, messages, "default")) if whole.startswith(one)), None)
    if start is None:
        raise InputError(
            "the chat template writes a prompt differently once it is answered; read it without a template"
        )
    return {**sample, "prompt": prompt, "completion": whole.removeprefix(start).rstrip()}


def prompt_text(tokenizer: PreTrainedTokenizerBase, document: str | Sequence[Message], chat: Chat) -> str:
    """A text or a conversation as the chat template writes it, to be tokenised like any text: the template's BOS is
    left out where the tokenizer adds one."""
    text = render(tokenizer, document, chat).text
    return text.removeprefix(str(tokenizer.bos_token)) if start_ids(tokenizer) else text


def responses(samples: Iterable[Sample]) -> list[tuple[str, str]]:
    """Of every sample with a group, the group and the text that is learnt."""
    out = []
    for sample in samples:
        text = sample.get("text", sample.get("completion"))
        if sample["group"] is not None and text:
            out.append((sample["group"], text if isinstance(text, str) else text[-1]["content"]))
    return out


def as_text(sample: Sample, tokenizer: Any) -> tuple[str, str]:
    """What is read before the part that is learnt, to be tokenised like any text, and that part; nothing is read of a
    text."""
    if "text" in sample:
        return "", sample["text"]
    prompt, completion = sample["prompt"], sample["completion"]
    if isinstance(prompt, str):
        return prompt, completion
    return prompt_text(tokenizer, prompt, "default"), completion[-1]["content"]


def dataset_of(samples: list[Sample]) -> Dataset:
    """The samples as TRL's trainers take them.

    Raises:
        InputError: no sample, or plain texts and prompts with completions in one list.
    """
    if not samples:
        raise InputError("there is no sample to learn from or to measure on")
    kinds = {tuple(sorted(sample)) for sample in samples}
    if len(kinds) != 1:
        raise InputError("training data is either all texts or all prompts with completions; this has both")
    from datasets import Dataset

    return Dataset.from_list(samples)
