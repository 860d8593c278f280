"""What a card says of a feature in other dictionaries, against brute force: another seed, another k, a shuffled
dictionary, and the same SAE on a fine-tuned checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lab_store
import numpy as np
import pytest
import torch

from qwen_scope import FeatureStore, load_scope, save_sae
from qwen_scope.lab import documents
from qwen_scope.model import LoadedModel, load_model
from qwen_scope.sae import SAE, TopK
from qwen_scope.scope import ExtractOptions, Scope, extract, model_source
from qwen_scope.text import Corpus, Counted
from qwen_scope.train import ResidualTable, TrainConfig, train
from qwen_scope.trust import Other, card, card_html, card_tables

LAYER = 3
DICTIONARIES = {"base": (0, 20), "another seed": (1, 20), "another k": (0, 40)}
TEXTS = [document.text for document in documents(seed=7, n=12, kinds=["talk"])]
CARDS = 6


def trained(x: torch.Tensor, seed: int, k: int) -> TopK:
    config = TrainConfig(d_sae=256, k=k, tokens=80 * 512, batch=512, seed=seed)
    (sae,) = train(config, ResidualTable({f"layers.{LAYER}.resid_post": x}, 512)).values()
    assert isinstance(sae, TopK)
    return sae


def read(sae: SAE, loaded: LoadedModel, out: Path) -> FeatureStore:
    every = ExtractOptions(counted=Counted.everything())
    return extract(Corpus(TEXTS, name="talk"), loaded, {LAYER: sae}, out, every)


@pytest.fixture(scope="module")
def saes() -> dict[str, TopK]:
    tokens = lab_store.scope().tokenize(TEXTS, truncate=True)
    x = lab_store.scope().capture(tokens, [LAYER])[LAYER][tokens.attention_mask.bool()].float()
    return {name: trained(x, *how) for name, how in DICTIONARIES.items()}


@pytest.fixture(scope="module")
def stores(saes: Mapping[str, TopK], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FeatureStore]]:
    """The same documents as each dictionary reads them, and as the first reads a fine-tuned checkpoint."""
    place, scope = tmp_path_factory.mktemp("stability"), lab_store.scope()
    lab = LoadedModel(scope.model, scope.tokenizer, "lab")
    found = {name: read(sae, lab, place / name) for name, sae in saes.items()}
    found["fine-tuned"] = read(saes["base"], tuned(), place / "fine-tuned")
    yield found
    for store in found.values():
        store.close()


@pytest.fixture(scope="module")
def scope(saes: Mapping[str, TopK], tmp_path_factory: pytest.TempPathFactory) -> Scope:
    """The lab's model with the first dictionary."""
    place = tmp_path_factory.mktemp("sae") / "base"
    save_sae(saes["base"], place, layout="safetensors")
    return load_scope("lab", place, device="cpu")


def tuned() -> LoadedModel:
    """The lab after a few steps of training on other text, under a name of its own."""
    own = load_model(model_source("lab"), device="cpu", dtype="float32")
    ids = own.tokenizer([d.text for d in documents(seed=11, n=8, kinds=["repetition"])], padding=True)
    rows = torch.tensor(ids["input_ids"])
    own.model.requires_grad_(True)
    optimiser = torch.optim.AdamW(own.model.parameters(), lr=3e-4)
    for _ in range(4):
        own.model(input_ids=rows, labels=rows).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return LoadedModel(own.model.eval(), own.tokenizer, "lab-fine-tuned")


def fires(store: FeatureStore) -> np.ndarray:
    """On which tokens each feature fires, `(tokens, d_sae)`, read from the store's table."""
    where = store.sql(
        "SELECT row_number() OVER (ORDER BY document, position) - 1 AS row, document, position FROM tokens"
    )
    row = {(d, p): r for r, d, p in zip(*(where[c].to_pylist() for c in ("row", "document", "position")), strict=True)}
    out = np.zeros((len(row), store.layer(LAYER).d_sae), bool)
    found = store.sql("SELECT document, position, feature FROM activations WHERE layer = ?", [LAYER])
    for d, p, f in zip(*(found[c].to_pylist() for c in ("document", "position", "feature")), strict=True):
        out[row[d, p], f] = True
    return out


def unit(sae: SAE) -> np.ndarray:
    columns = sae.W_dec.double().numpy()
    return columns / np.linalg.norm(columns, axis=0)


