"""Every metric against its definition restated in float64 on the whole data at once, to 1e-6."""

from __future__ import annotations

from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, capture, load_model
from qwen_scope.sae import SAE, FeatureActs, JumpReLU, TopK
from qwen_scope.text import Corpus, Counted, TokenRows
from qwen_scope.train import evaluate_residuals, evaluate_saes, transfer
from qwen_scope.train.transfer import jaccard

from .conftest import make_model, sentences

POINT = HookPoint(1)
ALL = Counted.everything()


def some_sae(kind: str, d_model: int = 32, d_sae: int = 64, seed: int = 1) -> SAE:
    """Random directions, an encoder that finds them, biases that matter."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_model, d_sae, generator=g), dim=0)
    weights = {
        "W_enc": 0.4 * W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": 0.01 * torch.randn(d_sae, generator=g),
        "b_dec": 0.1 * torch.randn(d_model, generator=g),
    }  # fmt: skip
    if kind == "topk":
        return TopK(**weights, k=5, hook_point=str(POINT))
    return JumpReLU(**weights, threshold=torch.full((d_sae,), 0.4), hook_point=str(POINT))


@pytest.fixture(scope="module")
def rows(loaded) -> list[torch.Tensor]:
    return list(
        islice(TokenRows(Corpus(sentences(400), repeat=True), loaded.tokenizer, context_length=24, batch_size=4), 6)
    )


def by_definition(sae: SAE, x: torch.Tensor, first: torch.Tensor) -> dict[str, float]:
    """The figures from dense float64 arithmetic that shares no code with the package."""
    W_enc, W_dec, b_enc, b_dec = (t.double().numpy() for t in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec))
    X = x.double().numpy()
    pre = X @ W_enc.T + b_enc
    acts = np.maximum(pre, 0)
    if isinstance(sae, TopK):
        cut = np.sort(acts, axis=1)[:, -sae.k][:, None]
        acts = np.where(acts >= cut, acts, 0)
    else:
        acts = np.where(pre > sae.threshold.double().numpy(), acts, 0)
    X_hat = acts @ W_dec.T + b_dec
    error, total = ((X - X_hat) ** 2).sum(1), ((X - X.mean(0)) ** 2).sum(1)
    later = ~first.numpy()
    total_later = ((X[later] - X[later].mean(0)) ** 2).sum()
    cosine = (X * X_hat).sum(1) / np.linalg.norm(X, axis=1) / np.linalg.norm(X_hat, axis=1)
    return {
        "fvu": error.sum() / total.sum(),
        "fvu_without_first": error[later].sum() / total_later,
        "explained_variance": 1 - error.sum() / total.sum(),
        "explained_variance_per_token": (1 - error / total).mean(),
        "cosine": cosine.mean(),
        "l0": (acts > 0).sum(1).mean(),
        "dead": (~(acts > 0).any(0)).mean(),
        "fired": (acts > 0).sum(0),
    }


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_reconstruction_agrees_with_the_definitions_in_float64(loaded, rows: list[torch.Tensor], kind: str) -> None:
    sae = some_sae(kind)
    figures = evaluate_saes(loaded.model, {POINT: sae}, rows, loss=False, counted=ALL)[POINT]
    x = torch.cat([capture(loaded.model, ids, [POINT])[POINT].flatten(0, 1) for ids in rows])
    first = torch.zeros(len(x), dtype=torch.bool)
    first[::24] = True
    expected = by_definition(sae, x, first)
    fired = expected.pop("fired")
    got = asdict(figures.reconstruction)
    assert got["tokens"] == len(x)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
    counts, _ = np.histogram(np.log10(fired[fired > 0] / len(x)), bins=[-6 + 0.25 * i for i in range(25)])
    assert list(got["density"]) == counts.tolist()
    assert figures.loss is None
    assert "kl" not in figures.plain()


@pytest.mark.parametrize("cuts", [1, 2, 3, 4])
def test_the_figure_per_token_is_the_legacy_one_of_sae_lens_for_one_batch_only(loaded, cuts: int) -> None:
    """sae_lens' `explained_variance_legacy`, restated: per token, against the mean of the batch it came in."""
    sae = some_sae("topk")
    ids = torch.cat(
        list(
            islice(TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=24, batch_size=8), 3)
        )
    )
    rows = list(ids.split(len(ids) // cuts))
    figures = evaluate_saes(loaded.model, {POINT: sae}, rows, loss=False, counted=ALL)[POINT].reconstruction
    legacy, xs = [], []
    for batch in rows:
        x = capture(loaded.model, batch, [POINT])[POINT].flatten(0, 1).double()
        x_hat = sae.decode(sae.encode(x.float())).double()
        legacy.append(1 - (x - x_hat).pow(2).sum(1) / (x - x.mean(0)).pow(2).sum(1))
        xs.append((x, x_hat))
    x, x_hat = (torch.cat(part) for part in zip(*xs, strict=True))
    ours = 1 - ((x - x_hat).pow(2).sum(1) / (x - x.mean(0)).pow(2).sum(1)).mean()
    assert figures.explained_variance_per_token == pytest.approx(float(ours), abs=1e-7)
    assert (abs(float(torch.cat(legacy).mean() - ours)) < 1e-7) == (cuts == 1)


@torch.no_grad()
def test_spliced_loss_agrees_with_a_forward_pass_by_hand(loaded, rows: list[torch.Tensor]) -> None:
    """The blocks after the hook point are run here one by one on the reconstruction."""
    sae, model = some_sae("topk"), loaded.model
    ids = torch.cat(rows)

    def logits_from(h: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(ids.shape[1])[None]
        rope = model.model.rotary_emb(h, positions)
        mask = torch.full((24, 24), -torch.inf).triu(1)[None, None].expand(len(h), 1, -1, -1)
        for block in model.model.layers[2:]:
            h = block(h, attention_mask=mask, position_ids=positions, position_embeddings=rope)
        return model.lm_head(model.model.norm(h)).double()

    h = capture(model, ids, [POINT])[POINT]
    x_hat = sae.decode(sae.encode(h))
    clean, spliced, zero = (logits_from(each) for each in (h, x_hat, torch.zeros_like(h)))
    torch.testing.assert_close(clean, model(ids).logits.double(), rtol=1e-5, atol=1e-5)

    def ce(logits: torch.Tensor) -> float:
        p = torch.softmax(logits[:, :-1], -1)
        return float(-torch.gather(p, 2, ids[:, 1:, None]).log().mean())

    p, q = torch.softmax(clean, -1), torch.softmax(spliced, -1)
    kl = float((p * (p / q).log()).sum(-1).mean())
    got = evaluate_saes(model, {POINT: sae}, rows, counted=ALL)[POINT].loss
    assert got is not None
    assert got.ce_clean == pytest.approx(ce(clean), abs=1e-6)
    assert got.ce_spliced == pytest.approx(ce(spliced), abs=1e-6)
    assert got.ce_zero == pytest.approx(ce(zero), abs=1e-6)
    assert got.kl == pytest.approx(kl, abs=1e-6)
    assert got.ce_recovered == pytest.approx((ce(zero) - ce(spliced)) / (ce(zero) - ce(clean)), abs=1e-6)


def test_a_perfect_dictionary_loses_nothing(loaded, rows: list[torch.Tensor]) -> None:
    eye, none = torch.eye(32), torch.zeros(32)
    W_enc, W_dec = torch.cat([eye, -eye]), torch.cat([eye, -eye], dim=1)
    sae = TopK(W_enc, W_dec, torch.zeros(64), none, k=32, hook_point=str(POINT))
    found = evaluate_saes(loaded.model, {POINT: sae}, rows, counted=ALL)[POINT]
    assert found.reconstruction.fvu == pytest.approx(0, abs=1e-10)
    assert found.reconstruction.cosine == pytest.approx(1)
    assert found.loss is not None
    assert found.loss.ce_recovered == pytest.approx(1, abs=1e-6)
    assert found.loss.kl == pytest.approx(0, abs=1e-9)


def test_masked_tokens_are_not_looked_at_and_keep_their_residual(loaded, rows: list[torch.Tensor]) -> None:
    sae, special = some_sae("topk"), int(rows[0][0, 3])
    h = [capture(loaded.model, ids, [POINT])[POINT] for ids in rows]
    norms = h[0].norm(dim=-1)
    # So that a tenth or so of the first batch are sinks: in this model all norms are alike.
    multiple = max(1.001, float(norms.quantile(0.9) / norms.median()))
    kept = torch.cat(
        [((ids != special) & (x.norm(dim=-1) <= multiple * norms.median())) for ids, x in zip(rows, h, strict=True)]
    )
    first = torch.zeros_like(kept)
    first[:, 0] = True
    expected = by_definition(sae, torch.cat(h)[kept], first[kept])
    counted = Counted(0, frozenset({special}), {str(POINT): float(multiple * norms.median())})
    found = evaluate_saes(loaded.model, {POINT: sae}, rows, counted=counted)[POINT]
    assert 0 < found.reconstruction.left_out == int((~kept).sum()) < kept.numel() / 2
    assert found.reconstruction.tokens == int(kept.sum())
    for name in ("fvu", "fvu_without_first", "cosine", "l0", "dead"):
        assert getattr(found.reconstruction, name) == pytest.approx(expected[name], rel=1e-6)
    # What would be replaced by zeros is not: with nearly all left out the model is nearly untouched.
    whole = evaluate_saes(loaded.model, {POINT: sae}, rows, counted=ALL)[POINT]
    assert found.loss is not None
    assert whole.loss is not None
    assert abs(found.loss.ce_zero - found.loss.ce_clean) < abs(whole.loss.ce_zero - whole.loss.ce_clean)
    with pytest.raises(InputError, match=r"every token at layers\.1\.resid_post is left out"):
        evaluate_saes(loaded.model, {POINT: sae}, rows, counted=Counted(special=frozenset(range(10_000))))


def test_large_vocabularies_are_taken_in_pieces(
    loaded, rows: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_scope.train import splice

    whole = evaluate_saes(loaded.model, {POINT: some_sae("topk")}, rows)[POINT].loss
    monkeypatch.setattr(splice, "LOGIT_BYTES", 4 * 20 * 24)
    pieces = evaluate_saes(loaded.model, {POINT: some_sae("topk")}, rows)[POINT].loss
    assert whole is not None
    assert pieces is not None
    assert asdict(pieces) == pytest.approx(asdict(whole), abs=1e-6)


def test_what_can_not_be_measured_is_refused(loaded, rows: list[torch.Tensor]) -> None:
    with pytest.raises(InputError, match="no SAE"):
        evaluate_saes(loaded.model, {}, rows)
    with pytest.raises(InputError, match="no tokens"):
        evaluate_saes(loaded.model, {POINT: some_sae("topk")}, [])
    with pytest.raises(MismatchError, match="reads 16 dimensions, but the model has 32"):
        evaluate_saes(loaded.model, {POINT: some_sae("topk", d_model=16)}, rows)
    with pytest.raises(InputError, match="no residuals"):
        evaluate_residuals(some_sae("topk"), lambda: [])
    with pytest.raises(InputError, match="at least two rows"):
        transfer(loaded.model, loaded.model, {POINT: some_sae("topk")}, [rows[0][:1]])


def test_jaccard_is_the_overlap_of_the_active_sets() -> None:
    g = torch.Generator().manual_seed(0)
    a = FeatureActs.from_dense((torch.rand(40, 12, generator=g) - 0.5).relu())
    b = FeatureActs.from_dense((torch.rand(40, 12, generator=g) - 0.7).relu())
    a.values[0] = b.values[0] = 0
    sets = [
        [{int(i) for i, v in zip(*row, strict=True) if v > 0} for row in zip(f.indices, f.values, strict=True)]
        for f in (a, b)
    ]
    expected = [len(s & t) / len(s | t) if s | t else 1.0 for s, t in zip(*sets, strict=True)]
    assert jaccard(a, b).tolist() == pytest.approx(expected)


def test_transfer_to_the_same_model_changes_nothing(loaded, rows: list[torch.Tensor]) -> None:
    found = transfer(loaded.model, loaded.model, {POINT: some_sae("topk")}, rows)[POINT]
    assert found.fvu_base == found.fvu_post
    assert (found.fvu_rise.low, found.fvu_rise.high) == (0, 0)
    assert (found.jaccard.value, found.cosine_residuals.value) == pytest.approx((1, 1))


def test_transfer_agrees_with_the_definitions_and_its_intervals_cover(
    loaded, rows: list[torch.Tensor], tmp_path: Path
) -> None:
    post = load_model(make_model(tmp_path / "post", seed=0), device="cpu").model
    with torch.no_grad():
        for parameter in post.parameters():
            parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    sae = some_sae("topk")
    found = transfer(loaded.model, post, {POINT: sae}, rows)[POINT]
    x, y = (
        torch.cat([capture(m, ids, [POINT])[POINT][:, 1:].flatten(0, 1) for ids in rows]) for m in (loaded.model, post)
    )
    none = torch.zeros(len(x), dtype=torch.bool)
    of_x, of_y = by_definition(sae, x, none), by_definition(sae, y, none)
    assert found.fvu_base.value == pytest.approx(of_x["fvu"], abs=1e-6)
    assert found.fvu_post.value == pytest.approx(of_y["fvu"], abs=1e-6)
    assert found.cosine_post.value == pytest.approx(of_y["cosine"], abs=1e-6)
    both = torch.cosine_similarity(x.double(), y.double()).mean()
    assert found.cosine_residuals.value == pytest.approx(float(both), abs=1e-6)
    dense_x, dense_y = (sae.encode(t).to_dense() > 0 for t in (x, y))
    overlap = (dense_x & dense_y).sum(1).double() / (dense_x | dense_y).sum(1)
    assert found.jaccard.value == pytest.approx(float(overlap.mean()), abs=1e-6)
    for estimate in vars(found).values():
        assert estimate.low <= estimate.value <= estimate.high
    assert found.jaccard.low < found.jaccard.high


def test_the_intervals_have_the_width_of_the_standard_error() -> None:
    """For a plain mean over rows of equal length, the bootstrap interval is about 1.96 standard errors wide."""
    from qwen_scope.train.transfer import SUMS, estimates

    g = np.random.default_rng(0)
    sums = np.ones((400, len(SUMS)))
    sums[:, SUMS.index("jaccard")] = g.normal(0.5, 0.1, 400)
    found = estimates(sums, seed=0).jaccard
    error = sums[:, SUMS.index("jaccard")].std() / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
