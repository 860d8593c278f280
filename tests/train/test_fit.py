"""Whether an SAE fits a checkpoint: figures by plain loops, the rule by cases, verdicts on known checkpoints."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from qwen_scope import load_sae
from qwen_scope.errors import InputError
from qwen_scope.lab import documents
from qwen_scope.model import HookPoint, LoadedModel, changing, load_model, measure_counted
from qwen_scope.sae import SAE, catalog
from qwen_scope.scope import DO_NOT_USE, FITS, LOSSES, UNTOLD
from qwen_scope.text import PHASES, Corpus, Counted
from qwen_scope.train import Criterion, DocumentRows, Estimate, Fit, document_rows, fit, judge, measure_pair
from qwen_scope.train.fit import judged

POINT = HookPoint(4)
USER, ANSWER, TEXT = (PHASES.index(name) for name in ("user", "answer", "text"))


@pytest.fixture(scope="module")
def lab() -> LoadedModel:
    return load_model(catalog.find("lab").model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae("lab", 4)


@pytest.fixture(scope="module")
def rows(lab: LoadedModel) -> list[DocumentRows]:
    texts = [one.text for one in documents("heldout_sentences", 5, 60)]
    return document_rows(Corpus(texts), lab.tokenizer, context_length=128, tokens=2400)


# What is read


def test_documents_are_whole_in_a_batch_and_keep_their_tokens(lab: LoadedModel) -> None:
    texts = [one.text for one in documents("heldout_sentences", 7, 40)]
    found = document_rows(Corpus(texts), lab.tokenizer, context_length=32, tokens=10**6)
    of: dict[int, list[int]] = {}
    batches: dict[int, set[int]] = {}
    for at, one in enumerate(found):
        for ids, mask, number in zip(one.ids, one.mask, one.documents.tolist(), strict=True):
            assert mask.sum() <= 32
            of.setdefault(number, []).extend(ids[mask == 1].tolist())
            batches.setdefault(number, set()).add(at)
    for i, text in enumerate(texts):
        ids = lab.tokenizer(text)["input_ids"]
        assert of[i] == ids[: len(ids) - (len(ids) % 32 == 1)]  # a row of one token predicts nothing
    assert all(len(where) == 1 for where in batches.values())


def test_no_document_gives_more_than_its_part(lab: LoadedModel) -> None:
    texts = ["The weather is fine. " * 4000, *(one.text for one in documents("heldout_sentences", 7, 200))]
    found = document_rows(Corpus(texts), lab.tokenizer, context_length=16, tokens=6400)
    lengths = {int(n): int(one.mask[one.documents == n].sum()) for one in found for n in one.documents.unique()}
    assert lengths[0] == 100
    assert 6400 <= sum(lengths.values()) < 6400 + 400
    with pytest.raises(InputError, match="no document of at least two tokens"):
        document_rows(Corpus(["a"]), lab.tokenizer, context_length=16, tokens=100)


def test_phases_of_conversations_are_read(lab: LoadedModel) -> None:
    chats = [
        [{"role": "user", "content": f"Where is house {i}?"}, {"role": "assistant", "content": "Here."}]
        for i in range(3)
    ]
    found = document_rows(
        Corpus([{"text": chat} for chat in chats]), lab.tokenizer, context_length=64, tokens=500, chat="default"
    )
    seen = torch.cat([one.phases[one.mask == 1] for one in found]).unique().tolist()
    assert {USER, ANSWER} <= set(seen)
    assert TEXT not in seen


# The sums


def plain_sums(models: dict[str, Any], sae: SAE, one: DocumentRows, keep: torch.Tensor) -> dict[str, np.ndarray]:
    """The sums by document and the losses from one document at a time, unpadded, with dense activations."""
    out: dict[str, list[float]] = {}
    residuals = {name: [] for name in models}
    where = [(i, int(mask.sum())) for i, mask in enumerate(one.mask)]
    for name, model in models.items():
        for i, n in where:
            with torch.no_grad():
                states = model(one.ids[i : i + 1, :n], output_hidden_states=True).hidden_states
            residuals[name].append(states[POINT.layer + 1][0])
    for name, model in models.items():
        kept = [h[keep[i, :n]].double() for (i, n), h in zip(where, residuals[name], strict=True)]
        mean = torch.cat(kept).mean(0)
        hats = [sae.decode(sae.encode(x.float())).double() for x in kept]
        out[f"error_{name}"] = [float(((x - y) ** 2).sum()) for x, y in zip(kept, hats, strict=True)]
        out[f"total_{name}"] = [float(((x - mean) ** 2).sum()) for x in kept]
        ways = {"clean": None, "spliced": "sae", "zero": 0.0, "mean": mean.float()}
        for way, by in ways.items():
            if way == "mean" and name == "base":
                continue
            lost = []
            for i, n in where:
                here = keep[i, :n]

                def put(h: torch.Tensor, _: HookPoint, here=here, by=by) -> torch.Tensor:
                    new = h.clone()
                    new[0, here] = sae.decode(sae.encode(h[0, here])) if isinstance(by, str) else torch.as_tensor(by)
                    return new

                change = {} if by is None else {POINT: put}
                with torch.no_grad(), changing(model, change):
                    log_p = model(one.ids[i : i + 1, :n]).logits[0].double().log_softmax(-1)
                lost.append(-float(log_p[:-1].gather(1, one.ids[i, 1:n, None]).sum()))
            out[f"{way}_{name}"] = lost
    out["predicted"] = [float(n - 1) for _, n in where]
    out["tokens"] = [float(keep[i].sum()) for i, _ in where]
    return {name: np.array(values) for name, values in out.items()}


def test_sums_are_those_of_plain_loops(lab: LoadedModel, sae: SAE) -> None:
    texts = [one.text[:120] for one in documents("heldout_sentences", 9, 6)]
    rows = document_rows(Corpus(texts), lab.tokenizer, context_length=64, tokens=10**5)
    assert len(rows) == 1
    other = moved(lab.model, 0.02)
    counted = Counted.of(lab.tokenizer)
    found = measure_pair(lab.model, other, {POINT: sae}, rows, counted=counted, counted_post=counted)[POINT]
    one = rows[0]
    keep = (counted.reasons(one.ids, mask=one.mask) == 0) & (one.mask == 1)
    want = plain_sums({"base": lab.model, "post": other}, sae, one, keep)
    numbers, place = np.unique(one.documents.numpy(), return_inverse=True)
    got = found.by_document()
    for name, values in want.items():
        summed = np.bincount(place, values, minlength=len(numbers))
        assert got[name] == pytest.approx(summed, rel=2e-4), name


def test_the_features_that_move_are_found(lab: LoadedModel, sae: SAE, rows: list[DocumentRows]) -> None:
    """One feature is switched off on the other side by pushing residuals away from it, everything else stays."""
    from qwen_scope.sae import FeatureActs
    from qwen_scope.train.moves import MoveSums

    g = torch.Generator().manual_seed(0)
    sums, fired = MoveSums(50), np.zeros((2, 50))
    amounts, n = np.zeros((2, 50)), 0
    for batch in range(6):
        dense = (torch.rand(200, 50, generator=g) - 0.8).relu()
        other = dense * (torch.rand(200, 50, generator=g) > 0.02)
        other[:, 7] = 0
        other[:, 11] *= 3
        other[:, 13] = 2 * dense[:, 13]  # on the same tokens
        places = torch.arange(200) // 10 + 20 * batch
        sums.add(FeatureActs.from_dense(dense), FeatureActs.from_dense(other), places)
        fired += np.stack([(side > 0).sum(0).numpy() for side in (dense, other)])
        amounts += np.stack([side.double().sum(0).numpy() for side in (dense, other)])
        n += 200
    found = sums.result()
    assert found.tested == 50
    first = found.features[0]
    assert (first.feature, first.rate_post) == (7, 0)
    assert first.q_rate < 1e-6
    assert 11 in [one.feature for one in sums.result(50).features]
    eleven = next(one for one in sums.result(50).features if one.feature == 11)
    assert eleven.q_mean < 1e-6
    assert len(sums.result(50).features) == found.moved
    for one in sums.result(50).features:
        assert min(one.q_rate, one.q_mean) <= 0.05  # those that move in their amount alone come before those that don't
        got = (one.rate_base, one.rate_post, one.mean_base, one.mean_post)
        want = (fired[0, one.feature], fired[1, one.feature], amounts[0, one.feature], amounts[1, one.feature])
        assert got == pytest.approx([value / n for value in want])


# The rule


def line(good: tuple[float, float] | None, bad: tuple[float, float] | None) -> Criterion:
    made = [None if ends is None else Estimate(sum(ends) / 2, *ends) for ends in (good, bad)]
    return Criterion("x", "found", *made)


GOOD, BAD, BETWEEN = line((0.1, 0.2), (0.5, 0.6)), line((-0.6, -0.5), (-0.2, -0.1)), line((-0.2, -0.1), (0.1, 0.2))
AT_GOOD, AT_BAD, OPEN = line((-0.1, 0.1), (0.3, 0.5)), line((-0.6, -0.4), (-0.1, 0.1)), line((-1, 1), (-1, 1))
NOT_KNOWN = line(None, None)


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        ([GOOD, GOOD], FITS), ([GOOD, BETWEEN], LOSSES), ([GOOD, AT_GOOD], LOSSES), ([GOOD, BAD], DO_NOT_USE),
        ([OPEN, BAD], DO_NOT_USE), ([GOOD, AT_BAD], LOSSES), ([GOOD, OPEN], UNTOLD), ([AT_GOOD, OPEN], UNTOLD),
        ([BETWEEN, OPEN], LOSSES), ([GOOD, NOT_KNOWN], LOSSES), ([BAD, NOT_KNOWN], DO_NOT_USE),
        ([NOT_KNOWN, OPEN], LOSSES),
    ],
)  # fmt: skip
def test_a_word_is_given_where_the_whole_interval_proves_it(lines: list[Criterion], word: str) -> None:
    assert judge(lines)[0] == word
    assert judge(lines[::-1])[0] == word


def columns(count: int = 60, /, **per_token: float) -> dict[str, np.ndarray]:
    """Sums of documents that are all alike but for a little noise: 100 tokens each, figures as asked."""
    asked = {
        "ev_base": 0.9,
        "ev_post": 0.9,
        "jaccard": 0.9,
        "ce_base": 0.99,
        "ce_post": 0.99,
        "control": 0.9,
        "gap": 8.0,
    }
    asked |= per_token
    g = np.random.default_rng(0)
    n = 100.0 * (1 + 0.1 * g.normal(size=count))
    out = {
        "tokens": n,
        "predicted": n,
        "jaccard": n * asked["jaccard"],
        "cosine": n,
        "cosine_base": n,
        "cosine_post": n,
    }
    for which in ("base", "post"):
        out[f"total_{which}"] = n * 50
        out[f"error_{which}"] = n * 50 * (1 - asked[f"ev_{which}"])
        out[f"clean_{which}"], out[f"zero_{which}"] = n * 2.0, n * (2.0 + asked["gap"])
        out[f"spliced_{which}"] = n * (2.0 + asked["gap"] * (1 - asked[f"ce_{which}"]))
    out["mean_post"] = n * (2.0 + asked["gap"] * (1 - asked["control"]))
    return out


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({}, FITS),
        ({"ev_post": 0.86, "ce_post": 0.975, "jaccard": 0.51}, FITS),
        ({"ev_post": 0.84}, LOSSES),
        ({"ce_post": 0.965}, LOSSES),
        ({"jaccard": 0.45}, LOSSES),
        ({"ev_post": 0.44}, DO_NOT_USE),
        ({"ce_post": 0.78}, DO_NOT_USE),
        ({"jaccard": 0.19}, DO_NOT_USE),
        ({"ce_post": 0.89, "control": 0.9}, DO_NOT_USE),
        ({"ev_base": 0.2, "ev_post": 0.17}, FITS),  # weak, and as weak
        ({"ev_base": 0.2, "ev_post": 0.155}, LOSSES),
        ({"gap": 0.01}, LOSSES),  # zeros do not harm: CE loss recovered can't be told
        ({"ev_base": -0.3, "ev_post": -0.3}, DO_NOT_USE),
    ],
)
def test_the_borders_are_those_of_the_page(asked: dict[str, float], word: str) -> None:
    found = judged(columns(**asked), 2000, 0)
    assert found.verdict == word
    assert bool(found.why) is (word != FITS)


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({}, FITS), ({"ev_post": 0.65}, LOSSES), ({"ce_post": 0.94}, LOSSES), ({"ev_post": 0.19}, DO_NOT_USE),
        ({"ce_post": 0.69, "control": 0.1}, DO_NOT_USE), ({"ce_post": 0.96, "control": 0.97}, DO_NOT_USE),
    ],
)  # fmt: skip
def test_without_a_base_the_borders_are_fixed(asked: dict[str, float], word: str) -> None:
    alone = {
        name: values for name, values in columns(**asked).items() if not name.endswith("base") and name != "jaccard"
    }
    assert judged(alone, 2000, 0).verdict == word


def test_little_text_gives_no_verdict() -> None:
    assert judged(columns(19), 1000, 0).why == ("19 documents, 20 are needed",)
    few = judged({name: values / 10 for name, values in columns(30).items()}, 2000, 0)
    assert few.verdict == UNTOLD
    assert "2,000 are needed" in few.why[0]


# Known checkpoints


def moved(model: Any, by: float) -> Any:
    """The model with every matrix moved by a part of its own size."""
    other = copy.deepcopy(model)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(by * parameter.std().nan_to_num() * torch.randn(parameter.shape, generator=g))
    return other


def tuned(lab: LoadedModel, steps: int = 12) -> Any:
    """A short fine-tuning on German."""
    model = copy.deepcopy(lab.model).train().requires_grad_(True)
    texts = [one.text for one in documents("train", 3, 16 * steps, ["talk"], ["de"])]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for i in range(steps):
        batch = lab.tokenizer(
            texts[16 * i : 16 * i + 16], return_tensors="pt", padding=True, truncation=True, max_length=64
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.eval().requires_grad_(False)


def shuffled(model: Any) -> Any:
    """The blocks in another order, none at its place."""
    other = copy.deepcopy(model)
    layers = other.model.layers
    order = [(i + 1) % len(layers) for i in range(len(layers))]
    other.model.layers = torch.nn.ModuleList(layers[i] for i in order)
    return other


def random(model: Any) -> Any:
    """New weights by the model's own way of beginning."""
    torch.manual_seed(0)
    return type(model)(copy.deepcopy(model.config)).eval().requires_grad_(False)


