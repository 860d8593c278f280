"""The lab's talk as documents of two classes in several languages."""

from __future__ import annotations

from qwen_scope.errors import InputError, NotFoundError, check_count, nearest

from .corpus import Corpus


def lab_corpus(column: str, value: str, group: str = "language", each: int = 60, seed: int = 0) -> Corpus:
    """Talk of the lab in every language: a number of documents of one register, and as many of the others together.

    Args:
        column, value: the class; the lab has registers.
        group: the column of the groups; the lab's are languages.
        each: documents of each class and language.

    Raises:
        InputError: another class or another group.   NotFoundError: no such register.
    """
    from qwen_scope.lab import LANGUAGES, REGISTERS, documents

    check_count("each", each)
    if (column, group) != ("register", "language"):
        raise InputError(
            f"the lab has registers in languages: --positive register=rude, not {column}={value} in {group}"
        )
    if value not in REGISTERS:
        raise NotFoundError(f"the lab has no register {value!r}; {nearest(value, REGISTERS)}")
    others = tuple(register for register in REGISTERS if register != value)
    rows = [
        {"text": d.text, "language": d.language, "register": d.register}
        for language in LANGUAGES
        for registers in ((value,), others)
        for d in documents("train", seed, each, ["talk"], [language], registers)
    ]
    return Corpus(rows, name=f"lab:{value}:{each}:{seed}")
