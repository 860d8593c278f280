"""Steer a real model's answers into a language: one feature beside random ones, a direction, and being asked to.

    python -m experiments.real.languages --model FOLDER --sae FOLDER --data FOLDER [--languages es,de] [--write]

Features come from XQuAD's parallel paragraphs (`xquad.jsonl.gz` in `--data`), which say the same in every language: the
language score of SASFT (mean activation on a language less the mean over the others of their means), with its interval
over documents. One feature is added to every token, the first in its score at its layer; which layer and which amount
is chosen on the prompts `FIT`: the largest share of answers in the language among those that keep the budget, or where
none does, among all, and then the language counts as not reached. All figures are of the prompts `TEST` (or those of
`--prompts`), greedily continued, through the chat template where the model has one:

- unsteered; the feature; the difference of mean residuals (the language less the other languages of the same
  paragraphs, as in the score, and less English alone, which the prompts are in) at the same layer with the same length
  of change; asked to ("Answer in Spanish." before the prompt, or of a base model three questions answered in it);
- random features, matched as `qwen-scope validate` matches: they fire about as often and change the stream as much;
  features that fire over twice as often in the language as in the others are of the language and never drawn.

The language of an answer is what letters and the commonest words tell (`language_of`); how often that finds the
language of XQuAD's own text, cut as short, is measured beside. Quality: repeated 3-grams, and perplexity under the
unsteered model behind the plain prompt, as a multiple of that of the answers of the model that was asked.

A language is reached where the share is at least `REACHED`, and the perplexity at most `BUDGET` times that of being
asked to. Two criteria for random features, both stated beforehand: they end in the language in at most `MOST_RANDOM` of
the answers, and no more often than unsteered.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.harness import At, Experiment, Row, main
from experiments.real.answers import Case, Made, answered, asking
from experiments.sections import paragraph, table
from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.features import language_features, matched_random, of_concept, perplexity_ratio, pool_store
from qwen_scope.features.wording import language_of
from qwen_scope.scope import ExtractOptions
from qwen_scope.stats import Interval, bootstrap, rate_difference, share
from qwen_scope.store import FeatureStore

LANGUAGES = {"es": ("Spanish", "Spanish"), "de": ("German", "German"), "ru": ("Russian", "Cyrillic"),
             "zh": ("Chinese", "Chinese")}  # its name, and what the detector calls it  # fmt: skip
AMOUNTS = "0.3,0.5,0.8"  # lengths of the change, in median residuals of the layer
TOKENS, NEW = 48, 32
BUDGET, REPEATED = 2.0, 0.1  # times the perplexity, and more repeated 3-grams, than when asked
REACHED, MOST_RANDOM = 0.8, 0.05
FIT = (
    "Describe a morning at a fish market.",
    "Why do birds fly south in autumn?",
    "How is bread made?",
    "What does a lighthouse keeper do?",
    "Write two sentences about a river.",
)
TEST = (
    "Describe a garden after the rain.",
    "Why is the sea salty?",
    "How does a bicycle stay upright?",
    "What does a baker do before sunrise?",
    "Write two sentences about an old bridge.",
    "What makes a good teacher?",
    "Why do leaves fall from trees?",
    "Tell me about a visit to a museum.",
    "How do bees make honey?",
    "Describe the house of a fisherman.",
    "Why do people celebrate birthdays?",
    "What happens at a railway station at night?",
)
TITLE = "Steering a real model into a language"


@dataclass(frozen=True)
class Sizes:
    """Paragraphs of each language; prompts that choose and that are reported on; random features."""

    paragraphs: int = 10
    fit: int = 4
    test: int = 10
    random: int = 10


@cache
def opened(model: Path, sae: Path) -> Scope:
    torch.set_num_threads(1)
    return load_scope(str(model), str(sae), dtype="bfloat16")


def scope_of(at: At[Sizes]) -> Scope:
    return opened(at.options["model"], at.options["sae"])


def paragraphs(at: At[Sizes]) -> list[dict[str, str]]:
    """The same paragraphs in all languages of XQuAD, drawn by the seed."""
    with gzip.open(at.options["data"] / "xquad.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    ids = sorted({row["id"] for row in rows})
    chosen = np.random.default_rng(at.options["seed"]).choice(ids, at.sizes.paragraphs, replace=False)
    return [{"text": row["text"].strip(), "group": row["language"]} for row in rows if row["id"] in set(chosen)]


def stored(at: At[Sizes]) -> Path:
    """The paragraphs through the model, kept as a store."""
    folder = at.folder / "store"
    if not (folder / "manifest.json").is_file():
        options = ExtractOptions(max_tokens=TOKENS, pool=("mean",))
        scope_of(at).extract(paragraphs(at), folder, options).close()
    return folder


def found(at: At[Sizes]) -> dict[str, Any]:
    """Per language and layer the best feature, its score, the firing rates, and the direction between the means."""
    out: dict[str, Any] = {}
    groups = np.array([one["group"] for one in paragraphs(at)])
    with FeatureStore(stored(at)) as store:
        pooled = {name: pool_store(store, np.flatnonzero(groups == name).tolist()) for name in sorted(set(groups))}
        means = {layer: store.residuals(layer, "mean") for layer in store.layers}
    for one in language_features(pooled, 1, seed=at.options["seed"]):
        if one.language in LANGUAGES:
            inside = groups == one.language
            vectors = means[one.layer]
            out[f"{one.language} {one.layer}"] = {
                "feature": one.feature,
                "score": asdict(one.score),
                "rate": rate(pooled, one.layer, [one.language]),
                "others": rate(pooled, one.layer, [name for name in pooled if name != one.language]),
                "direction": (vectors[inside].mean(0) - vectors[~inside].mean(0)).astype(np.float64).tolist(),
            }
    return out


def rate(pooled: Mapping[str, Any], layer: int, names: Sequence[str]) -> list[float]:
    """Per feature the share of the tokens of some languages on which it fires."""
    some = [pooled[name][layer] for name in names]
    fires = sum(np.asarray(one.fires.sum(0), float).ravel() for one in some)
    return np.asarray(fires / sum(int(one.tokens.sum()) for one in some)).tolist()


def called(language: str) -> str:
    """What the detector calls it."""
    return LANGUAGES[language][1]


def asked_for(scope: Scope, language: str) -> Case:
    return asking(scope, LANGUAGES[language][0]), torch.zeros(scope.d_model)


def as_long(scope: Scope, layer: int, vector: torch.Tensor, amount: float) -> torch.Tensor:
    """The vector with a length of `amount` median residuals."""
    return vector * (amount * scope.stats[layer].norm_median / float(torch.linalg.vector_norm(vector)))


def column(scope: Scope, layer: int, feature: int) -> torch.Tensor:
    return scope.saes[layer].W_dec[:, feature].float()


def chosen(at: At[Sizes], language: str, features: Mapping[str, Any]) -> tuple[list[dict[str, Any]], int | None]:
    """Every layer and amount on the prompts that choose, and which one it is."""
    scope, prompts, tried = scope_of(at), FIT[: at.sizes.fit], []
    (asked,) = answered(scope, prompts, [asked_for(scope, language)], scope.hook_point(scope.layers[0]), NEW)
    for layer in scope.layers:
        vector = column(scope, layer, features[f"{language} {layer}"]["feature"])
        amounts = amounts_of(at)
        cases = [("", as_long(scope, layer, vector, amount)) for amount in amounts]
        for amount, made in zip(amounts, answered(scope, prompts, cases, scope.hook_point(layer), NEW), strict=True):
            cost = perplexity_ratio(made.scored, asked.scored, paired=True).estimate
            fits = cost <= BUDGET and made.repeated.mean() <= asked.repeated.mean() + REPEATED
            tried.append(
                {"layer": layer, "amount": amount, "share": made.share(called(language)), "cost": cost, "fits": fits}
            )
    good = [i for i, dose in enumerate(tried) if dose["share"] > 0]
    kept = [i for i in good if tried[i]["fits"]]
    return tried, max(kept or good, key=lambda i: (tried[i]["share"], -tried[i]["cost"]), default=None)


def detected(at: At[Sizes], language: str) -> Interval:
    """How often the language of XQuAD's own text is found, cut to as many tokens as an answer."""
    tokenizer = scope_of(at).tokenizer
    with gzip.open(at.options["data"] / "xquad.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [row["text"].strip() for row in map(json.loads, file) if row["language"] == language]
    cut = [tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:NEW]) for text in texts]
    return share(sum(language_of(str(text)) == called(language) for text in cut), len(cut))


