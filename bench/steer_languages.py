"""Steer the lab into each language, and out of a drift: shares, fluency, and matched random features beside them.

    python bench/steer_languages.py            # all languages and the drift, JSON on standard output

Features are chosen on training documents by the difference of mean activation (the report's contrastive rule), the
amount by `sweep` on prompts of its own, and both are measured on fresh prompts.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import torch

from qwen_scope import Intervention, Scope, load_scope
from qwen_scope.lab import LANGUAGES, documents, drift_prompts, language_of_text, neutral_prompts
from qwen_scope.steer import Budget, Decoding, generate, log_probabilities, perplexity, rows_of, sweep

ALL_LAYERS, LAYERS, PER_LAYER = (0, 1, 2, 3, 4, 5), (1, 2, 3, 4, 5), 5
N_FIT, N_TEST, N_RANDOM = 48, 100, 5
DECODING = Decoding(max_new_tokens=20, sample=True, temperature=0.7, top_k=0, top_p=1.0, seed=1)
END = "<|endoftext|>"


def first(text: str) -> str:
    """The continuation itself; what follows the end of the text is another text."""
    return text.split(END)[0]


def share(texts: list[str], language: str) -> np.ndarray:
    return np.array([float(language_of_text(first(text)) == language) for text in texts])


def language_means(scope: Scope) -> dict[tuple[int, str], torch.Tensor]:
    """Mean activation of every feature on every language's texts, `(d_sae,)` per layer and language."""
    texts: dict[str, list[str]] = defaultdict(list)
    for document in documents(seed=5, n=1500):
        if document.language and document.kind == "talk" and len(texts[document.language]) < 30:
            texts[document.language].append(document.text[:300])
    means = {}
    for language in LANGUAGES:
        seen = scope.features(texts[language], ALL_LAYERS, truncate=True)
        for layer in ALL_LAYERS:
            acts = seen.acts[layer][seen.mask]
            means[layer, language] = acts.to_dense().mean(0)
    return means


def knob(scope: Scope, means: dict, language: str, layers: tuple[int, ...] = LAYERS) -> list[Intervention]:
    """The features of a language, each layer's changes one residual long together, at the prompt alone."""
    out = []
    for layer in layers:
        others = torch.stack([means[layer, other] for other in LANGUAGES if other != language]).mean(0)
        values, features = (means[layer, language] - others).topk(PER_LAYER)
        lengths = values * scope.saes[layer].W_dec[:, features].float().norm(dim=0)
        for feature, length in zip(features.tolist(), (lengths / lengths.sum()).tolist(), strict=True):
            one = Intervention.add(layer=layer, feature=feature, amount=length, unit="resid_norm", where="prompt")
            out.append(one)
    return out


def matched_random(scope: Scope, interventions: list[Intervention], seed: int) -> list[Intervention]:
    """For each intervention a random feature of its layer that fires about as often, with the same length of change."""
    rng = np.random.default_rng(seed)
    out = []
    for one in interventions:
        rates = scope.sizes[one.layer].firing_rate
        assert rates is not None
        taken = {other.feature for other in interventions}
        near = [f for f in np.argsort(np.abs(rates - rates[one.feature])) if int(f) not in taken][:100]
        chosen = int(rng.choice(near))
        out.append(Intervention.add(layer=one.layer, feature=chosen, amount=one.amount, unit=one.unit, where="prompt"))
    return out


def run(scope: Scope, prompts: list[str], interventions: list[Intervention]) -> tuple[list[str], float]:
    """Continuations, and their perplexity under the unsteered model."""
    tools = {"saes": scope.saes, "stats": scope.sizes, "decoding": DECODING}
    made = generate(scope.model, scope.tokenizer, prompts, interventions, **tools)
    ids = [scope.tokenizer(prompt)["input_ids"] for prompt in prompts]
    return [one.text for one in made], perplexity(log_probabilities(scope.model, rows_of(ids, made)))


