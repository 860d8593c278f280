"""Extraction: the store equals the scope, and a run that was disturbed leaves the same bytes as one that was not."""

from __future__ import annotations

import errno
import functools
import os
import random
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import stores
import tiny
import torch

from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, capture, measure_counted
from qwen_scope.sae import TopK
from qwen_scope.scope import ExtractOptions, encoding, extract, prefetch
from qwen_scope.scope import Progress as ProgressOf
from qwen_scope.store import FeatureStore
from qwen_scope.text import Corpus, Counted

# Everything at once: pieces, windows that end inside a document, masks, pooled residuals.
HARD = {"row_tokens": 7, "window_tokens": 30, "pool": ("mean", "last"), "counted": None}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed") / "s"
    stores.make(folder, **HARD).close()
    return stores.digest(folder)


@pytest.mark.parametrize("layer", stores.LAYERS)
def test_the_store_equals_the_scope_on_every_token(tmp_path, layer) -> None:
    texts = [text for text in stores.TEXTS if len(stores.scope().tokenizer(text)["input_ids"]) <= tiny.CONTEXT]
    assert len(texts) >= 15
    store = stores.make(tmp_path / "s", texts, row_tokens=None, window_tokens=10**6, batch_tokens=200)
    seen = stores.scope().features(texts, [layer], batch_tokens=200)
    for i, found in enumerate(stores.from_store(store, layer)):
        np.testing.assert_array_equal(found, seen.of(i, layer).to_dense().numpy())


@pytest.mark.slow
@pytest.mark.parametrize("layer", stores.LAYERS)
def test_pieces_and_windows_do_not_change_what_is_found(tmp_path, layer) -> None:
    for window in (1, 33, 10**6):
        with stores.make(tmp_path / str(window), window_tokens=window) as store:
            for found, expected in zip(stores.from_store(store, layer), stores.dense(layer), strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-5)
                assert ((found > 0) == (expected > 0)).mean() > 0.999


LIMIT = 1.25  # of the mean norm: some of the tiny model's tokens lie above it


@functools.cache
def norms(layer: int) -> dict[tuple[int, int], tuple[int, int, float]]:
    """By document and position: the id, the place in its row and the residual norm, row by row through the model."""
    out, point = {}, HookPoint(layer)
    for i, text in enumerate(stores.TEXTS):
        ids = stores.scope().tokenizer(text)["input_ids"]
        for start in range(0, len(ids), stores.ROW_TOKENS):
            row = ids[start : start + stores.ROW_TOKENS]
            for p, norm in enumerate(
                capture(stores.scope().model, torch.tensor([row]), [point])[point][0].norm(dim=-1)
            ):
                out[i, start + p] = row[p], p, float(norm)
    return out


@functools.cache
def some_count() -> Counted:
    """First tokens, special ones and residuals above a fixed limit do not count."""
    means = {layer: float(np.mean([norm for _, _, norm in norms(layer).values()])) for layer in stores.LAYERS}
    counted = Counted.of(stores.scope().tokenizer)
    return replace(counted, norms={str(HookPoint(layer)): LIMIT * mean for layer, mean in means.items()})


@pytest.mark.slow
def test_tokens_that_do_not_count_are_left_out_with_their_reason(tmp_path) -> None:
    counted = some_count()
    plain, masked = stores.make(tmp_path / "a"), stores.make(tmp_path / "b", counted=counted)
    assert masked.manifest.counted == counted
    for layer in stores.LAYERS:
        rows = masked.sql("SELECT * FROM masked JOIN tokens USING (document, position) WHERE layer = ?", [layer])
        reasons = {(r["document"], r["position"]): r["reason"] for r in rows.to_pylist()}
        assert set(reasons.values()) == {"first", "special", "sink"}
        info = masked.layer(layer)
        assert info.tokens == masked.manifest.tokens - len(reasons)
        limit = counted.norms[str(HookPoint(layer))]
        for place, (token, at, norm) in norms(layer).items():
            first = "special" if token in counted.special else "first" if at == 0 else None
            if first or abs(norm - limit) > 1e-3:
                assert reasons.get(place) == (first or ("sink" if norm > limit else None))
        for i, (a, b) in enumerate(zip(stores.from_store(plain, layer), stores.from_store(masked, layer), strict=True)):
            for p in range(len(a)):
                np.testing.assert_allclose(b[p], 0 if (i, p) in reasons else a[p], atol=1e-5)
        mean = {(r["document"], r["feature"]): r["value"] for r in masked.firing("mean", [layer]).to_pylist()}
        last = {(r["document"], r["feature"]): r["position"] for r in masked.firing("last", [layer]).to_pylist()}
        for i, some in enumerate(stores.from_store(masked, layer)):
            places = [p for p in range(len(some)) if (i, p) not in reasons]
            for f in np.flatnonzero(some.any(0)).tolist():
                assert mean[i, f] == np.float32(some[:, f].astype(np.float64).sum() / len(places))
                assert last.get((i, f)) == (places[-1] if some[places[-1], f] else None)


