"""Answers of one model to some prompts in many cases at once, which a vector added to the stream tells apart.

A chat model gets the prompts through its template. A base model gets each as a question with an answer to be written
(`asked`), is asked for a language by worked examples before it, and its answer ends where it writes the next question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from qwen_scope import Scope
from qwen_scope.features.wording import language_of
from qwen_scope.model import HookPoint, changing
from qwen_scope.steer import Decoding, Generation, generate, log_probabilities, repetition, rows_of
from qwen_scope.steer.generate import batches

TOGETHER = 10**6
QUESTION, ANSWER, NEXT = "Question:", "Answer:", "\nQuestion"
QUESTIONS = ("What does a gardener do in spring?", "Why do cats sleep so much?", "How is cheese made?")
WORKED = {
    "Spanish": (
        "En primavera, el jardinero cava la tierra, siembra y poda los rosales.",
        "Los gatos son cazadores y descansan para guardar fuerzas para la caza.",
        "Se calienta la leche hasta que cuaja; luego se quita el suero y el resto se sala y se deja madurar.",
    ),
    "German": (
        "Im Frühling gräbt der Gärtner die Beete um, sät und schneidet die Rosen.",
        "Katzen sind Jäger und ruhen sich aus, um Kraft für die Jagd zu sparen.",
        "Man erwärmt die Milch, bis sie gerinnt; dann gießt man die Molke ab, salzt den Rest und lässt ihn reifen.",
    ),
    "Russian": (
        "Весной садовник вскапывает грядки, сеет семена и подрезает розы.",
        "Кошки — охотники и отдыхают, чтобы сберечь силы для охоты.",
        "Молоко подогревают, пока оно не свернётся, затем сливают сыворотку, а остаток солят и дают ему созреть.",
    ),
    "Chinese": (
        "春天，园丁翻土、播种，还要修剪玫瑰。",
        "猫是猎手，它们休息是为了给打猎保存体力。",
        "先把牛奶加热到凝固，然后滤去乳清，再把剩下的加盐并放置熟成。",
    ),
}

Case = tuple[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Made:
    """Answers to some prompts: their languages, log-probabilities behind the plain prompt, and repeated 3-grams."""

    said: list[str]
    scored: list[np.ndarray]
    repeated: np.ndarray
    example: str

    def share(self, language: str) -> float:
        """Of the answers in the language, by the detector's name of it."""
        return float(np.mean([said == language for said in self.said]))


def chats(scope: Scope) -> bool:
    return bool(scope.tokenizer.chat_template)


def asked(scope: Scope, prompt: str) -> str:
    """A prompt as the model gets it."""
    return prompt if chats(scope) else f"{QUESTION} {prompt}\n{ANSWER}"


def asking(scope: Scope, language: str) -> str:
    """What asks for a language before a prompt: in words, or of a base model by examples whose answers are in it."""
    if chats(scope):
        return f"Answer in {language}. "
    pairs = zip(QUESTIONS, WORKED[language], strict=True)
    return "".join(f"{asked(scope, question)} {answer}\n\n" for question, answer in pairs)


def answered(
    scope: Scope, prompts: Sequence[str], cases: Sequence[Case], point: HookPoint, new: int, scored: int | None = None
) -> list[Made]:
    """Continue the prompts by `new` tokens in every case, in one batch; answers of the first `scored` cases are scored.

    A case is what stands before the prompts and a vector that is added to every token at the hook point.
    """
    chat = "default" if chats(scope) else None
    plain = [asked(scope, prompt) for prompt in prompts]
    given = [f"{before}{prompt}" for before, _ in cases for prompt in plain]
    (rows,) = batches(scope.tokenize(given, chat=chat).lengths, new, TOGETHER)
    added = torch.stack([cases[row // len(prompts)][1] for row in rows])[:, None]
    with changing(scope.model, {point: lambda h, _: h + added.to(h.dtype)}):
        made = generate(
            scope.model,
            scope.tokenizer,
            given,
            decoding=Decoding(max_new_tokens=new),
            chat=chat,
            batch_tokens=TOGETHER,
        )
    if not chats(scope):
        made = [first(scope, one) for one in made]
    tokens = scope.tokenize(plain, chat=chat)
    ids = [row[:n].tolist() for row, n in zip(tokens.input_ids, tokens.lengths, strict=True)]
    out = []
    for i in range(len(cases)):
        some = made[i * len(prompts) : (i + 1) * len(prompts)]
        score = scored is None or i < scored
        repeated = np.array([repetition([token.token_id for token in one.tokens]) for one in some])
        costs = log_probabilities(scope.model, rows_of(ids, some)) if score else []
        out.append(Made([language_of(one.text) for one in some], costs, repeated, some[0].text))
    return out


def first(scope: Scope, made: Generation) -> Generation:
    """An answer up to the question that a base model goes on with, at least one token of it."""
    ids = [token.token_id for token in made.tokens]
    n = len(ids)
    while n > 1 and NEXT in str(scope.tokenizer.decode(ids[:n])):
        n -= 1
    return replace(made, text=made.text.split(NEXT)[0].rstrip(), tokens=made.tokens[:n])