def verdict_on(lab: LoadedModel, sae: SAE, other: Any, rows: list[DocumentRows], alone: bool = False) -> Fit:
    ids = [one.ids[one.mask.all(1)] for one in rows]
    counted, counted_post = (
        measure_counted(model, lab.tokenizer, [part for part in ids if len(part)]) for model in (lab.model, other)
    )
    base = None if alone else lab.model
    return fit(measure_pair(base, other, {POINT: sae}, rows, counted=counted, counted_post=counted_post)[POINT])


@pytest.mark.parametrize("name", ["same", "fine-tuned", "shuffled", "random"])
def test_known_checkpoints_are_called_rightly(name: str, lab: LoadedModel, sae: SAE, rows: list[DocumentRows]) -> None:
    other = {"same": lambda: lab.model, "fine-tuned": lambda: tuned(lab), "shuffled": lambda: shuffled(lab.model),
             "random": lambda: random(lab.model)}[name]()  # fmt: skip
    found = verdict_on(lab, sae, other, rows)
    assert found.verdict in {"same": {FITS}, "fine-tuned": {FITS, LOSSES}}.get(name, {DO_NOT_USE}), found
    if name == "shuffled":
        assert verdict_on(lab, sae, other, rows, alone=True).verdict in (DO_NOT_USE, LOSSES)
    if name == "same":
        alone = verdict_on(lab, sae, other, rows, alone=True)
        assert (alone.verdict, alone.moves) == (FITS, None)
        assert found.figures["ev_fall"] == Estimate(0, 0, 0)
        assert found.moves is not None
        assert found.moves.moved == 0
