"""The scope against the definition of everything it reports, on a tiny model with random weights."""

from __future__ import annotations

import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.sae import FeatureActs, save_sae
from qwen_scope.scope import SAEs, Scope, compare_rates
from qwen_scope.text import Counted

TEXTS = ["The station?", "你好，今天天气很好。The weather is fine", "a"]


@pytest.fixture(scope="module")
def scope() -> Scope:
    every = Counted.everything()  # what is left out by default is tested in test_scope_counted
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu", counted=every)


def by_hand(scope: Scope, text: str, layer: int) -> torch.Tensor:
    """Dense activations of one text, from transformers' own hidden states and the published formula."""
    ids = scope.tokenizer(text, return_tensors="pt")["input_ids"]
    states = scope.model.model(ids, output_hidden_states=True).hidden_states
    assert layer + 1 < len(states) - 1, "the last entry is normed and no oracle for the last layer"
    sae = scope.saes[layer]
    pre = states[layer + 1][0] @ sae.W_enc.T + sae.b_enc
    top = pre.relu().topk(sae.k)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def test_features_equal_the_published_formula_on_transformers_hidden_states(scope: Scope) -> None:
    seen = scope.features(TEXTS)
    assert seen.layers == [0, 2]
    for i, text in enumerate(TEXTS):
        expected = by_hand(scope, text, 0)
        torch.testing.assert_close(seen.of(i, 0).to_dense(), expected, atol=1e-4, rtol=1e-4)
        assert "".join(seen.tokens[i]) == text


def test_texts_do_not_depend_on_their_batch(scope: Scope) -> None:
    together, tight = scope.features(TEXTS), scope.features(TEXTS, batch_tokens=1)
    for layer in together.layers:
        torch.testing.assert_close(together.acts[layer].to_dense(), tight.acts[layer].to_dense(), atol=1e-4, rtol=1e-4)
        assert not together.acts[layer].to_dense()[~together.mask].any(), "padding has no features"


def test_no_token_is_invented(scope: Scope) -> None:
    seen = scope.features(["The station?"])
    assert seen.input_ids[0].tolist() == scope.tokenizer("The station?", add_special_tokens=False)["input_ids"]


def test_strongest_ranks_by_maximum_and_counts_the_chosen_tokens(scope: Scope) -> None:
    seen = scope.features(TEXTS)
    dense = seen.of(1, 0).to_dense()[2:]
    found = seen.strongest(1, 0, tokens=slice(2, None))
    maximum = dense.max(0)
    expected = sorted((f for f in range(tiny.D_SAE) if maximum.values[f] > 0), key=lambda f: (-maximum.values[f], f))
    assert [f.feature for f in found] == expected
    for f in found:
        column = dense[:, f.feature]
        assert f.maximum == column.max()
        assert f.position == 2 + int(column.argmax())
        assert f.rate == pytest.approx(float((column > 0).double().mean()))
        assert f.mean == pytest.approx(float(column.mean()), rel=1e-5)
    assert len(seen.strongest(1, 0, n=3)) == 3


def test_compare_is_the_difference_of_activation_rates(scope: Scope) -> None:
    a, b = "The station is fine", "Guten Morgen! station"
    found = scope.compare(a, b, [0], n=None)[0]
    rate_a, rate_b = ((by_hand(scope, t, 0) > 0).double().mean(0) for t in (a, b))
    for c in found:
        assert c.rate_a == pytest.approx(float(rate_a[c.feature]))
        assert c.rate_b == pytest.approx(float(rate_b[c.feature]))
    ranked = [abs(c.difference) for c in found]
    assert ranked == sorted(ranked, reverse=True)
    assert {c.feature for c in found} == set(((rate_a > 0) | (rate_b > 0)).nonzero().flatten().tolist())


def test_compare_can_leave_tokens_out(scope: Scope) -> None:
    a, b = "The weather is fine today", "The weather is Morgen"
    ids_a, ids_b = (scope.tokenizer(t)["input_ids"] for t in (a, b))
    acts = [by_hand(scope, t, 0) > 0 for t in (a, b)]
    prefix = next(i for i, (x, y) in enumerate(zip(ids_a, ids_b, strict=False)) if x != y)
    cases = {
        "drop_first": ([i > 0 for i in range(len(ids_a))], [i > 0 for i in range(len(ids_b))]),
        "drop_prefix": ([i >= prefix for i in range(len(ids_a))], [i >= prefix for i in range(len(ids_b))]),
        "drop_common": ([x not in ids_b for x in ids_a], [x not in ids_a for x in ids_b]),
    }
    for option, (keep_a, keep_b) in cases.items():
        found = scope.compare(a, b, [0], n=None, **{option: True})[0]
        for c in found:
            assert c.rate_a == pytest.approx(float(acts[0][keep_a][:, c.feature].double().mean())), option
            assert c.rate_b == pytest.approx(float(acts[1][keep_b][:, c.feature].double().mean())), option
    with pytest.raises(InputError, match="nothing is left of the first text"):
        scope.compare("The", "The weather", drop_prefix=True)


