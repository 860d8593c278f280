"""Benchmarks of the lab: multiple choice, of different size, breadth and built-in redundancy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np

from qwen_scope.errors import InputError
from qwen_scope.files import write_text
from qwen_scope.lab import LANGUAGES, REGISTERS, Document, documents

SPACED = ("ru", "ar", "en", "fr", "de", "es")
CHOICES = 4


@dataclass(frozen=True)
class Item:
    """One question: which of the choices goes on after the prompt? The first is right."""

    id: str
    prompt: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark is made of.

    Attributes:
        name: what tables call it.
        task: one of `TASKS`.
        n: items.
        pool: at most this many different prompts; the rest asks them again with other wrong choices. Few prompts for
            many items is redundancy built in.
        languages, registers: those that occur, in equal shares.
        seed: of everything drawn.
    """

    name: str
    task: str
    n: int
    pool: int
    languages: tuple[str, ...] = LANGUAGES
    registers: tuple[str, ...] = REGISTERS
    seed: int = 0


Question = tuple[str, str, list[str]]  # prompt, right choice, wrong choices to draw from


def items(benchmark: Benchmark) -> list[Item]:
    """The items of a benchmark.

    Raises:
        InputError: more different prompts than items, or a task that does not exist.
    """
    if benchmark.task not in TASKS or not 1 <= benchmark.pool <= benchmark.n:
        raise InputError(f"the benchmark {benchmark.name!r} needs a task of {', '.join(TASKS)} and pool <= n")
    rng = np.random.default_rng([benchmark.seed, benchmark.n, benchmark.pool])
    questions: list[Question] = []
    for question in TASKS[benchmark.task](benchmark, rng):
        if len(set(question[2]) - {question[1]}) >= CHOICES - 1:
            questions.append(question)
        if len(questions) == benchmark.pool:
            break
    made = []
    for i in range(benchmark.n):
        prompt, right, wrong = questions[i % len(questions)]
        others = sorted(set(wrong) - {right})
        chosen = [others[j] for j in rng.choice(len(others), CHOICES - 1, replace=False)]
        made.append(Item(f"{benchmark.name}-{i}", prompt, (right, *chosen)))
    return made


def talks(benchmark: Benchmark, kind: str = "talk") -> Iterator[Document]:
    """Documents without end, the languages and registers of the benchmark in turn, on held-out sentences."""
    streams = [
        documents("heldout_sentences", benchmark.seed + 900, None, [kind], [language], [register])
        for language in benchmark.languages
        for register in benchmark.registers
    ]
    while True:
        for stream in streams:
            yield next(stream)


@cache
def sentences(language: str, register: str, seed: int, n: int = 30) -> list[str]:
    """Continuations in one language and register, each with the space before it."""
    found = documents("heldout_sentences", seed + 901, n, ["talk"], [language], [register])
    return [d.text[d.spans[1].end : d.spans[2].end] for d in found if len(d.spans) > 2]


def language_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """Go on in the same language."""
    cache: dict[str, list[str]] = {}
    for d in talks(benchmark):
        key = str(d.register)
        cache.setdefault(key, [])
        if not cache[key]:
            cache[key] = [s for other in LANGUAGES for s in sentences(other, key, benchmark.seed, 6)]
        own = set(sentences(str(d.language), key, benchmark.seed, 6))
        yield prompt_of(d), continuation(d), [s for s in cache[key] if s not in own]


def register_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """Go on in the same register."""
    cache: dict[tuple[str, str], list[str]] = {}
    for d in talks(benchmark):
        for other in REGISTERS:
            if (str(d.language), other) not in cache:
                cache[str(d.language), other] = sentences(str(d.language), other, benchmark.seed)
        wrong = [s for other in REGISTERS if other != d.register for s in cache[str(d.language), other]]
        yield prompt_of(d), continuation(d), wrong


def order_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """Words in their order, against two of them swapped."""
    for d in talks(benchmark):
        right = continuation(d)
        words = right.split(" ")
        swapped = []
        for i in range(1, len(words) - 1):
            other = list(words)
            other[i], other[i + 1] = other[i + 1], other[i]
            swapped.append(" ".join(other))
        yield prompt_of(d), right, swapped


