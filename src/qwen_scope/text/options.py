"""`CorpusOptions`: how documents are read, the same for everything that reads them; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from string import Formatter
from typing import Literal, get_args

from qwen_scope.errors import InputError, brief, check_count

UNITS = ("paragraph", "line", "file")
Chat = Literal["default", "thinking", "non_thinking"]
CHATS: tuple[Chat, ...] = get_args(Chat)
PART_ROWS = 2
"""About how many rows of English are read of a long text before others have their turn."""


@dataclass(frozen=True)
class CorpusOptions:
    """How to read documents, wherever they are; `Corpus.of` opens a source with them.

    Attributes:
        column: the column that holds the text: a string or a list of messages.
        template: make the text of several columns instead, such as "{question}\\n{answer}"; a row that lacks one of
            them, or holds nothing there, can't be used. Braces are written twice. All columns stay in the metadata.
        unit: what one document of a `.txt` file is: a `paragraph` (up to a blank line), a `line`, or the `file`.
        sample: only this many rows, drawn evenly from all of them, in their order; of the lab the first ones.
        seed: of the sample, and of the lab's documents.
        split: of a dataset, a dictionary of splits, or the lab.
        subset: of a dataset of the Hub.
        chat: render documents with the tokenizer's chat template, in this mode: a conversation as it is, a plain text
            as one user message. With None a conversation can't be used.

    Raises:
        InputError: a unit or a mode of the chat template that there is not, or a sample without a row.
    """

    column: str = "text"
    unit: str = "paragraph"
    sample: int | None = None
    seed: int = 0
    split: str = "train"
    subset: str | None = None
    chat: Chat | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        if self.template is not None:
            template_columns(self.template)
            if self.column != "text":
                raise InputError("a template names the columns itself; leave column= out")
        if self.unit not in UNITS:
            raise InputError(f"a document of a text file is one of {', '.join(UNITS)}, not {self.unit!r}")
        if self.sample is not None:
            check_count("sample", self.sample, 0)
            if not self.sample:
                raise InputError(f"a sample has at least one row, not {self.sample}")
        if self.chat is not None and self.chat not in CHATS:
            raise InputError(f"chat is one of {', '.join(CHATS)}, not {self.chat!r}")


def template_columns(template: str) -> list[str]:
    """The columns that a template joins, in its order.

    Raises:
        InputError: braces that don't match, or a template without a column.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise InputError(
            f"the template {brief(template)} can't be read ({error}); write columns in braces, and {{{{ for a brace"
        ) from None
    names = [name for _, name, _, _ in parts if name is not None]
    if not names or any(not name or shape or turned for _, name, shape, turned in parts if name is not None):
        raise InputError(
            f"the template {brief(template)} names no column, or more than its name in braces;"
            " write one such as {question}\\n{answer}"
        )
    return names


def longest_text(context_length: int) -> int:
    """Characters above which a text is cut (`Corpus(longest=)`) for mixed rows of so many tokens: a book read in one go
    would be all that hundreds of steps see."""
    return 4 * PART_ROWS * context_length
