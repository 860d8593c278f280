"""What a token in its text can be, in words: script, language, kind, place, or one of a few tokens.

A wording is a label that can be checked: `fits` says of every token of a text whether it is what the words say, so that
a label made without a model is tested as one that a model wrote.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

LANGUAGE, AFTER, NEXT = " in {} text", "after ", "; makes likely "
TYPICAL = "typical tokens: "
UNCLEAR = f"unclear; {TYPICAL}"
FEWEST_LETTERS, MOST_LETTERS, CLEARLY, APART = 8, 2, 1.5, 0.5

# The commonest words: a word counts as one divided by the languages here that use it.
WORDS = {
    "English": "the of and to is that it was for you with this are be have not what from they but"
    " in a as on by or at an were which he his has had their",
    "German": "der die das und ist nicht ein eine ich sie wir mit auf für den dem zu wie auch es"
    " von im am an sich wird werden dass sind war bei oder als in hat aus nach einem einer",
    "French": "le la les des et est une pas que vous nous dans pour qui sur ce il elle du au"
    " de en se un ou cette par plus son sa ses avec aux était",
    "Spanish": "el los las y es una que no por con para como pero su lo del está muy usted al"
    " de la en se un más o a e fue entre este esta sus cuando",
    "Italian": "il che di è non per una sono gli della come ma anche più questo nel si le con lo"
    " la un in a e i se dei delle alla da",
    "Portuguese": "o os as e não uma que do da em para com por mas como você são ao na se"
    " de a um dos das ou mais pela pelo este no",
    "Dutch": "de het een en van is niet dat ik je op te zijn met voor wij ook maar aan deze"
    " in was er over naar door uit bij worden of",
    "Polish": "nie się na jest to że jak z do co ale tak dla czy już od być po są przez w i a oraz które który",
    "Turkish": "bir ve bu için ne çok daha ile de da gibi ama var değil olan ben sen mi her en o olarak sonra kadar",
    "Vietnamese": "và là của không có được cho một này các với những người trong tôi đã khi từ ở đó năm ra vào",
}
# Letters that hardly any other of these languages has, each as much as half a word, at most `MOST_LETTERS` of a word.
LETTERS = {
    "Spanish": "ñ¿¡",
    "German": "ßäöü",
    "French": "çœèêàùû",
    "Portuguese": "ãõ",
    "Polish": "łżśćńęąź",
    "Turkish": "şğı",
}
_WORDS = {language: frozenset(words.split()) for language, words in WORDS.items()}
_USES = Counter(word for words in _WORDS.values() for word in words)
# A language or a group of them that a script tells, by its letters.
SCRIPTS = {
    "Japanese": r"[\u3040-\u30ff]",
    "Chinese": r"[\u4e00-\u9fff]",
    "Korean": r"[\uac00-\ud7af\u1100-\u11ff]",
    "Cyrillic": r"[\u0400-\u04ff]",
    "Arabic": r"[\u0600-\u06ff]",
    "Greek": r"[\u0370-\u03ff]",
    "Hebrew": r"[\u0590-\u05ff]",
    "Devanagari": r"[\u0900-\u097f]",
    "Thai": r"[\u0e00-\u0e7f]",
}
_SCRIPTS = {name: re.compile(letters) for name, letters in SCRIPTS.items()}

Fits = Callable[[Sequence[str]], list[bool]]


def each(test: Callable[[str], bool]) -> Fits:
    """What is said of a token by itself."""
    return lambda tokens: [test(token) for token in tokens]


def _matches(pattern: str) -> Fits:
    known = re.compile(pattern)
    return each(lambda token: known.fullmatch(token) is not None)


def _line_starts(tokens: Sequence[str]) -> list[bool]:
    """Behind a line break; a context begins somewhere, so its first token is none."""
    return [bool(i) and "\n" in tokens[i - 1] and "\n" not in token for i, token in enumerate(tokens)]


def _sentence_starts(tokens: Sequence[str]) -> list[bool]:
    ends = re.compile(r".*[.!?。！？؟]\s*", re.DOTALL)
    return [bool(i) and ends.fullmatch(tokens[i - 1]) is not None for i in range(len(tokens))]


def _sentence_ends(tokens: Sequence[str]) -> list[bool]:
    return [re.fullmatch(r"\s*[.!?。！？؟]+\s*", token) is not None for token in tokens]


def _pieces(tokens: Sequence[str]) -> list[bool]:
    """Letters that go on behind letters, without a space between."""
    return [
        bool(i) and token[:1].isalpha() and token[:1].isascii() and tokens[i - 1][-1:].isalpha()
        for i, token in enumerate(tokens)
    ]


def _repeated(tokens: Sequence[str]) -> list[bool]:
    seen: set[str] = set()
    out = []
    for token in tokens:
        word = token.strip()
        out.append(bool(word) and word in seen)
        seen.add(word)
    return out


KINDS: dict[str, Fits] = {
    "numbers": _matches(r"\s*\d+\s*"),
    "punctuation": _matches(r"\s*[^\w\s]+\s*"),
    "commas": _matches(r"\s*[,，、،]\s*"),
    "the end of a sentence": _sentence_ends,
    "question marks": _matches(r"\s*[?？؟]+\s*"),
    "exclamation marks": _matches(r"\s*[!！]+\s*"),
    "colons": _matches(r"\s*[:：]\s*"),
    "quotation marks": _matches(r"\s*[\"'“”„«»‘’「」]+\s*"),
    "brackets": _matches(r"\s*[()\[\]{}（）<>]+\s*"),
    "signs of arithmetic": _matches(r"\s*[+\-*/=×÷−%]+\s*"),
    "signs of code": _matches(
        r"\s*(?:[=!<>]=|[-=]>|[{}();_\[\]]+|def|return|import|class|function|if|for|else|print)\s*"
    ),
    "line breaks": _matches(r"[^\S\n]*\n\s*"),
    "white space": _matches(r"\s+"),
    "special tokens": _matches(r"\s*<\|?[^<>\s]+\|?>\s*"),
    "capitalised words": _matches(r"\s*[A-ZÀ-ÞА-Я][a-zà-ÿа-я]+"),
    "words in capitals": _matches(r"\s*[A-ZÀ-ÞА-Я]{2,}"),
    "single letters": _matches(r"\s*[^\W\d_]"),
    "later pieces of words": _pieces,
    "the first token of a line": _line_starts,
    "the first token of a sentence": _sentence_starts,
    "tokens that stood before": _repeated,
    "parts of characters": each(lambda token: "�" in token),
    **{f"{name} letters": each(lambda token, letters=letters: letters.search(token) is not None)
       for name, letters in _SCRIPTS.items()},
    "Latin letters": each(lambda token: re.search(r"[A-Za-zÀ-ÿ]", token) is not None),
}  # fmt: skip
LANGUAGES = (*WORDS, *SCRIPTS)


@lru_cache(maxsize=4096)
def language_of(text: str) -> str:
    """The language or script of a text as far as letters and its commonest words tell; "" where they don't."""
    found = {name: len(letters.findall(text)) for name, letters in _SCRIPTS.items()}
    latin = len(re.findall(r"[A-Za-zÀ-ÿ]", text))
    if found["Japanese"] and found["Japanese"] * 5 >= found["Chinese"]:
        found["Japanese"] += found["Chinese"]
        found["Chinese"] = 0
    name = max(found, key=lambda one: found[one])
    # a letter of a syllabary is about as much text as two or three of an alphabet
    if found[name] * 2 >= latin and found[name] > 0:
        return name
    if latin < FEWEST_LETTERS:
        return ""
    words = re.findall(r"[^\W\d_]+", text.casefold())
    counts = {language: sum(1 / _USES[word] for word in words if word in known) for language, known in _WORDS.items()}
    spelt = {*words, *(mark for mark in "¿¡" if mark in text)}  # each once: a string of umlauts is no German
    for language, letters in LETTERS.items():
        counts[language] += sum(min(MOST_LETTERS, sum(map(word.count, letters))) for word in spelt) / 2
    first, second = sorted(counts.values(), reverse=True)[:2]
    best = max(counts, key=lambda one: counts[one])
    return best if first >= CLEARLY and first - second >= APART else ""