def run(at: At[Sizes], language: str) -> Mapping[str, Any]:
    """Choose, then measure: all ways on the same prompts."""
    scope, nothing = scope_of(at), torch.zeros(scope_of(at).d_model)
    features = at.kept("features", lambda: found(at))
    tried, best = chosen(at, language, features)
    layer = scope.layers[0] if best is None else tried[best]["layer"]
    mine = features[f"{language} {layer}"]
    cases: dict[str, Case] = {"asked": asked_for(scope, language), "unsteered": ("", nothing)}
    drawn: list[int] = []
    if best is not None:
        amount = tried[best]["amount"]
        vectors = {"feature": column(scope, layer, mine["feature"]), "direction": torch.tensor(mine["direction"])}
        cases |= {name: ("", as_long(scope, layer, vector, amount)) for name, vector in vectors.items()}
        drawn = alike(at, layer, mine)
    others = [("", as_long(scope, layer, column(scope, layer, feature), amount)) for feature in drawn]
    point = scope.hook_point(layer)
    made = answered(scope, given(at), [*cases.values(), *others], point, NEW, len(cases))
    ways = dict(zip(cases, made[: len(cases)], strict=True))
    shares = [one.share(called(language)) for one in made[len(cases) :]]
    out = {
        "scores": {
            str(one): {key: features[f"{language} {one}"][key] for key in ("feature", "score")} for one in scope.layers
        },
        "tried": tried,
        "best": best,
        "detected": detected(at, language),
        "ways": {name: told(way, ways["asked"], language) for name, way in ways.items()},
    }
    if best is None:
        return out
    return {
        **out,
        "random": [
            {"feature": feature, "share": one.share(called(language)), "repeated": float(one.repeated.mean())}
            for feature, one in zip(drawn, made[len(cases) :], strict=True)
        ],
        "random_share": bootstrap(shares),
        "random_beyond": bootstrap([one - ways["unsteered"].share(called(language)) for one in shares]),
    }


