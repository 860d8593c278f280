"""Sets of documents as commands name them: a source of documents, or conditions on a store's metadata."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from qwen_scope.errors import InputError

from . import options

if TYPE_CHECKING:
    import numpy as np

    from qwen_scope.store import FeatureStore
    from qwen_scope.text import CorpusOptions


def documents_of(store: FeatureStore, text: str) -> np.ndarray:
    """The documents of a store that meet conditions on their metadata.

    Raises:
        InputError: none does, or text that states no conditions.
    """
    from qwen_scope.text import conditions

    found = store.where(*conditions(text))
    if not len(found):
        raise InputError(f"no document of {store.folder} has {text}")
    return found


def texts_of(source: str, n: int, reading: CorpusOptions) -> list[str | list[dict[str, Any]]]:
    """The texts of a source, and its conversations where they are read with a chat template; `n` of the lab.

    Raises:
        InputError: nothing of that kind.   NotFoundError: no such file, dataset or factor.
    """
    from collections import Counter

    from qwen_scope.text import as_read, by_reason, usable

    corpus, unused = options.read(source, reading, n), Counter[str]()
    found = usable(corpus, partial(as_read, chat=reading.chat), unused=unused)
    if not found:
        why = f" ({by_reason(unused)})" if unused else ""
        raise InputError(f"{source} holds no text{why}{corpus.other_columns()}")
    return found
