"""`Scope.extract` and `Scope.firings`: all that the commands do, with any engine, and on the tokens that count."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from full_disk import full_after
from torch import Tensor

from qwen_scope.analysis import counted_by, fit, mean_difference, predict
from qwen_scope.errors import InputError
from qwen_scope.model import HookPoint, capture
from qwen_scope.scope import Engine, ExtractOptions, Scope, load_scope
from qwen_scope.text import Counted

TEXTS = [text * n for n in (1, 2) for text in tiny.TEXTS]


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


class OneByOne:
    """An engine of one's own: each row for itself, the last one first."""

    def __init__(self, scope: Scope) -> None:
        self.model, self.read = scope.model, 0

    def activations(
        self, rows: Sequence[Sequence[int]], points: Sequence[HookPoint]
    ) -> Iterator[tuple[list[int], dict[HookPoint, Tensor]]]:
        for i in reversed(range(len(rows))):
            self.read += len(rows[i])
            yield [i], {point: h[0] for point, h in capture(self.model, torch.tensor([rows[i]]), points).items()}


def test_an_engine_of_ones_own_gives_the_same_store(scope: Scope, tmp_path: Path) -> None:
    engine, options = OneByOne(scope), ExtractOptions(counted=Counted.of(scope.tokenizer), pool=("mean",))
    assert isinstance(engine, Engine)
    with (
        scope.extract(TEXTS, tmp_path / "a", options, layers=[2]) as plain,
        scope.extract(TEXTS, tmp_path / "b", options, layers=[2], engine=engine) as own,
    ):
        assert engine.read == plain.manifest.tokens == own.manifest.tokens
        for table in ("tokens", "masked", "spans", "documents"):
            assert own.sql(f"SELECT * FROM {table} ORDER BY ALL") == plain.sql(f"SELECT * FROM {table} ORDER BY ALL")
        places = "SELECT document, position, feature FROM activations ORDER BY ALL"
        assert own.sql(places) == plain.sql(places)
        np.testing.assert_allclose(own.residuals(2), plain.residuals(2), atol=1e-5)


def by_hand(scope: Scope, text: str, counted: Counted, layer: int) -> tuple[np.ndarray, dict[int, float]]:
    """The mean residual and the largest activation of each feature over the tokens that count."""
    ids, point = scope.tokenizer(text)["input_ids"], HookPoint(layer)
    h = capture(scope.model, torch.tensor([ids]), [point])[point][0]
    limit = counted.norms.get(str(point)) or float("inf")
    keep = [
        p
        for p, token in enumerate(ids)
        if p >= counted.first and token not in counted.special and float(h[p].norm()) <= limit
    ]
    dense = scope.saes[layer].encode(h[keep]).to_dense().numpy()
    top = dense.max(0)
    return h[keep].double().mean(0).numpy(), {int(f): float(top[f]) for f in np.flatnonzero(top)}


def test_firings_are_of_the_tokens_that_count(scope: Scope) -> None:
    ids = scope.tokenizer(TEXTS[0])["input_ids"]
    norms = capture(scope.model, torch.tensor([ids]), [HookPoint(2)])[HookPoint(2)][0].norm(dim=-1)
    counted = replace(Counted.of(scope.tokenizer), norms={"layers.2.resid_post": 1.2 * float(norms.median())})
    found = scope.firings(TEXTS, [2], ExtractOptions(counted=counted), name="mine")
    assert found.counted == counted
    assert found.name == "mine"
    rows = found.table.to_pylist()
    for i, row in enumerate(found.rows):
        mean, top = by_hand(scope, TEXTS[row - 1], counted, 2)
        np.testing.assert_allclose(found.residuals[2][i], mean, atol=1e-5)
        assert {r["feature"]: r["value"] for r in rows if r["document"] == i} == pytest.approx(top, abs=1e-4)
        assert found.texts[i] == TEXTS[row - 1]


def test_documents_without_a_token_that_counts_are_left_out_and_counted(scope: Scope) -> None:
    one_token = next(t for t in "abcdefghij" if len(scope.tokenizer(t)["input_ids"]) == 1)
    found = scope.firings([TEXTS[0], one_token, TEXTS[1]], [2], ExtractOptions(counted=Counted(first=1)))
    assert found.rows == (1, 3)
    assert found.left_out == {"no token that counts": 1}
    assert set(found.table["document"].to_pylist()) == {0, 1}
    with pytest.raises(InputError, match=r"no document of .* has a token that counts; --count all counts every token"):
        scope.firings([one_token], [2], ExtractOptions(counted=Counted(first=1)))


@pytest.mark.slow
def test_fit_and_predict_count_the_same_tokens(scope: Scope) -> None:
    """The baseline of a fit is that of the counted residuals, and a rule is only asked about what it counted."""
    counted = ExtractOptions(counted=Counted.of(scope.tokenizer))
    positive = scope.firings([f"{t} Bahnhof" for t in TEXTS], [0, 2], counted, name="with")
    negative = scope.firings([f"{t} hello" for t in TEXTS], [0, 2], counted, name="without")
    rule, result = fit(positive, negative, (positive, negative))
    assert counted_by(rule) == counted.counted
    said = next(name for name in result.data["results"] if name.startswith("means, layer"))
    layer, labels = int(said.rpartition(" ")[2]), np.repeat([True, False], len(TEXTS))
    vectors = np.stack(
        [by_hand(scope, f"{t} {word}", counted_by(rule), layer)[0] for word in ("Bahnhof", "hello") for t in TEXTS]
    )
    called, _ = mean_difference(vectors, labels, vectors)
    recall = result.data["results"][said]["recall"]["estimate"]
    assert recall == pytest.approx(called[labels].mean())
    answers = predict(rule, positive)
    assert [one.row for one in answers] == list(positive.rows)
    assert any(one.label for one in answers)
    for one in answers:
        for shown, evidence in zip(one.tokens, one.because, strict=True):
            assert evidence.position >= 1
            assert shown == positive.tokens[one.row - 1][evidence.position]
    everything = scope.firings(TEXTS, [0, 2], ExtractOptions(counted=Counted.everything()))
    with pytest.raises(InputError, match=r"the rule 'with' and .* count other tokens: .*counted_by\(rule\)"):
        predict(rule, everything)


def test_a_full_disk_says_that_nothing_is_kept(scope: Scope) -> None:
    """The store of firings is temporary, so the command begins anew."""
    with (
        full_after(2000),
        pytest.raises(
            InputError, match=r"no room to write what was read, .*TMPDIR=FOLDER, and run the same command"
        ) as caught,
    ):
        scope.firings([{"text": text} for text in TEXTS], [0])
    assert "is kept, so" not in str(caught.value)
