"""Sets of documents as commands name them: a file, `lab:` with factors, or conditions on a store's metadata."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError

if TYPE_CHECKING:
    import numpy as np

    from qwen_scope.corpus import FeatureStore

LAB = "lab:"
FACTORS = ("kind", "language", "register")


def conditions(text: str) -> list[tuple[str, str, bool]]:
    """`language=de,register!=rude` as (column, value, equal).

    Raises:
        InputError: anything else.
    """
    out = []
    for part in text.split(","):
        column, sign, value = part.partition("=")
        if not sign or not column.strip("! "):
            raise InputError(f"{part!r} is no condition on metadata; write column=value or column!=value")
        out.append((column.strip().removesuffix("!").strip(), value.strip(), not column.rstrip().endswith("!")))
    return out


def documents_of(store: FeatureStore, text: str) -> np.ndarray:
    """The documents of a store that meet conditions on their metadata.

    Raises:
        InputError: none does.
    """
    found = store.where(*conditions(text))
    if not len(found):
        raise InputError(f"no document of {store.folder} has {text}")
    return found


def texts_of(text: str, n: int, column: str = "text", seed: int = 0) -> list[str]:
    """The texts of a file, or `n` texts of the lab with the factors named, such as `lab:language=de,register=rude`.

    Raises:
        InputError: a conversation where texts are needed, or no text.   NotFoundError: no such file or factor.
    """
    if text.startswith(LAB):
        return lab_texts(text.removeprefix(LAB), n, seed)
    from qwen_scope.corpus import Corpus

    # In a .txt file a document is a line: sets of examples are short texts.
    corpus = Corpus(Path(text), column=column, unit="line")
    found = [document.text for document in corpus]
    texts = [one for one in found if isinstance(one, str)]
    if len(texts) < len(found) or not texts:
        raise InputError(
            f"{text} holds {len(found) - len(texts)} conversations and {len(texts)} texts"
            + (corpus.other_columns() or "; texts are needed")
        )
    return texts


def lab_texts(text: str, n: int, seed: int) -> list[str]:
    """`n` documents of the lab with some factors."""
    from qwen_scope.lab import KINDS, LANGUAGES, REGISTERS, documents

    known = dict(zip(FACTORS, (KINDS, LANGUAGES, REGISTERS), strict=True))
    chosen: dict[str, list[str]] = {}
    for name, value, equal in conditions(text):
        if name not in known:
            raise InputError(f"the lab's factors are {', '.join(known)}, not {name!r}")
        held = chosen.get(name, list(known[name]))
        if value not in known[name]:
            raise InputError(f"a {name} of the lab is one of {', '.join(known[name])}, not {value!r}")
        chosen[name] = [one for one in held if (one == value) is equal]
    if "kind" not in chosen and chosen:
        chosen["kind"] = ["talk"]
    return [
        document.text
        for document in documents(
            seed=seed,
            n=n,
            kinds=chosen.get("kind"),
            languages=chosen.get("language"),
            registers=chosen.get("register"),
        )
    ]
