"""How often does a real model fall into endless repetition by itself, and what do features have to do with it?

    python -m experiments.real.repetition --model FOLDER --sae FOLDER --data FOLDER [--language en] [--write]

Prompts are questions (of XQuAD, and in English of GSM8K in turn; with the chat template, where there is one) and
openings: the first `OPENING` tokens of documents of `corpus/LANGUAGE.*.jsonl`, of each file in turn. Of each kind the
first half of the prompts is for finding and the second is held back. A loop is what `qwen_scope.posttrain.Detector`
calls one: an answer that was not ended and whose last tokens are one block, at least four times in a row.

- T=0, T=0.7, T=1: answers of the model as it is, to all prompts;
- features: `qwen-scope posttrain repetition`'s own finder ranks features by their effect on the token with which a turn
  of a loop begins, on loops of the first half at T = 0. Amounts are chosen on the first half, too: to amplify, the
  smallest of `UP` under which half of the prompts that did not loop do, or that with most; to suppress, that of `DOWN`
  with the fewest loops on prompts that did loop, among those that leave the perplexity of what is not looping below
  `DEARER` times the unsteered one;
- amplified: the features added at every token while answers to held-back prompts that did not loop are written at T = 0
  (`MOST` of them); suppressed: taken away, on held-back prompts that did loop and, up to `MOST` in all, some that did
  not; random: as many other features of the same layers that fire about as often, the change of the same length.

Quality beside it: the perplexity under the unsteered model of the answer before its loop and the loop's first turn.

The model runs in bfloat16, on a CPU with attention written out (`eager`): the fused kernel takes twice as long where
one token is asked at a time. Without `--sae` only the first three arms can be run (`--arms T=0,T=0.7,T=1`).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.sections import paragraph, table
from qwen_scope import load_scope
from qwen_scope.errors import InputError
from qwen_scope.features import matched_random
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.posttrain import Detector
from qwen_scope.posttrain.repetition import Driver, amplifying, beginning
from qwen_scope.posttrain.sampling import Loop
from qwen_scope.scope import Scope
from qwen_scope.stats import ClusterSums, Interval, bootstrap, wilson
from qwen_scope.steer import Decoding, Intervention, generate, log_probabilities
from qwen_scope.steer import Row as Scored

SAMPLED = {"T=0": 0.0, "T=0.7": 0.7, "T=1": 1.0}
STEERED = ("amplified", "amplified random", "suppressed", "suppressed random")
KINDS = ("questions", "openings")
FEATURES, UP, DOWN, DEARER, TRIED, MOST = 8, (0.1, 0.2, 0.35), (0.05, 0.1, 0.2), 1.5, 8, 32
OPENING, BATCH_TOKENS, SEED, FEWEST = 32, 24_576, 0, 5
DETECTOR = Detector()
TITLE = "Endless repetition on a real model"
TRAINED = """What training does to such loops, with steered rollouts and without, is measured by
    `experiments.real.unlooping`, which has a section of its own."""


@dataclass(frozen=True)
class Sizes:
    """New tokens of an answer, and prompts of a kind at most."""

    tokens: int = 112
    most: int = 10_000


@dataclass(frozen=True)
class Prompts:
    """Prompts as the model reads them, their kinds, and which are held back."""

    texts: tuple[str, ...]
    kinds: tuple[str, ...]
    held: tuple[bool, ...]

    def some(self, held: bool) -> list[int]:
        return [i for i, one in enumerate(self.held) if one is held]


@cache
def opened(model: Path, sae: Path | None = None) -> Any:
    """The model in bfloat16, and with SAEs a scope; on a CPU with attention written out."""
    found: Any = load_scope(str(model), str(sae), dtype="bfloat16") if sae else load_model(str(model), dtype="bfloat16")
    if next(found.model.parameters()).device.type == "cpu":
        found.model.set_attn_implementation("eager")
    return found


def scope_of(at: At[Sizes]) -> Scope:
    if at.options["sae"] is None:
        raise InputError("features need --sae; without it give --arms T=0,T=0.7,T=1")
    return opened(at.options["model"], at.options["sae"])


def prompts_of(at: At[Sizes]) -> Prompts:
    """The prompts, drawn once and kept."""
    kept = at.kept("prompts", lambda: drawn(at))
    return Prompts(*(tuple(kept[name]) for name in ("texts", "kinds", "held")))


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def drawn(at: At[Sizes]) -> Prompts:
    """Questions and openings; of each kind the second half is held back."""
    data, language, rng = at.options["data"], at.options["language"], random.Random(SEED)
    tokenizer = opened(at.options["model"]).tokenizer
    read = [row for row in rows_of(data / "xquad.jsonl.gz") if row["language"] == language]
    asked = list(dict.fromkeys(question.strip() for row in read for question in row["questions"]))
    asked = rng.sample(asked, len(asked))
    if language == "en":
        other = [row["question"].strip() for row in rows_of(data / "gsm8k_test.jsonl.gz")]
        asked = [one for both in zip(asked, rng.sample(other, len(other)), strict=False) for one in both]
    asked = asked[: min(at.options["questions"], at.sizes.most)]
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": one}] for one in asked]
        asked = [tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=True) for one in chats]
    begun = openings(data / "corpus", language, tokenizer, min(at.options["openings"], at.sizes.most))
    found = {"questions": asked, "openings": begun}
    return Prompts(
        tuple(text for kind in KINDS for text in found[kind]),
        tuple(kind for kind in KINDS for _ in found[kind]),
        tuple(i >= len(found[kind]) // 2 for kind in KINDS for i in range(len(found[kind]))),
    )


def openings(corpus: Path, language: str, tokenizer: Any, n: int, seed: int = SEED) -> list[str]:
    """The first tokens of documents that are at least twice as long, of each file of the language in turn."""
    files = sorted(corpus.glob(f"{language}.*.jsonl"))
    if not files:
        raise InputError(f"{corpus} has no files {language}.*.jsonl")
    out: list[str] = []
    for i, path in enumerate(files):
        lines, rng = path.read_text(encoding="utf-8").splitlines(), random.Random(seed)
        wanted = len(range(i, n, len(files)))
        for line in rng.sample(lines, len(lines)):
            ids = tokenizer(json.loads(line)["text"].strip()[:2000], add_special_tokens=False)["input_ids"]
            if wanted and len(ids) > 2 * OPENING:
                out.append(str(tokenizer.decode(ids[:OPENING])))
                wanted -= 1
            if not wanted:
                break
    return random.Random(seed).sample(out, len(out))


def answers(
    loaded: LoadedModel | Scope,
    prompts: Sequence[str],
    tokens: int,
    temperature: float = 0.0,
    interventions: Sequence[Intervention] = (),
    seed: int = SEED,
) -> list[dict[str, Any]]:
    """Answers as ids, whether the model ended them, and where and how they loop."""
    sampled = Decoding(tokens, True, temperature, 1.0, 0, 1.0, seed) if temperature else None
    more: dict[str, Any] = {"saes": loaded.saes} if isinstance(loaded, Scope) else {}
    more |= {"decoding": sampled or Decoding(tokens), "batch_tokens": BATCH_TOKENS}
    found = generate(loaded.model, loaded.tokenizer, prompts, interventions, **more)
    out = []
    for one in found:
        ids = [token.token_id for token in one.tokens]
        loop = None if one.finished else DETECTOR.find(ids)
        at_loop = None if loop is None else [loop.start, loop.period, loop.turns]
        out.append({"ids": ids, "finished": one.finished, "loop": at_loop})
    return out


def judged(
    loaded: LoadedModel | Scope, prompts: Sequence[str], found: Sequence[Mapping[str, Any]]
) -> list[list[float]]:
    """Per answer how many tokens stand before its loop, its first turn included, and their loss under the model."""
    rows, which = [], []
    for i, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        asked = loaded.tokenizer(prompt)["input_ids"]
        kept = one["ids"] if one["loop"] is None else one["ids"][: one["loop"][0] + one["loop"][1]]
        if kept:
            which.append(i)
            rows.append(Scored((*asked, *kept), len(asked)))
    out = [[0.0, 0.0] for _ in prompts]
    for i, values in zip(which, log_probabilities(loaded.model, rows), strict=True):
        out[i] = [float(len(values)), float(-values.sum())]
    return out


def plain(at: At[Sizes]) -> list[dict[str, Any]]:
    """Answers at T = 0 of the model as it is, kept for every arm."""
    loaded = opened(at.options["model"])
    return at.kept("plain", lambda: answers(loaded, prompts_of(at).texts, at.sizes.tokens))


def recipe(at: At[Sizes]) -> dict[str, Any]:
    """Features and amounts, found on the first half of the prompts."""
    scope, prompts, before = scope_of(at), prompts_of(at), plain(at)
    first = prompts.some(held=False)
    looping, others = ([i for i in first if bool(before[i]["loop"]) is side] for side in (True, False))
    known = []
    for i in looping:
        asked = scope.tokenizer(prompts.texts[i])["input_ids"]
        start, period, turns = before[i]["loop"]
        known.append(([*asked, *before[i]["ids"]], Loop(start + len(asked), period, turns)))
    if len(known) < FEWEST:
        raise InputError(f"{len(known)} of {len(first)} answers loop; {FEWEST} are the least that say what features do")
    drivers = beginning(scope, known, scope.check_layers(None), FEATURES)
    tried: dict[str, list[Any]] = {"up": [], "down": []}
    for amount in UP:
        some = [prompts.texts[i] for i in others[:TRIED]]
        found = answers(scope, some, at.sizes.tokens, interventions=changes(scope, drivers, amount))
        tried["up"].append([amount, float(np.mean([one["loop"] is not None for one in found]))])
    some = [prompts.texts[i] for i in looping[:TRIED]]
    own = loss_of(judged(scope, some, [before[i] for i in looping[:TRIED]]))
    for amount in DOWN:
        found = answers(scope, some, at.sizes.tokens, interventions=changes(scope, drivers, -amount))
        share = float(np.mean([one["loop"] is not None for one in found]))
        tried["down"].append([amount, share, float(np.exp(loss_of(judged(scope, some, found)) - own))])
    enough = [one for one in tried["up"] if one[1] >= 0.5] or [max(tried["up"], key=lambda one: one[1])]
    cheap = [one for one in tried["down"] if one[2] <= DEARER] or tried["down"][:1]
    return {
        "known": len(known),
        "drivers": [[one.layer, one.feature, one.effect] for one in drivers],
        "up": enough[0][0],
        "down": min(cheap, key=lambda one: one[1])[0],
        "tried": tried,
    }


def steered_on(prompts: Prompts, before: Sequence[Mapping[str, Any]], arm: str) -> list[int]:
    """The held-back prompts of an arm: those that did not loop, or first those that did."""
    back = prompts.some(held=True)
    others = [i for i in back if not before[i]["loop"]]
    order = random.Random(SEED).sample(others, len(others))
    loops = [] if arm.startswith("amplified") else [i for i in back if before[i]["loop"]]
    return sorted([*loops, *order[: max(0, MOST - len(loops))]])


def loss_of(found: Sequence[Sequence[float]]) -> float:
    return float(np.divide(*np.array(found).sum(0)[::-1]))


def changes(scope: Scope, drivers: Sequence[Driver], amount: float) -> list[Intervention]:
    return [amplifying(scope, one, amount) for one in drivers]


def run(at: At[Sizes], arm: str) -> dict[str, Any]:
    """The answers of one arm: whether each loops, was ended, and, of what is compared, the quality before a loop."""
    torch.set_num_threads(1)
    prompts = prompts_of(at)
    if arm in SAMPLED:
        loaded, which = opened(at.options["model"]), list(range(len(prompts.texts)))
        texts = list(prompts.texts)
        found = answers(loaded, texts, at.sizes.tokens, SAMPLED[arm]) if SAMPLED[arm] else plain(at)
        more: dict[str, Any] = {}
    else:
        loaded, which = scope_of(at), steered_on(prompts, plain(at), arm)
        more = at.kept("recipe", lambda: recipe(at))
        drivers = [Driver(*one) for one in more["drivers"]]
        own = changes(loaded, drivers, more["up"] if arm.startswith("amplified") else -more["down"])
        if arm.endswith("random"):
            own = matched_random(own, loaded.saes, loaded.stats, np.random.default_rng(SEED))
        texts = [prompts.texts[i] for i in which]
        found = answers(loaded, texts, at.sizes.tokens, interventions=own)
        more = {**more, "features": [[one.layer, one.feature] for one in own]}
    return {
        "which": which,
        "kinds": [prompts.kinds[i] for i in which],
        "loops": [one["loop"] is not None for one in found],
        "finished": [one["finished"] for one in found],
        "tokens": [len(one["ids"]) for one in found],
        "quality": judged(loaded, texts, found) if arm in STEERED or not SAMPLED[arm] else [],
        "example": next((loaded.tokenizer.decode(one["ids"])[-200:] for one in found if one["loop"]), ""),
        **more,
    }


def looping(row: Row, kind: str | None = None) -> np.ndarray:
    kinds = zip(row["loops"], row["kinds"], strict=True)
    return np.array([loop for loop, one in kinds if kind in (None, one)], float)


def share(values: np.ndarray) -> str:
    low, high = (float(end) for end in wilson(int(values.sum()), len(values)))
    return f"{values.mean():.1%} [{low:.1%}, {high:.1%}] of {len(values)}" if len(values) else ""


def held(row: Row, like: Row) -> Row:
    """The row of all prompts, cut to those of another."""
    names = ("which", "kinds", "loops", "finished", "tokens", "quality")
    return {**row, **{name: [row[name][i] for i in like["which"]] for name in names}}


def dearer(row: Row, before: Row) -> Interval:
    """Perplexity of what does not loop, as a multiple of the unsteered model's on the same prompts."""
    (n, loss), (m, other) = np.array(row["quality"]).T, np.array(before["quality"]).T
    sums = ClusterSums({"n": n, "loss": loss, "m": m, "other": other})
    return sums.interval(lambda s: np.exp(s["loss"] / s["n"] - s["other"] / s["m"]))


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    arms = {row["arm"]: row for row in rows}
    how = f"""`python -m experiments.real.repetition --model FOLDER --sae FOLDER --data FOLDER --write`:
        {Path(at.options["model"]).name}, {at.options["language"]}; {at.options["questions"]} questions and
        {at.options["openings"]} openings of {OPENING} tokens, one answer of at most {at.sizes.tokens} tokens each;
        a loop is {DETECTOR.times} turns or more of at most {DETECTOR.longest} tokens. Shares with Wilson's 95%
        intervals, differences with those over prompts."""
    own = [
        [arm, *(share(looping(row, kind)) for kind in KINDS), share(looping(row)), f"{np.mean(row['finished']):.0%}"]
        for arm, row in arms.items()
        if arm in SAMPLED
    ]
    parts = [paragraph(verdict(arms)), paragraph(how), table(("sampled", *KINDS, "both", "ended"), own)]
    steered = [row for arm, row in arms.items() if arm in STEERED]
    if steered and "T=0" in arms:
        cells = []
        for row in steered:
            base = held(arms["T=0"], row)
            did = looping(base) > 0
            cells.append(
                [
                    row["arm"], share(looping(row)[did]), share(looping(row)[~did]), f"{np.mean(base['finished']):.0%}",
                    f"{np.mean(row['finished']):.0%}", f"{dearer(row, base)}",
                ]
            )  # fmt: skip
        heads = ("at T=0, held back", "loop, of those that did", "of those that did not", "ended before", "ended",
                 "perplexity, times")  # fmt: skip
        parts += [paragraph(told(steered[0])), table(heads, cells)]
    return "\n\n".join([*parts, paragraph(TRAINED)])