def some(on: np.ndarray, cosines: np.ndarray) -> list[int]:
    """Features that fire: those with the nearest directions in another dictionary, and those with the farthest."""
    alive = np.flatnonzero(on.sum(0) >= 5)
    order = alive[np.argsort(cosines[alive].max(1))]
    return [*order[: CARDS // 2].tolist(), *order[-CARDS // 2 :].tolist()]


def jaccard(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of a feature's tokens with those of each feature."""
    sets = [set(np.flatnonzero(column).tolist()) for column in (one, *others.T)]
    return np.array([len(sets[0] & b) / len(sets[0] | b) if sets[0] | b else 0.0 for b in sets[1:]])


@pytest.mark.parametrize("name", ["another seed", "another k"])
def test_the_card_s_partners_are_those_of_brute_force(
    name: str, saes: Mapping[str, TopK], stores: Mapping[str, FeatureStore], scope: Scope
) -> None:
    """Partner, cosine, mutual, Jaccard and `found` of each feature, and so the share of features that are found."""
    mine, other = fires(stores["base"]), fires(stores[name])
    cosines = unit(saes["base"]).T @ unit(saes[name])
    there = Other(name, saes[name], stores[name], LAYER)
    told, held = {}, {"found": 0, "beyond chance": 0}
    for feature in (features := some(mine, cosines)):
        plain: dict[str, Any] = json.loads(
            json.dumps(card(LAYER, feature, store=stores["base"], scope=scope, others=[there]).to_json())
        )
        (told,) = plain["siblings"]
        best = int(cosines[feature].argmax())
        assert told["partner"] == best
        assert told["cosine"] == pytest.approx(cosines[feature, best], abs=1e-5)
        assert told["mutual"] is bool(cosines[:, best].argmax() == feature)
        together = jaccard(mine[:, feature], other)
        assert told["jaccard"] == pytest.approx(together.max())
        assert told["cofires_with"] in np.flatnonzero(together == together.max())
        by_direction = cosines[feature, best] >= 0.7
        assert told["found"] is bool(by_direction or together.max() >= 0.5)  # both are far above chance here
        assert told["chance"] < 0.7
        assert told["chance_jaccard"] < 0.5
        assert told["at_chance"] is bool(told["cosine"] <= told["chance"] and told["jaccard"] <= told["chance_jaccard"])
        held["found"] += told["found"]
        held["beyond chance"] += not told["at_chance"]
    assert set(told["differs"]) == {"weights" if name == "another seed" else "k"}
    assert len(features) == CARDS
    assert held["beyond chance"] > 0
    # Two seeds share no direction after so short a training, which the card says; two k share some.
    assert 0 < held["found"] < CARDS if name == "another k" else held["found"] == 0


def test_a_shuffled_dictionary_is_called_chance_by_the_card(
    saes: Mapping[str, TopK], stores: Mapping[str, FeatureStore], scope: Scope
) -> None:
    """The columns' numbers dealt to other columns, dimension by dimension: what is left is their spread."""
    b = saes["another seed"]
    mixed = torch.from_numpy(np.random.default_rng(0).permuted(b.W_dec.float().numpy(), axis=1))
    shuffled = TopK(mixed.T.contiguous(), mixed, b.b_enc, b.b_dec, k=b.k)
    others = [Other("shuffled", shuffled), Other("another seed", b)]
    features = some(fires(stores["base"]), unit(saes["base"]).T @ unit(b))
    found = [card(LAYER, f, store=stores["base"], scope=scope, others=others) for f in features]
    assert not any(one.siblings[0].found for one in found)
    assert sum(one.siblings[0].at_chance for one in found) >= CARDS - 1  # 1 of 100 lies above the limit
    assert sum(one.siblings[1].at_chance for one in found) <= CARDS // 2  # the farthest may be
    assert next(one for one in found if one.siblings[0].at_chance).to_json()["siblings"][0]["at_chance"] is True
    tables = {title: rows for title, _, rows in card_tables(found[0])}
    assert tables["In other dictionaries"][0][-1] == "no, as chance"
    assert "no, as chance" in card_html(found[0])


def test_the_same_dictionary_on_a_fine_tuned_checkpoint(
    saes: Mapping[str, TopK], stores: Mapping[str, FeatureStore], scope: Scope
) -> None:
    """Its directions are the same, so what counts is whether a feature fires on the same tokens of the same text."""
    base, after = fires(stores["base"]), fires(stores["fine-tuned"])
    assert (base != after).any()
    there = Other("fine-tuned", saes["base"], stores["fine-tuned"], LAYER)
    found = 0
    for feature in some(base, np.eye(base.shape[1])):
        made = card(LAYER, feature, store=stores["base"], scope=scope, others=[there])
        (told,) = made.siblings
        together = jaccard(base[:, feature], after)
        assert told.differs == ("model",)
        assert told.partner == feature
        assert told.jaccard == pytest.approx(together.max())
        same = told.cofires_with == feature
        assert told.found is bool(together[feature] >= 0.5 and same)
        assert told.comparable
        assert not any("other checkpoints" in one for one in made.missing)
        found += told.found
    assert found > 0
