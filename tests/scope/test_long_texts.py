"""Texts that are longer than a forward pass: the same tokens and features as in one pass, in bounded memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.model import HookPoint, load_model
from qwen_scope.scope import ExtractOptions, ModelEngine, Scope
from qwen_scope.scope.encoding import residuals
from qwen_scope.scope.rows import Row
from qwen_scope.text import Counted

TEXT = " ".join(tiny.TEXTS[:3])  # about 50 tokens, and a context of 64


@pytest.fixture(scope="module")
def scope() -> Scope:
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu", counted=Counted())


@pytest.mark.slow
def test_a_row_in_pieces_gives_its_own_tokens_once_and_in_order() -> None:
    """Rows with a lead, longer and shorter than the pieces, against each row in one pass."""
    model = load_model(tiny.folder() / "model", device="cpu").model
    rows = [
        Row(document, 0, list(range(2, 2 + n)), [""] * n, True, lead)
        for document, (n, lead) in enumerate([(30, []), (3, [1]), (20, [1, 5, 7]), (2, []), (9, [1])])
    ]
    points = [HookPoint(0), HookPoint(2)]
    for batch_tokens in (2, 7, 16):
        seen: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(rows))}
        upto = [0] * len(rows)
        for parts, found in residuals(ModelEngine(model, batch_tokens), points, rows):
            at = 0
            for i, start, stop in parts:
                assert start == upto[i]
                upto[i] = stop
                seen[i].append(found[2][at : at + stop - start])
                at += stop - start
            assert at == len(found[2]) == len(found[0])
        assert upto == [len(row.ids) for row in rows]
        for i, row in enumerate(rows):
            states = model.model(torch.tensor([row.lead + row.ids]), output_hidden_states=True).hidden_states
            # the last hidden state is normed: the block's own output is compared through that norm
            own = states[3][0, len(row.lead) :]
            torch.testing.assert_close(model.model.norm(torch.cat(seen[i])), own, atol=1e-4, rtol=1e-4)


def test_features_in_pieces_equal_those_of_one_pass(scope: Scope) -> None:
    texts = [TEXT, "a", tiny.TEXTS[1]]
    whole, pieces = scope.features(texts), scope.features(texts, batch_tokens=5)
    assert max(len(tokens) for tokens in whole.tokens) > 4 * 5
    for layer in whole.layers:
        torch.testing.assert_close(whole.acts[layer].to_dense(), pieces.acts[layer].to_dense(), atol=1e-4, rtol=1e-4)
        assert torch.equal(whole.reasons[layer], pieces.reasons[layer])


@pytest.mark.slow
def test_a_store_of_pieces_holds_what_one_of_whole_rows_holds(scope: Scope, tmp_path: Path) -> None:
    found = {}
    for name, batch in (("whole", 4096), ("pieces", 8)):
        options = ExtractOptions(batch_tokens=batch, pool=("mean", "last"), counted=Counted())
        with scope.extract([TEXT, "a", tiny.TEXTS[4]], tmp_path / name, options) as store:
            order = "layer, document, position, feature"
            acts = store.sql(f"select {order}, value from activations order by {order}")
            pooled = [store.residuals(layer, pooling) for layer in (0, 2) for pooling in ("mean", "last")]
            found[name] = acts, pooled, store.sql("select * from tokens"), store.sql("select * from masked")
    (acts, pooled, *exact), (own_acts, own_pooled, *own_exact) = found["whole"], found["pieces"]
    assert len(exact[0]) > 5 * 8
    assert exact == own_exact
    assert acts.drop(["value"]).equals(own_acts.drop(["value"]))
    np.testing.assert_allclose(acts["value"], own_acts["value"], atol=1e-4)
    np.testing.assert_allclose(pooled, own_pooled, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["features", "extract"])
def test_memory_of_a_long_text_holds_neither_logits_nor_a_square(tmp_path: Path, way: str) -> None:
    """The peak beside the weights, at a vocabulary of 151,936, is under a tenth of what the logits alone take."""
    tokens = 9000
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "scope/long_text.py", way, str(tokens), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join([".", *sys.path]),
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "0",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout)
    assert peak < 4 * tokens * 151_936 / 10, f"{tokens} tokens took {peak / 2**20:.0f} MiB"