@pytest.mark.slow
def test_pooled_residuals_are_of_the_tokens_that_count(tmp_path) -> None:
    counted, point = some_count(), HookPoint(0)
    limit = counted.norms[str(point)]
    with stores.make(tmp_path / "s", counted=counted, pool=("mean", "last")) as store:
        for i, text in enumerate(stores.TEXTS):
            ids = stores.scope().tokenizer(text)["input_ids"]
            pieces = [torch.tensor([ids[s : s + stores.ROW_TOKENS]]) for s in range(0, len(ids), stores.ROW_TOKENS)]
            h = torch.cat([capture(stores.scope().model, piece, [point])[point][0] for piece in pieces])
            keep = [
                p
                for p, token in enumerate(ids)
                if p % stores.ROW_TOKENS and token not in counted.special and norms(0)[i, p][2] <= limit
            ]
            if not keep:
                assert np.isnan(store.residuals(0, "mean")[i]).all()
                continue
            np.testing.assert_allclose(store.residuals(0, "mean")[i], h[keep].double().mean(0), atol=1e-5)
            np.testing.assert_allclose(store.residuals(0, "last")[i], h[keep[-1]], atol=1e-5)


def test_what_counts_is_measured_once_and_kept(tmp_path, monkeypatch) -> None:
    """By thresholds of `measure_counted` on the documents packed one behind the other; no special token among them."""
    ids = [i for text in stores.TEXTS for i in stores.scope().tokenizer(text)["input_ids"]]
    room = min(512, tiny.CONTEXT)
    packed = [torch.tensor([ids[i : i + room]]) for i in range(0, len(ids), room)]
    wanted = measure_counted(stores.scope().model, stores.scope().tokenizer, packed)
    made = stores.make(tmp_path / "s", counted=None, row_tokens=None, window_tokens=10**6)
    assert made.manifest.counted is not None
    assert made.manifest.counted.norms == pytest.approx(wanted.norms)
    assert made.manifest.counted.first == 1
    assert made.manifest.request["counted_by"] == "measured"
    monkeypatch.setattr(sys.modules["qwen_scope.scope.extract"], "measured", lambda *_: pytest.fail("measured again"))
    stores.make(tmp_path / "s", counted=None, row_tokens=None, window_tokens=10**6).close()
    with pytest.raises(InputError, match="counted_by was 'measured', now 'given'"):
        stores.make(tmp_path / "s", row_tokens=None, window_tokens=10**6)


def test_what_the_files_of_the_saes_say_counts(tmp_path) -> None:
    counted = some_count()
    saes = {
        layer: TopK(s.W_enc, s.W_dec, s.b_enc, s.b_dec, k=s.k, hook_point=s.hook_point, identity=s.identity,
                    meta={**s.meta, "counted": counted.to_json()})
        for layer, s in stores.saes().items()
    }  # fmt: skip
    with extract(Corpus(["hello hello hello"]), stores.loaded(), saes, tmp_path / "s") as store:
        assert store.manifest.counted == counted
        assert store.manifest.request["counted_by"] == "saes"


@pytest.mark.slow
def test_pooled_residuals(tmp_path) -> None:
    small = stores.make(tmp_path / "a", window_tokens=20, row_tokens=7, pool=("mean", "last"))
    for layer in stores.LAYERS:
        for i, text in enumerate(stores.TEXTS):
            ids = stores.scope().tokenizer(text)["input_ids"]
            pieces = [torch.tensor([ids[s : s + 7]]) for s in range(0, len(ids), 7)]
            points = [HookPoint(layer)]
            h = torch.cat([capture(stores.scope().model, piece, points)[points[0]][0] for piece in pieces])
            np.testing.assert_allclose(small.residuals(layer, "mean")[i], h.double().mean(0), atol=1e-5)
            np.testing.assert_allclose(small.residuals(layer, "last")[i], h[-1], atol=1e-5)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_again_and_again_leaves_the_same_bytes(tmp_path, monkeypatch, undisturbed, seed) -> None:
    dice, left, real, kills = random.Random(seed), [0], os.fsync, 0

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] <= 0:
            raise Killed
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    while True:
        left[0] = dice.randint(1, 25)
        try:
            stores.make(tmp_path / "s", **HARD).close()
            break
        except Killed:
            kills += 1
            assert kills < 200
    assert kills > 3
    assert stores.digest(tmp_path / "s") == undisturbed