def into_languages(scope: Scope, means: dict) -> dict:
    fit = [prompt.text for prompt in neutral_prompts(seed=11, n=N_FIT)]
    test = [prompt.text for prompt in neutral_prompts(seed=12, n=N_TEST)]
    plain_texts, plain = run(scope, test, [])
    shares = Counter(language_of_text(first(text)) for text in plain_texts)
    out: dict = {"unsteered": {str(name): n / N_TEST for name, n in shares.items()}, "perplexity": plain}
    for language in LANGUAGES:
        started = time.time()
        base = knob(scope, means, language)
        found = sweep(
            scope.model,
            scope.tokenizer,
            fit,
            base,
            lambda texts, language=language: share(texts, language),
            amounts=(0.4, 0.8, 1.2, 1.6, 2.0),
            saes=scope.saes,
            stats=scope.sizes,
            decoding=DECODING,
            budget=Budget(2.0, 0.1),
            refine=1,
        )
        amount = found.proposed or 0.0
        chosen = [one.with_amount(one.amount * amount) for one in base]
        texts, cost = run(scope, test, chosen)
        was = share(plain_texts, language)
        own = [i for i in range(N_TEST) if was[i]]
        in_language = own_perplexity(scope, [test[i] for i in own], [plain_texts[i] for i in own])
        rows = [share(run(scope, test, matched_random(scope, chosen, seed))[0], language) for seed in range(N_RANDOM)]
        out[language] = {
            "amount": amount,
            "share": float(share(texts, language).mean()),
            "unsteered_share": float(was.mean()),
            "perplexity": cost,
            "unsteered_perplexity_in_language": in_language,
            "random_share": float(np.mean(rows)),
            "random_turned": float(np.mean([((row == 1) & (was == 0)).mean() for row in rows])),
            "example": texts[0],
            "seconds": time.time() - started,
        }
        sys.stderr.write(f"{language} {out[language]}\n")
    return out


def own_perplexity(scope: Scope, prompts: list[str], texts: list[str]) -> float | None:
    """The perplexity of unsteered continuations that came out in the language by themselves."""
    from qwen_scope.steer import Row

    rows = []
    for prompt, text in zip(prompts, texts, strict=True):
        start, ids = len(scope.tokenizer(prompt)["input_ids"]), scope.tokenizer(prompt + text)["input_ids"]
        if start < len(ids):
            rows.append(Row(tuple(ids), start))
    return perplexity(log_probabilities(scope.model, rows)) if rows else None


def out_of_drift(scope: Scope, means: dict, into: str = "zh") -> dict:
    """Ablate the intruder's features at every token of questions whose answers sometimes drift into it.

    Drift: the answer holds a letter of the intruder's script.
    """
    from qwen_scope.steer import matches

    drifted = matches("[\u4e00-\u9fff]")
    n = 300
    prompts = [prompt.text for prompt in drift_prompts(seed=21, n=n, into=into)]
    decoding = Decoding(max_new_tokens=60, sample=True, temperature=1.0, top_k=0, top_p=1.0, seed=2)
    intruder = knob(scope, means, into, ALL_LAYERS)
    arms: dict[str, list[Intervention]] = {
        "unsteered": [],
        "ablated": [Intervention.ablate(layer=one.layer, feature=one.feature or 0) for one in intruder],
    }
    for seed in range(N_RANDOM):
        others = matched_random(scope, intruder, seed)
        arms[f"random {seed + 1} ablated"] = [
            Intervention.ablate(layer=one.layer, feature=one.feature or 0)
            for one in {(one.layer, one.feature): one for one in others}.values()
        ]
    out = {}
    for name, interventions in arms.items():
        tools = {"saes": scope.saes, "stats": scope.sizes, "decoding": decoding}
        made = generate(scope.model, scope.tokenizer, prompts, interventions, **tools)
        ids = [scope.tokenizer(prompt)["input_ids"] for prompt in prompts]
        cost = perplexity(log_probabilities(scope.model, rows_of(ids, made)))
        values = drifted([first(one.text) for one in made])
        kept = [i for i, prompt in enumerate(prompts) if not drifted([prompt])[0]]
        out[name] = {"drift": float(values[kept].mean()), "n": len(kept), "perplexity": cost}
        sys.stderr.write(f"drift {name} {out[name]}\n")
    return out


if __name__ == "__main__":
    opened = load_scope("lab", device="cpu")
    measured = language_means(opened)
    results = {"languages": into_languages(opened, measured)} if "drift" not in sys.argv else {}
    results["drift"] = out_of_drift(opened, measured)
    print(json.dumps(results, ensure_ascii=False, indent=2))