def from_english(at: At[Sizes], row: Row) -> Mapping[str, Any]:
    """The difference of means of a language and English, at the layer and amount that its feature was given."""
    scope, language, dose = scope_of(at), row["language"], row["tried"][row["best"]]
    groups = np.array([one["group"] for one in paragraphs(at)])
    with FeatureStore(stored(at)) as store:
        means = store.residuals(dose["layer"], "mean")
    vector = torch.tensor(means[groups == language].mean(0) - means[groups == "en"].mean(0))
    cases: list[Case] = [asked_for(scope, language), ("", as_long(scope, dose["layer"], vector, dose["amount"]))]
    asked, made = answered(scope, given(at), cases, scope.hook_point(dose["layer"]), NEW)
    return told(made, asked, language)


def alike(at: At[Sizes], layer: int, mine: Mapping[str, Any]) -> list[int]:
    """Random features that fire about as often as the chosen one, none of the language itself."""
    scope, rates, others = scope_of(at), np.array(mine["rate"]), np.array(mine["others"])
    stats = {layer: replace(scope.stats[layer], firing_rate=((rates + others) / 2).astype(np.float32))}
    own = {layer: set(np.flatnonzero(of_concept(rates, others)).tolist())}
    one, out = Intervention.add(layer=scope.hook_point(layer), feature=mine["feature"], amount=1.0), []
    for i in range(at.sizes.random):
        rng = np.random.default_rng([at.options["seed"], i])
        out.append(matched_random([one], scope.saes, stats, rng, own)[0].feature)
    return out