def topic_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """Answer about what was asked."""
    answers: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for d in talks(benchmark, "chat"):
        slot, _, key = d.factors.get("topic", "").partition(":")
        said = [s for s in d.spans if s.factors.get("role") == "assistant"]
        fitting = [s for s in said if s.factors.get(f"slot.{slot}") == key]
        if not key or not fitting or d.factors["answer_language"] != d.language:
            continue
        place = (str(d.language), str(d.register))
        first = fitting[0]
        right = d.text[first.start : first.end]
        wrong = [text for about, text in answers.get(place, []) if about != key]
        answers.setdefault(place, []).append((key, right))
        yield d.text[: said[0].start], right, wrong


def refrain_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """Say again what has been said in turn."""
    for d in talks(benchmark):
        if len(d.spans) < 3:
            continue
        a, b = (d.text[s.start : s.end] for s in d.spans[:2])
        gap = d.text[d.spans[0].end : d.spans[1].start]
        yield gap.join((a, b, a, b, a)), gap + b, sentences(str(d.language), str(d.register), benchmark.seed)


def sum_task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
    """The result of a sum, after a few others."""
    for d in documents("heldout_sentences", benchmark.seed + 902, None, ["arithmetic"]):
        span = d.spans[int(rng.integers(min(4, len(d.spans))))]
        result = span.factors["result"]
        if not d.text[: span.end].endswith(result):
            continue
        value = int(result)
        near = [str(value + step) for step in (-11, -10, -2, -1, 1, 2, 10, 11)]
        yield d.text[: span.end - len(result)], result, near


def line_task(kind: str) -> Callable[[Benchmark, np.random.Generator], Iterator[Question]]:
    """The next line of real text, against lines from elsewhere."""

    def task(benchmark: Benchmark, rng: np.random.Generator) -> Iterator[Question]:
        stream = documents("heldout_sentences", benchmark.seed + 903, None, [kind])
        others = [line for _, d in zip(range(40), stream, strict=False) for line in d.text.split("\n")[8:10]]
        others = [line + "\n" for line in others if line.strip()]
        for d in stream:
            lines = d.text.split("\n")
            if len(lines) < 9:
                continue
            at = int(rng.integers(3, 8))
            start = int(rng.integers(0, len(lines) - at))
            right = lines[start + at] + "\n"
            if right.strip():
                yield "\n".join(lines[start : start + at]) + "\n", right, others

    return task


def prompt_of(d: Document) -> str:
    """The first two sentences of a talk."""
    return d.text[: d.spans[1].end]


def continuation(d: Document) -> str:
    """The third sentence of a talk, with what stands before it."""
    return d.text[d.spans[1].end : d.spans[2].end]


TASKS: dict[str, Callable[[Benchmark, np.random.Generator], Iterator[Question]]] = {
    "language": language_task,
    "register": register_task,
    "order": order_task,
    "topic": topic_task,
    "refrain": refrain_task,
    "sum": sum_task,
    "code": line_task("code"),
    "prose": line_task("prose"),
}

# Sizes differ by a factor of 25, those of the report's benchmarks by more than 100.
BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark("language", "language", 600, 600),
    Benchmark("language-repeat", "language", 400, 40, seed=1),
    Benchmark("register", "register", 1000, 1000),
    Benchmark("register-de", "register", 60, 60, ("de",), seed=1),
    Benchmark("register-repeat", "register", 300, 15, seed=2),
    Benchmark("order", "order", 700, 700, SPACED),
    Benchmark("order-en", "order", 50, 50, ("en",), seed=1),
    Benchmark("order-repeat", "order", 250, 10, ("fr", "es"), ("plain",), seed=2),
    Benchmark("topic", "topic", 300, 300),
    Benchmark("topic-en", "topic", 40, 40, ("en",), seed=1),
    Benchmark("refrain", "refrain", 120, 120),
    Benchmark("sum", "sum", 500, 500),
    Benchmark("sum-repeat", "sum", 120, 6, seed=1),
    Benchmark("code", "code", 150, 150),
    Benchmark("prose", "prose", 40, 40),
)


def write_items(found: list[Item], path: Path) -> None:
    """Items as JSON lines: `id`, `text` (the prompt, which extract reads), `choices` with the right one first."""
    lines = [json.dumps({"id": i.id, "text": i.prompt, "choices": i.choices}, ensure_ascii=False) for i in found]
    write_text(path, "\n".join(lines) + "\n")


def described(benchmark: Benchmark) -> dict[str, object]:
    """A benchmark as plain data."""
    return asdict(benchmark)
