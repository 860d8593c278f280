"""Features of two dictionaries beside each other, against brute force."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import lab_store
import numpy as np
import pytest
import torch

from qwen_scope import load_sae
from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.features import MatchOptions, common_firings, match
from qwen_scope.features import nearest as tiles
from qwen_scope.lab import documents
from qwen_scope.sae import FeatureActs, TopK
from qwen_scope.store import FeatureStore

SMALL = MatchOptions(tile=48, sample=64, draws=3)


def dictionary(seed: int, d_sae: int = 160, d_model: int = 24, k: int = 8, noise: float | None = None) -> TopK:
    """Columns around one mean; with `noise`, those of seed 0 in another order, moved a little."""
    torch.manual_seed(seed)
    columns = torch.randn(d_model, d_sae) + 0.5
    if noise is not None:
        order = torch.randperm(d_sae)
        torch.manual_seed(0)
        columns = (torch.randn(d_model, d_sae) + 0.5)[:, order]
        torch.manual_seed(seed + 1)
        columns = columns + noise * torch.randn(d_model, d_sae)
    return TopK(columns.T.contiguous(), columns, torch.zeros(d_sae), torch.zeros(d_model), k=k)


def brute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every cosine, one by one."""
    return np.array([[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b.T] for x in a.T])


def brute_jaccard(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Every Jaccard index of tokens, from sets."""
    mine, others = ([set(np.flatnonzero(column).tolist()) for column in one.T] for one in (a, b))
    return np.array([[len(x & y) / len(x | y) if x | y else 0.0 for y in others] for x in mine])


@pytest.mark.parametrize("noise", [None, 0.0, 0.6])
def test_partners_are_those_of_brute_force(noise: float | None) -> None:
    a, b = dictionary(0), dictionary(3, d_sae=130 if noise is None else 160, noise=noise)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(5))
    seen = (a.encode(x), b.encode(x))
    found = match(a, b, seen, dataclasses.replace(SMALL, cosine=0.7, jaccard=0.2))

    every = brute(a.W_dec.double().numpy(), b.W_dec.double().numpy())
    assert found.cosine.partner.tolist() == every.argmax(1).tolist()
    np.testing.assert_allclose(found.cosine.score, every.max(1), atol=1e-6)
    assert found.cosine.share == pytest.approx((every.max(1) >= 0.7).mean())
    assert found.cosine.mean == pytest.approx(every.max(1).mean(), abs=1e-6)
    mutual = every.argmax(0)[every.argmax(1)] == np.arange(160)
    assert found.cosine.mutual_share == pytest.approx((mutual & (every.max(1) >= 0.7)).mean())
    assert found.cosine.unmatched == np.flatnonzero(every.max(1) < 0.7).tolist()
    assert found.cosine.unmatched_back == np.flatnonzero(every.max(0) < 0.7).tolist()

    dense = [one.to_dense().numpy() > 0 for one in seen]
    every = brute_jaccard(*dense)
    alive = np.flatnonzero(dense[0].any(0))
    assert found.jaccard is not None
    assert found.tokens == 300
    assert found.jaccard.features.tolist() == alive.tolist()
    np.testing.assert_allclose(found.jaccard.score, every.max(1)[alive], atol=1e-12)
    some = every.max(1)[alive] > 0
    assert found.jaccard.partner[some].tolist() == every.argmax(1)[alive][some].tolist()
    assert found.jaccard.share == pytest.approx((every.max(1)[alive] >= 0.2).mean())
    back = np.flatnonzero(dense[1].any(0) & (every.max(0) > 0) & (every.max(0) < 0.2)).tolist()
    assert found.jaccard.unmatched_back == back
    chance, corrected = found.cosine.chance.mean, found.cosine.corrected
    assert corrected is not None
    assert corrected.estimate == pytest.approx((found.cosine.mean - chance) / (1 - chance))
    assert corrected.low <= corrected.estimate <= corrected.high
    if noise == 0.0:
        assert found.cosine.share == found.cosine.mutual_share == found.agree == 1.0
        assert corrected.low > 0.999


@pytest.mark.parametrize("how", ["entries", "within columns", "within rows", "along one permutation of dimensions"])
def test_a_shuffled_dictionary_is_called_chance(how: str) -> None:
    a, b, rng = dictionary(0, d_sae=400), dictionary(3, d_sae=400, noise=0.3), np.random.default_rng(1)
    assert match(a, b, options=SMALL).cosine.at_chance is False
    columns = b.W_dec.numpy().copy()
    if how == "entries":
        columns = rng.permutation(columns.ravel()).reshape(columns.shape)
    elif how == "within columns":
        columns = rng.permuted(columns, axis=0)
    elif how == "within rows":
        columns = rng.permuted(columns, axis=1)
    else:
        columns = columns[rng.permutation(len(columns))]
    columns = torch.from_numpy(np.ascontiguousarray(columns))
    found = match(a, TopK(columns.T.contiguous(), columns, b.b_enc, b.b_dec, k=b.k), options=SMALL)
    assert found.cosine.at_chance is True
    assert found.cosine.share == pytest.approx(found.cosine.chance.share, abs=0.12)


def test_shuffled_tokens_are_called_chance() -> None:
    a = dictionary(0)
    acts = a.encode(torch.randn(500, 24, generator=torch.Generator().manual_seed(5)))
    order = torch.randperm(500, generator=torch.Generator().manual_seed(1))
    same, other = (match(a, a, (acts, acts[rows]), SMALL).jaccard for rows in (slice(None), order))
    assert same is not None
    assert same.share == 1.0
    assert same.at_chance is False
    assert other is not None
    assert other.at_chance is True
    assert other.share < 0.05


def test_two_trainings_of_unrelated_directions_are_chance_although_the_mean_is_shared() -> None:
    """Random columns around one mean have high cosines; that is what the shuffled control has, too."""
    found = match(dictionary(0, d_sae=500), dictionary(9, d_sae=500), options=SMALL).cosine
    assert found.mean > 0.5
    assert found.at_chance is True


def test_some_features_alone_have_the_answer_of_all() -> None:
    a, b = dictionary(0), dictionary(3, noise=0.4)
    x = torch.randn(200, 24, generator=torch.Generator().manual_seed(5))
    seen = (a.encode(x), b.encode(x))
    every, some = match(a, b, seen, SMALL), match(a, b, seen, SMALL, features=[7, 3, 150])
    assert every.jaccard is not None
    assert some.jaccard is not None
    for feature in (3, 7, 150):
        assert some.cosine.of(feature) == pytest.approx(every.cosine.of(feature))
        if feature in every.jaccard.features:
            assert some.jaccard.of(feature) == every.jaccard.of(feature)
    assert some.cosine.chance == every.cosine.chance
    assert some.cosine.back is some.cosine.corrected is some.cosine.at_chance is None


def test_a_column_of_zeros_has_no_partner() -> None:
    a = dictionary(0)
    a.W_dec[:, 4] = 0
    found = match(a, dictionary(3), options=SMALL).cosine
    assert found.of(4) == (-1, 0.0, False)
    assert 4 in found.unmatched


def test_shuffling_moves_every_number_within_its_row() -> None:
    rows = torch.arange(12.0).repeat(5, 1) + 100 * torch.arange(5)[:, None]
    out = tiles.shuffled(rows, np.random.default_rng(0))
    assert torch.equal(out.sort(dim=1).values, rows)
    assert len({tuple((row - row.min()).tolist()) for row in out}) > 3


def test_full_width_stays_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """131,072 features: no matrix of features by features, no more memory than tiles and counts take."""
    width, k, n = 131_072, 16, 2_000
    shapes: list[tuple[int, int]] = []
    see = tiles._Running.see

    def watched(self: tiles._Running, at: int, to: int, scores: torch.Tensor) -> None:
        shapes.append(tuple(scores.shape))
        see(self, at, to, scores)

    monkeypatch.setattr(tiles._Running, "see", watched)
    rng = np.random.default_rng(0)
    columns = torch.from_numpy(rng.standard_normal((4, width), np.float32))
    sae = TopK(columns.T.contiguous(), columns, torch.zeros(width), torch.zeros(4), k=k)
    indices = torch.from_numpy(np.argsort(rng.random((n, 64)), 1)[:, :k] + 2048 * rng.integers(0, 64, (n, 1)))
    acts = FeatureActs(indices.int(), torch.ones(n, k), width)
    tracemalloc.start()
    asked = np.arange(0, width, 256)  # every feature's partner would take the test a minute
    found = match(sae, sae, (acts, acts), MatchOptions(tile=4096, sample=64, draws=1), features=asked.tolist())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (found.cosine.partner == asked).all()
    assert max(max(shape) for shape in shapes) <= 4096
    assert found.jaccard is not None
    assert found.jaccard.share == 1.0
    assert peak < 100e6  # 512 by 131,072 counts of 4 bytes alone would be 270 MB


def test_firings_of_a_store_are_what_the_sae_found(store: FeatureStore) -> None:
    """Against the model itself, document by document."""
    seen = common_firings(store, lab_store.LAYER, store, lab_store.OTHER)
    scope, at = lab_store.scope(), 0
    texts = store.sql("SELECT document, string_agg(text, '' ORDER BY position) AS t FROM tokens GROUP BY 1 ORDER BY 1")
    for text in texts["t"].to_pylist()[:6]:
        found = scope.features([text], layers=[lab_store.LAYER, lab_store.OTHER])
        n = int(found.mask.sum())
        for acts, layer in zip(seen, (lab_store.LAYER, lab_store.OTHER), strict=True):
            torch.testing.assert_close(acts[at : at + n].to_dense(), found.acts[layer][0, :n].to_dense())
        at += n
    assert seen[0].shape.numel() == store.manifest.tokens


def test_the_first_tokens_of_a_store(store: FeatureStore) -> None:
    every, some = (common_firings(store, 5, store, 5, n)[0] for n in (None, 100))
    assert torch.equal(some.to_dense(), every[:100].to_dense())


def test_other_documents_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    from qwen_scope.scope import ExtractOptions, extract
    from qwen_scope.text import Corpus

    scope = lab_store.scope()
    saes = {5: scope.saes[5]}
    extract(Corpus([{"text": "Good morning."}], name="x"), scope.loaded, saes, tmp_path / "b", ExtractOptions()).close()
    with FeatureStore(tmp_path / "b") as other, pytest.raises(MismatchError, match="extract both from one corpus"):
        common_firings(store, 5, other, 5)
    with pytest.raises(NotFoundError, match="has no layer 3"):
        common_firings(store, 3, store, 5)


def test_what_can_t_be_compared_is_one_sentence() -> None:
    a = dictionary(0)
    with pytest.raises(MismatchError, match=r"residuals of 24 dimensions and .* of 8") as said:
        match(a, dictionary(0, d_model=8))
    assert "\n" not in str(said.value)
    acts = a.encode(torch.randn(10, 24))
    with pytest.raises(MismatchError, match="10 and 9 tokens"):
        match(a, a, (acts, acts[:9]))
    with pytest.raises(MismatchError, match="activations of 160 features"):
        match(a, dictionary(0, d_sae=20), (acts, acts))
    with pytest.raises(NotFoundError, match="features 0 to 159"):
        match(a, a, features=[160])
    with pytest.raises(InputError, match="cosine is above 0"):
        MatchOptions(cosine=0.0)
    bad = dictionary(1)
    bad.W_dec[0, 0] = float("nan")
    with pytest.raises(InputError, match="W_dec"):
        match(a, bad)


def test_the_lab_s_layers(store: FeatureStore) -> None:
    """Neighbouring layers of the bundled SAEs, by both measures."""
    a, b = (load_sae("lab", layer) for layer in (lab_store.LAYER, lab_store.OTHER))
    found = match(a, b, common_firings(store, lab_store.LAYER, store, lab_store.OTHER), SMALL)
    plain = found.to_json()
    assert plain["cosine"]["features"] == a.d_sae
    assert plain["tokens"] == store.manifest.tokens
    assert len(found.rows()) == a.d_sae
    assert {len(row) for row in found.rows()} == {6}


def residuals() -> torch.Tensor:
    """Of the lab's layer 3 on some texts, `(tokens, d_model)`."""
    texts = [document.text for document in documents(seed=7, n=24, kinds=["talk"])]
    scope = lab_store.scope()
    tokens = scope.tokenize(texts, truncate=True)
    h = scope.capture(tokens, [3])[3]
    return h[tokens.attention_mask.bool()].float()


def trained(x: torch.Tensor, seed: int, k: int) -> TopK:
    """A short training."""
    from qwen_scope.train import ResidualTable, TrainConfig, train

    config = TrainConfig(d_sae=256, k=k, tokens=30 * 512, batch=512, seed=seed)
    (sae,) = train(config, ResidualTable({"layers.3.resid_post": x}, 512)).values()
    assert isinstance(sae, TopK)
    return sae


@pytest.mark.parametrize("other", [(1, 20), (0, 40)])
def test_two_trainings_share_what_brute_force_says(other: tuple[int, int]) -> None:
    """Two seeds, and k 20 against k 40, on the lab; a shuffle of the second, or of its tokens, is chance."""
    x = residuals()
    a, b = trained(x, 0, 20), trained(x, *other)
    seen = a.encode(x), b.encode(x)
    options = dataclasses.replace(SMALL, sample=256, jaccard=0.3)
    found = match(a, b, seen, options)
    every = brute(a.W_dec.double().numpy(), b.W_dec.double().numpy())
    assert found.cosine.share == pytest.approx((every.max(1) >= 0.7).mean())
    assert found.cosine.mean == pytest.approx(every.max(1).mean(), abs=1e-6)
    assert found.cosine.at_chance is False

    dense = [one.to_dense().numpy() > 0 for one in seen]
    together = brute_jaccard(*dense)[dense[0].any(0)].max(1)
    assert found.jaccard is not None
    assert found.jaccard.share == pytest.approx((together >= 0.3).mean())
    assert found.jaccard.mean == pytest.approx(together.mean())
    assert found.jaccard.at_chance is False
    assert (found.cosine.share, found.jaccard.share) != (0.0, 0.0)

    mixed = torch.from_numpy(np.random.default_rng(0).permuted(b.W_dec.float().numpy(), axis=0))
    shuffled = TopK(mixed.T.contiguous(), mixed, b.b_enc, b.b_dec, k=b.k)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    chance = match(a, shuffled, (seen[0], seen[1][order]), options)
    assert chance.cosine.at_chance is True
    assert chance.jaccard is not None
    assert chance.jaccard.at_chance is True