def given(at: At[Sizes]) -> list[str]:
    """The prompts that figures are of."""
    path = at.options["prompts"]
    lines = TEST if path is None else [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return list(lines)[: at.sizes.test]


def amounts_of(at: At[Sizes]) -> list[float]:
    return [float(word) for word in at.options["amounts"].split(",")]


def told(made: Made, asked: Made, language: str) -> dict[str, Any]:
    n = len(made.said)
    return {
        "share": share(round(made.share(called(language)) * n), n),
        "cost": perplexity_ratio(made.scored, asked.scored, paired=True),
        "repeated": bootstrap(made.repeated),
        "example": made.example,
    }


def shown(kept: Mapping[str, Any]) -> str:
    """An interval as finished cells hold it."""
    return f"{Interval(**kept):.2f}"


def reached(row: Row, way: str) -> bool:
    found = row["ways"].get(way)
    if found is None or (way == "feature" and not row["tried"][row["best"]]["fits"]):
        return False
    return found["share"]["estimate"] >= REACHED and found["cost"]["estimate"] <= BUDGET


def few(row: Row) -> bool:
    return row["best"] is not None and row["random_share"]["estimate"] <= MOST_RANDOM


def no_more(row: Row) -> bool:
    return row["best"] is not None and row["random_beyond"]["estimate"] <= 0


def of_random(row: Row) -> tuple[int, int]:
    """Answers of random features in the language, and all of them; ten features that never do it have no spread."""
    n = row["ways"]["unsteered"]["share"]["n"]
    return round(sum(one["share"] for one in row["random"]) * n), n * len(row["random"])


def less_unsteered(row: Row) -> str:
    plain = row["ways"]["unsteered"]["share"]
    gap, low, high = rate_difference(*of_random(row), round(plain["estimate"] * plain["n"]), plain["n"])
    return f"{gap:.2f} [{low:.2f}, {high:.2f}]"


def listed(rows: list[Row]) -> str:
    return f"{len(rows)} ({', '.join(row['language'] for row in rows) or 'none'})"


def tell(at: At[Sizes], rows: list[Row]) -> str:
    """The section of docs/results.md."""
    for row in rows:
        if row["best"] is not None:
            name = f"from English to {row['language']}"
            row["ways"]["direction from English"] = at.kept(name, lambda row=row: from_english(at, row))
    good = [row for row in rows if reached(row, "feature")]
    both = [row for row in good if few(row) and no_more(row)]
    verdict = f"""A single feature steers the answers into the language, at the quality asked for and beyond random
        features, in {listed(both)} of {len(rows)} languages. By themselves: a share of at least {REACHED} at no more
        than {BUDGET:g} times the perplexity of answers of the model that was asked: {listed(good)}; random features
        end in the language in at most {MOST_RANDOM} of the answers: {listed([row for row in rows if few(row)])}; and no
        more often than unsteered: {listed([row for row in rows if no_more(row)])}. The difference of means with the
        same length of change reaches the same aim in {listed([row for row in rows if reached(row, "direction")])}
        against the other eleven languages, and in
        {listed([row for row in rows if reached(row, "direction from English")])} against English alone."""
    sizes = at.sizes
    known = {name: option for name, option in experiment.options.items() if "required" not in option}
    own = "".join(
        f" --{name} {at.options[name]}" for name, option in known.items() if at.options[name] != option.get("default")
    )
    how = f"""`python -m experiments.real.languages --model FOLDER --sae FOLDER --data FOLDER{own} --write`:
        {Path(at.options["model"]).name} with {Path(at.options["sae"]).name}. Features by language score on
        {sizes.paragraphs} parallel paragraphs of XQuAD in its twelve languages, the first {TOKENS} tokens of each;
        layer (of {", ".join(rows[0]["scores"])}) and amount (of {", ".join(map(str, amounts_of(at)))} median residuals,
        added to every token) chosen on {sizes.fit} prompts. Figures are of {len(given(at))} other prompts, {NEW}
        tokens, greedy, seed {at.options["seed"]}, with 95% intervals over prompts; of
        random features over all answers of {sizes.random} of them, drawn one by one, so that one may come
        twice. "Times": perplexity under the unsteered model behind the plain
        prompt, over that of the answers of the model that was asked; 3-grams: the share that repeat. "Found": how
        often the detector finds the language of XQuAD's own text of {NEW} tokens, an upper end for the shares."""
    parts = [paragraph(verdict), paragraph(how)]
    names = ("unsteered", "asked", "feature", "direction", "direction from English")
    cells = []
    for row in rows:
        for way in names:
            if way in row["ways"]:
                one = row["ways"][way]
                cells.append((row["language"], way, shown(one["share"]), shown(one["cost"]), shown(one["repeated"])))
        if row["best"] is not None:
            repeated = bootstrap([one["repeated"] for one in row["random"]])
            cells.append((row["language"], "random", f"{share(*of_random(row)):.2f}", "", f"{repeated:.2f}"))
    parts.append(table(("language", "way", "share in the language", "times", "3-grams"), cells))
    picked = []
    for row in rows:
        dose = {} if row["best"] is None else row["tried"][row["best"]]
        scores = "; ".join(f"{layer}/{one['feature']} {shown(one['score'])}" for layer, one in row["scores"].items())
        beyond = less_unsteered(row) if dose else ""
        chose = f"layer {dose['layer']}, {dose['amount']}" if dose else "none has a share"
        chose += "" if not dose or dose["fits"] else ", beyond the budget"
        picked.append((row["language"], scores, chose, beyond, shown(row["detected"])))
    about = "Features with their language scores, what was chosen, and random features less unsteered:"
    columns = ("language", "feature, score", "chosen", "random less unsteered", "found")
    parts += [paragraph(about), table(columns, picked)]
    examples = [f"- {row['language']}: {json.dumps(row['ways']['feature']['example'], ensure_ascii=False)}"
                for row in rows if "feature" in row["ways"]]  # fmt: skip
    if examples:
        parts += [paragraph(f"The answers to {json.dumps(given(at)[0])} under the feature:"), "\n".join(examples)]
    return "\n\n".join(parts)


experiment = Experiment(
    title=TITLE,
    varies={"language": tuple(LANGUAGES)},
    run=run,
    tell=tell,
    sizes=Sizes(),
    quick={"language": ("es",)},
    quick_sizes=Sizes(paragraphs=3, fit=2, test=3, random=2),
    options={
        "model": {"type": Path, "required": True, "help": "the folder of the model"},
        "sae": {"type": Path, "required": True, "help": "the folder of its SAEs"},
        "data": {"type": Path, "required": True, "help": "the folder with xquad.jsonl.gz"},
        "prompts": {"type": Path, "help": "a file of other prompts to report on, one a line"},
        "seed": {"type": int, "default": 0, "help": "of the paragraphs and the random features"},
        "amounts": {"default": AMOUNTS, "help": f"lengths of the change in median residuals (default: {AMOUNTS})"},
        "apart": {"metavar": "NAME", "help": "a section of its own, such as of another model"},
    },
    variant=lambda at: at.options["apart"] or "",
)

if __name__ == "__main__":
    main(experiment)