def tokens_in_words(tokens: Iterable[str]) -> str:
    """Tokens as a label lists them."""
    return ", ".join(json.dumps(token, ensure_ascii=False) for token in tokens)


def in_language(kind: str, language: str) -> str:
    """A kind of token in texts of one language; "" for any token."""
    return (kind + LANGUAGE.format(language)) if kind else f"{language} text"


def fits(label: str, tokens: Sequence[str]) -> list[bool]:
    """Of every token of a text whether it is what a label says; none where its words are not known."""
    known = _parsed(label)
    if known is None:
        return [False] * len(tokens)
    test, language = known
    if language and language_of("".join(tokens)) != language:
        return [False] * len(tokens)
    return test(tokens) if test else [True] * len(tokens)


@lru_cache(maxsize=512)
def _parsed(label: str) -> tuple[Fits | None, str] | None:
    """The test of tokens and the language that a label asks for; None for words of another kind."""
    said = label.split(NEXT)[0]
    for language in LANGUAGES:
        if said == f"{language} text":
            return None, language
        ending = LANGUAGE.format(language)
        if said.endswith(ending):
            test = _kind(said.removesuffix(ending))
            return None if test is None else (test, language)
    test = _kind(said)
    return None if test is None else (test, "")


def _kind(said: str) -> Fits | None:
    if said in KINDS:
        return KINDS[said]
    behind = said.startswith(AFTER)
    try:
        listed = json.loads(f"[{said.removeprefix(UNCLEAR).removeprefix(TYPICAL).removeprefix(AFTER)}]")
    except ValueError:
        return None
    if not listed or not all(isinstance(one, str) for one in listed):
        return None
    words = frozenset(listed)
    if behind:
        return lambda tokens: [bool(i) and tokens[i - 1] in words for i in range(len(tokens))]
    return each(lambda token: token in words)