def test_sets_of_texts_compare_by_their_tokens_together(scope: Scope) -> None:
    a, b = ["The weather is fine", "The station"], ["The weather is Morgen", "The Morgen", "The fine"]
    ids = {text: scope.tokenizer(text)["input_ids"] for text in [*a, *b]}
    of_a, of_b = ({x for text in side for x in ids[text]} for side in (a, b))
    cases = {
        "drop_first": lambda i, x: i > 0,
        "drop_prefix": lambda i, x: i >= len(scope.tokenizer("The")["input_ids"]),
        "drop_common": lambda i, x: x not in of_a & of_b,
    }
    for option, keep in cases.items():
        rates = []
        for side in (a, b):
            rows = [by_hand(scope, text, 0)[[keep(i, x) for i, x in enumerate(ids[text])]] > 0 for text in side]
            rates.append(torch.cat(rows).double().mean(0))
        found = scope.compare(a, b, [0], n=None, **{option: True})[0]
        assert found
        for c in found:
            assert c.rate_a == pytest.approx(float(rates[0][c.feature])), option
            assert c.rate_b == pytest.approx(float(rates[1][c.feature])), option
    with pytest.raises(InputError, match="leave one side empty"):
        scope.compare(a, [], [0])


def test_equal_differences_rank_by_lower_index() -> None:
    a = FeatureActs(torch.tensor([[5, 2]], dtype=torch.int32), torch.tensor([[2.0, 1.0]]), 8)
    b = FeatureActs(torch.tensor([[7, 0]], dtype=torch.int32), torch.tensor([[1.0, 0.0]]), 8)
    assert [c.feature for c in compare_rates(3, a, b)] == [2, 5, 7]


def test_chat_wraps_the_text_with_and_without_thinking(scope: Scope) -> None:
    modes = (None, "thinking", "non_thinking")
    plain, thinking, non_thinking = (scope.tokenize(["hello"], chat=mode).texts[0] for mode in modes)
    assert plain == "hello"
    assert thinking == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert non_thinking == thinking + "<think>\n\n</think>\n\n"


def test_bad_input_is_refused_with_one_sentence(scope: Scope) -> None:
    for call, error, says in (
        (lambda: scope.features([]), InputError, "no text"),
        (lambda: scope.features(["ok", ""]), InputError, "text 1 is empty"),
        (lambda: scope.features(["word " * 200]), InputError, "the context holds 64"),
        (lambda: scope.features(["ok"], [1]), NotFoundError, "no SAE for layer 1; it has layers 0, 2"),
        (lambda: scope.features(["ok"], []), InputError, "no layer given"),
        (lambda: scope.saes[7], NotFoundError, "no SAE for layer 7"),
        (lambda: load_scope(tiny.folder() / "model"), NotFoundError, "name them with sae="),
        (lambda: load_scope("Qwen/Qwen3-1.7B-Base"), InputError, "several groups of SAEs"),
        (lambda: load_scope(tiny.folder() / "model", tiny.folder() / "none"), NotFoundError, "none"),
        (lambda: load_scope(tiny.folder() / "model", tiny.folder() / "sae", sae_dtype="int8"), InputError, "float32"),
    ):
        with pytest.raises(error, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert scope.features(["word " * 200], truncate=True).input_ids.shape == (1, tiny.CONTEXT)


def test_saes_of_another_width_are_refused(tmp_path) -> None:
    save_sae(tiny.random_sae(0, d_model=48), tmp_path / "sae")
    scope = load_scope(tiny.folder() / "model", tmp_path / "sae", device="cpu")
    with pytest.raises(MismatchError, match="48 dimensions"):
        scope.features(["hello"])


def test_saes_beyond_the_last_layer_are_refused(tmp_path) -> None:
    save_sae(tiny.random_sae(5), tmp_path / "sae")
    with pytest.raises(MismatchError, match="layers 5"):
        load_scope(tiny.folder() / "model", tmp_path / "sae", device="cpu")


def test_saes_leave_by_bytes_and_come_back() -> None:
    one = tiny.random_sae(0).nbytes
    saes = SAEs(str(tiny.folder() / "sae"), d_model=tiny.D_MODEL, cache_bytes=one)
    assert saes.held == []
    saes[0], saes[2]
    assert saes.held == [2]
    saes[0]
    assert saes.held == [0]
    roomy = SAEs(str(tiny.folder() / "sae"), d_model=tiny.D_MODEL, cache_bytes=2 * one)
    assert roomy[0] is roomy[0]
    roomy[2], roomy[0]
    assert roomy.held == [2, 0]
    assert list(roomy) == [0, 2]


def test_a_plan_counts_the_model_and_its_saes(scope: Scope) -> None:
    weights = sum(p.numel() * p.element_size() for p in scope.model.parameters())
    assert scope.plan.model == weights
    assert scope.plan.n_saes == 2
    assert scope.plan.sae == tiny.random_sae(0).nbytes