def told(row: Row) -> str:
    """Which features and amounts were found."""
    names = ", ".join(f"{layer}/{feature} ({effect:.2f} nats)" for layer, feature, effect in row["drivers"])
    up = ", ".join(f"{amount:g}: {found:.0%}" for amount, found in row["tried"]["up"])
    down = ", ".join(f"{amount:g}: {found:.0%} at {times:.2f} times" for amount, found, times in row["tried"]["down"])
    return f"""Features whose activation makes the turns of {row["known"]} loops of the other half begin: {names}.
        Looping by the amount of each in median residual norms, on at most {TRIED} prompts of that half: amplified where
        nothing looped, {up}; suppressed where all looped, with the perplexity of what does not loop, {down}. Taken:
        {row["up"]:g} and {row["down"]:g}."""


def verdict(arms: Mapping[str, Row]) -> str:
    """What holds of the report's causal check, and how often the model loops by itself."""
    often = "; ".join(f"{share(looping(row))} at {arm}" for arm, row in arms.items() if arm in SAMPLED)
    said = f"The model loops by itself in {often}."
    if "T=0" not in arms or not set(STEERED) <= set(arms):
        return said
    did, gaps = looping(held(arms["T=0"], arms["suppressed"])) > 0, {}
    for arm in ("amplified", "suppressed"):
        some = did if arm == "suppressed" else np.full(len(arms[arm]["which"]), True)
        if some.sum() < 2:
            return f"{said} Too few held-back prompts loop to say what suppressing does."
        gaps[arm] = bootstrap(looping(arms[arm])[some] - looping(arms[f"{arm} random"])[some])
    raises, lowers = gaps["amplified"].low > 0, gaps["suppressed"].high < 0
    more, fewer = (f"{one:+.1%}" for one in gaps.values())
    shown = "This shows" if raises and lowers else "This does not show"
    words = [
        f"amplified on prompts that do not loop, the features {'do' if raises else 'do not'} make more answers loop"
        f" than random ones ({more})",
        f"suppressed where the model loops, they {'do' if lowers else 'do not'} leave fewer loops than random ones"
        f" ({fewer})",
    ]
    return f"{shown} the report's causal check on both sides: {'; '.join(words)}. {said}"


experiment = Experiment(
    title=TITLE,
    varies={"arm": ("T=0", *STEERED, "T=0.7", "T=1")},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={},
    quick_sizes=Sizes(tokens=64, most=12),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "help": "the folder of its SAEs; not for --arms T=0,T=0.7,T=1"},
        "data": {
            "type": Path,
            "required": True,
            "help": "the folder with xquad.jsonl.gz, gsm8k_test.jsonl.gz, corpus/",
        },
        "questions": {"type": int, "default": 24, "help": "how many of them (default: 24)"},
        "openings": {"type": int, "default": 64, "help": "how many of them (default: 64)"},
        "language": {"default": "en", "help": "of the prompts (default: en)"},
    },
    variant=lambda at: "" if at.options["language"] == "en" else str(at.options["language"]),
)

if __name__ == "__main__":
    main(experiment)