CHILD = """
import os, signal, sys, threading
sys.path[:0] = sys.argv[1:3]
import stores
stores.loaded(), stores.saes()
delay = float(sys.argv[4])
if delay:
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
stores.make(sys.argv[3], **eval(sys.argv[5])).close()
os._exit(0)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path, undisturbed) -> None:
    where = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    # The child makes the same tiny model: its weights come from a fixed seed.
    dice, ends = random.Random(), []
    for delay in (dice.uniform(0.02, 0.6), dice.uniform(0.1, 1.5), 0.0):
        argv = [sys.executable, "-c", CHILD, *where, str(tmp_path / "s"), str(delay), repr(HARD)]
        # Another number of threads would add in another order.
        env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        ends.append(subprocess.run(argv, timeout=300, check=False, stderr=subprocess.DEVNULL, env=env).returncode)
    assert ends[-1] == 0, ends
    assert stores.digest(tmp_path / "s") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 6, 13])
def test_a_full_disk_is_one_sentence_and_nothing_is_lost(tmp_path, monkeypatch, undisturbed, at) -> None:
    calls, real = [0], os.fsync

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match=r"no room to write to .* run the same command again") as caught:
            stores.make(tmp_path / "s", **HARD)
        assert "\n" not in str(caught.value)
    stores.make(tmp_path / "s", **HARD).close()
    assert stores.digest(tmp_path / "s") == undisturbed


@pytest.mark.slow
def test_a_finished_store_is_opened_and_another_request_refused(tmp_path, monkeypatch, undisturbed) -> None:
    stores.make(tmp_path / "s", **HARD).close()
    (tmp_path / "s" / "work").mkdir()  # as if killed after the manifest
    monkeypatch.setattr(
        sys.modules["qwen_scope.scope.extract"], "run_windows", lambda *_: pytest.fail("nothing is left to do")
    )
    stores.make(tmp_path / "s", **HARD).close()
    assert stores.digest(tmp_path / "s") == undisturbed
    with pytest.raises(InputError, match=r"other options .*row_tokens was 7, now 8"):
        stores.make(tmp_path / "s", **{**HARD, "row_tokens": 8})
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is no unfinished store"):
        stores.make(tmp_path / "t")
    assert (tmp_path / "t" / "thesis.txt").read_text() == "mine"


def test_two_runs_at_once_and_other_corpora_are_refused(tmp_path) -> None:
    from qwen_scope.store import StoreWriter

    with (
        StoreWriter(tmp_path / "s", "tiny", {"a": 1}, []),
        pytest.raises(InputError, match=r"another process .* is writing"),
    ):
        StoreWriter(tmp_path / "s", "tiny", {"a": 1}, [])
    stores.make(tmp_path / "s").close()
    with pytest.raises(InputError, match="a was None, now 2"):
        StoreWriter(tmp_path / "s", "tiny", {"a": 2}, [])


def test_progress_and_unreadable_rows(tmp_path) -> None:
    rows = ["hello", {"n": 1}, {"text": 5}, {"text": ""}, "hello hello"]
    seen: list[ProgressOf] = []
    store = extract(Corpus(rows), stores.loaded(), stores.saes(), tmp_path / "s", progress=seen.append)
    assert store.manifest.unreadable == {"empty": 1, "missing column": 1, "not text": 1}
    table = store.sql("SELECT * FROM unreadable ORDER BY row").to_pylist()
    assert [(r["row"], r["reason"]) for r in table] == [(2, "missing column"), (3, "not text"), (4, "empty")]
    assert store.sql("SELECT row FROM documents ORDER BY document")["row"].to_pylist() == [1, 5]
    assert [p.stage for p in seen][-1] == "indexing"
    assert seen[-1].tokens == store.manifest.tokens
    assert all(p.tokens_per_second > 0 and p.share == 1.0 for p in seen)
    with pytest.raises(InputError, match=r"no document to extract .* 1 missing column"):
        extract(Corpus([{"n": 1}]), stores.loaded(), stores.saes(), tmp_path / "t")


def test_a_long_document_is_cut_and_counted(tmp_path) -> None:
    store = stores.make(tmp_path / "s", ["hello " * 3000, "x"], max_tokens=50)
    rows = store.sql("SELECT tokens, cut FROM documents ORDER BY document").to_pylist()
    assert rows[0]["tokens"] == 50
    assert rows[0]["cut"] > 2000
    assert rows[1]["cut"] == 0


def test_chats_are_rendered(tmp_path) -> None:
    rows = [{"text": [{"role": "user", "content": "hello"}]}]
    store = stores.make(tmp_path / "s", rows, chat="non_thinking")
    text = "".join(store.sql("SELECT text FROM tokens ORDER BY position")["text"].to_pylist())
    assert text.startswith("<|im_start|>user\nhello<|im_end|>")
    with pytest.raises(InputError, match=r"no document to extract .* 1 a conversation, not a text.*chat='default'"):
        stores.make(tmp_path / "t", rows)


def test_what_does_not_belong_together_is_refused(tmp_path) -> None:
    sae = stores.saes()[0]
    run = lambda saes, options=None: extract(Corpus(["x"]), stores.loaded(), saes, tmp_path / "s", options)  # noqa: E731
    with pytest.raises(MismatchError, match="is not for layer 2"):
        run({2: sae})
    with pytest.raises(MismatchError, match="reads 8 dimensions and tiny has 32"):
        run({0: tiny.random_sae(0, d_model=8)})
    with pytest.raises(InputError, match="at least one layer"):
        run({})
    for bad in ({"window_tokens": 0}, {"pool": ("median",)}):
        with pytest.raises(InputError):
            replace(ExtractOptions(), **bad)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is no unfinished store"):
        extract(Corpus(["x"]), stores.loaded(), {0: sae}, tmp_path / "file")
    assert isinstance(run({0: sae}), FeatureStore)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"hold_bytes": 1}, {"sae_device": "cpu"}, {"sae_device": "cpu", "hold_bytes": 1}])
@pytest.mark.parametrize("overlapped", [False, True])
def test_turns_and_overlap_change_nothing(tmp_path, monkeypatch, how, overlapped) -> None:
    monkeypatch.setattr(encoding, "elsewhere", lambda *_: overlapped)
    options = ExtractOptions(row_tokens=stores.ROW_TOKENS, window_tokens=60, batch_tokens=20)
    plain = extract(Corpus(stores.TEXTS, name="texts"), stores.loaded(), stores.saes(), tmp_path / "a", options)
    other = extract(Corpus(stores.TEXTS, name="texts"), stores.loaded(), stores.saes(), tmp_path / "b", options, **how)
    with plain, other:
        for layer in stores.LAYERS:
            for a, b in zip(stores.from_store(plain, layer), stores.from_store(other, layer), strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
                assert ((a > 0) == (b > 0)).mean() > 0.999


def test_a_sweep_keeps_two_saes_at_most(monkeypatch) -> None:
    """The next one comes while one is at work; what has had its turn is gone, whatever it kept for encoding."""
    alive: weakref.WeakSet[TopK] = weakref.WeakSet()
    most, move = [], TopK.to

    def counted(sae: TopK, *args, **kwargs) -> TopK:
        moved = move(sae, *args, **kwargs)
        alive.add(moved)
        most.append(len(alive))
        return moved

    monkeypatch.setattr(TopK, "to", counted)
    weights = torch.randn(64, 8), torch.randn(8, 64), torch.randn(64), torch.randn(8)
    saes = {layer: TopK(*weights, k=layer + 1) for layer in (3, 0, 2, 1, 5, 4)}
    seen = []
    for layer, sae in prefetch.in_turn(saes, "cpu"):
        seen.append((layer, sae.k))
        while len(most) < min(6, len(seen) + 1):
            time.sleep(0.001)
        del sae
    assert seen == [(layer, layer + 1) for layer in range(6)]
    assert len(most) == 6
    assert max(most) == 2


def test_what_comes_next_is_made_meanwhile_and_errors_arrive() -> None:
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i
        raise ValueError("the fifth")

    used = []

    def use() -> None:
        with prefetch.ahead(items()) as coming:
            for item in coming:
                used.append(item)
                while len(made) < min(4, item + 2):
                    time.sleep(0.001)

    with pytest.raises(ValueError, match="the fifth"):
        use()
    assert used == [0, 1, 2, 3]
