"""Which tokens count: by place, id, phase and norm, against definitions restated here."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.text import REASONS, Counted, start_ids, summary, tally

FULL = Counted(
    first=1,
    special=frozenset({1, 2, 3, 9}),
    norms={"layers.4.resid_post": 12.5, "layers.5.resid_post": None, "layers.5.mlp_out": 0.1},
    phases=frozenset({"answer", "thinking"}),
    sample="1,000 documents",
    tokens=12_345,
)


def by_layer(norms: dict[int, float | None]) -> dict[str, float | None]:
    return {f"layers.{layer}.resid_post": norm for layer, norm in norms.items()}


def row(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def words(counted: Counted, ids: torch.Tensor, **more: Any) -> list[str]:
    return [REASONS[i] for i in counted.reasons(ids, **more).flatten().tolist()]


# --- place, id, phase, padding


def test_the_first_token_of_a_row_does_not_count_by_default() -> None:
    assert Counted().at(torch.tensor([[5, 6, 7], [5, 5, 5]])).tolist() == [[False, True, True]] * 2


@pytest.mark.parametrize("first", [0, 1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_count_from_the_first_real_token(first: int, side: str) -> None:
    for real in range(5):
        mask = torch.tensor([[0] * (4 - real) + [1] * real if side == "left" else [1] * real + [0] * (4 - real)])
        expected, seen = [], 0
        for is_real in mask[0].tolist():
            expected.append(bool(is_real) and seen >= first)
            seen += is_real
        assert Counted(first=first).at(torch.ones(1, 4, dtype=torch.int64), mask=mask).tolist() == [expected]


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.int32, torch.float32])
def test_a_mask_of_any_type_is_taken(kind: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1]]).to(kind)
    assert Counted().at(torch.tensor([[0, 5, 6]]), mask=mask).tolist() == [[False, False, True]]


def test_padding_that_shares_an_id_with_a_special_token_is_padding() -> None:
    counted = Counted(special=frozenset({0}))
    assert words(counted, torch.tensor([[0, 0, 7, 0]]), mask=torch.tensor([[0, 1, 1, 1]])) == [
        "padding",
        "special",
        "counts",
        "special",
    ]


def test_positions_that_are_given_begin_anew_where_the_caller_says_so() -> None:
    at = Counted().at(row(4, 5, 6, 7), positions=row(0, 1, 0, 1))
    assert at.tolist() == [False, True, False, True]


def test_a_document_packed_behind_another_keeps_its_first_token() -> None:
    """Attention sees the beginning of the row alone: real models show no sink at such a border."""
    assert Counted().at(row(4, 5, 6, 7)).tolist() == [False, True, True, True]


def test_only_the_phases_asked_for_count() -> None:
    counted = Counted(first=0, phases=frozenset({"thinking", "answer"}))
    ids, phases = row(1, 2, 3, 4, 5), torch.tensor([1, 2, 3, 4, 0], dtype=torch.int8)
    assert counted.at(ids, phases=phases).tolist() == [False, False, True, True, False]
    with pytest.raises(InputError, match="only tokens of thinking, answer count, but these tokens have no phases"):
        counted.at(ids)


def test_everything_leaves_out_padding_alone() -> None:
    counted = Counted.everything()
    ids = torch.tensor([[1, 2, 3]])
    assert counted.at(ids).all()
    assert counted.at(ids, mask=torch.tensor([[0, 1, 1]])).tolist() == [[False, True, True]]
    assert not counted.sinks(torch.full((1, 3, 4), 1e30), 7).any()


@pytest.mark.parametrize("name", ["positions", "phases", "mask", "sinks"])
def test_shapes_that_differ_are_refused(name: str) -> None:
    """Called without the checks of these tests, as a user's program calls it."""
    value = torch.zeros(1, 3, dtype=torch.bool if name == "sinks" else torch.int64)
    with pytest.raises(InputError, match=rf"{name} has the shape \(1, 3\) and ids \(1, 2\)"):
        inspect.unwrap(Counted.reasons)(FULL, torch.zeros(1, 2, dtype=torch.int64), **{name: value})


@pytest.mark.parametrize("kind", [torch.int32, torch.int64, torch.int16])
def test_ids_of_any_integer_type_are_taken(kind: torch.dtype) -> None:
    assert Counted(first=0, special=frozenset({150_000, 3})).at(row(3, 4).to(kind)).tolist() == [False, True]


# --- norms


def test_sinks_are_longer_than_the_threshold_of_their_layer() -> None:
    counted = Counted(norms=by_layer({3: 5.0, 4: None}))
    h = torch.tensor([[3.0, 4.0], [3.0, 4.01], [0.0, 0.0], [30.0, 40.0]])
    assert counted.sinks(h, 3).tolist() == [False, True, False, True]
    assert counted.sinks(h, "layers.3.resid_post").tolist() == [False, True, False, True]
    assert not counted.sinks(h, 4).any()
    assert counted.sinks(h[0], 3).shape == ()
    assert counted.sinks(h[:0], 3).shape == (0,)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_do_not_overflow_in_half_precision(kind: torch.dtype) -> None:
    h = torch.full((2, 1024), 1.0, dtype=kind)
    h[1] = 30_000.0  # its square overflows fp16, as does the sum
    assert Counted(norms=by_layer({0: 1e5})).sinks(h, 0).tolist() == [False, True]
    assert Counted(norms=by_layer({0: 1e6})).sinks(h, 0).tolist() == [False, False]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_sink_where_there_is_a_threshold(bad: float) -> None:
    h = torch.tensor([[1.0, bad], [1.0, 1.0]])
    assert Counted(norms=by_layer({0: 5.0})).sinks(h, 0).tolist() == [True, False]
    assert not Counted(norms=by_layer({0: None})).sinks(h, 0).any()


def test_thousands_of_special_ids_are_not_printed() -> None:
    norms = {"layers.4.resid_post": 12.5, "layers.5.resid_post": None}
    shown = repr(Counted(special=frozenset(range(6000)), norms=norms))
    assert "first=1" in shown
    assert "'layers.4.resid_post': 12.5, 'layers.5.resid_post': None" in shown
    assert len(shown) < 300


def test_a_layer_without_a_measurement_is_refused_unless_none_was_made() -> None:
    with pytest.raises(NotFoundError, match=r"no threshold for sinks was measured at layers\.9\.resid_post"):
        FULL.sinks(torch.ones(2, 3), 9)
    assert not Counted().sinks(torch.ones(2, 3), 9).any()


def test_keep_joins_what_place_id_and_norm_say() -> None:
    counted = Counted(special=frozenset({8}), norms=by_layer({0: 5.0}))
    ids, h = torch.tensor([[1, 8, 2, 3]]), torch.tensor([[[1.0], [1.0], [9.0], [1.0]]])
    assert counted.keep(h, 0, ids).tolist() == [[False, False, False, True]]
    sinks = counted.sinks(h, 0)
    assert words(counted, ids, sinks=sinks) == ["first", "special", "sink", "counts"]
    assert (counted.keep(h, 0, ids) == (counted.reasons(ids, sinks=sinks) == 0)).all()


def test_the_line_says_how_many_of_how_many() -> None:
    counted = Counted(special=frozenset({8}), norms=by_layer({0: 5.0}))
    ids = torch.tensor([[1, 8, 2, 3, 0], [8, 8, 2, 3, 3]])
    sinks = torch.tensor([[True, False, True, False, True], [False] * 5])
    left_out = tally(counted.reasons(ids, mask=torch.tensor([[1, 1, 1, 1, 0], [1] * 5]), sinks=sinks))
    assert left_out == {"counts": 4, "padding": 1, "special": 3, "first": 1, "phase": 0, "sink": 1}
    assert summary(left_out) == "left out: 3 special tokens, 1 first token, 1 sink of 9 tokens"
    assert summary({"counts": 1024}) == "left out: none of 1,024 tokens"
    assert summary({"counts": 0, "phase": 1, "sink": 2000}) == (
        "left out: 1 token of other phases, 2,000 sinks of 2,001 tokens"
    )
    assert summary({"phase": 1}) == "left out: 1 token of other phases of 1 token"


# --- measuring


def sample(layers: int = 6, rows: int = 40, seq: int = 50, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Norms `(layers, tokens)` around 1 that spread by a tenth, first tokens a hundred times as long, and positions."""
    norms = np.exp(np.random.default_rng(seed).normal(0, 0.1, (layers, rows, seq)))
    norms[:, :, 0] = 100
    return norms.reshape(layers, -1), np.tile(np.arange(seq), rows)


def measured(norms: np.ndarray, positions: np.ndarray, **more: Any) -> list[float | None]:
    return list(Counted().measure(dict(enumerate(norms)), positions, **more).norms.values())


def test_sinks_of_five_medians_over_several_layers_are_found() -> None:
    norms, positions = sample()
    later = np.flatnonzero(positions > 0)[::150]
    norms[1:4, later] = np.random.default_rng(1).uniform(4, 9, (3, len(later)))
    counted = Counted().measure(dict(enumerate(norms)), positions, sample="made up")
    for layer, limit in enumerate(counted.norms.values()):
        assert limit is not None
        at = np.flatnonzero((norms[layer] > limit) & (positions > 0))
        assert set(at) == (set(later) if 1 <= layer <= 3 else set())
    assert counted.tokens == len(positions)
    assert counted.sample == "made up"


def test_tokens_that_are_long_at_one_layer_only_are_ordinary() -> None:
    norms, positions = sample()
    commas = np.flatnonzero(positions > 0)[::14]  # 7% of all, ten times the median, as Gemma's at layer 0
    norms[2, commas] = np.random.default_rng(1).uniform(8, 20, len(commas))
    assert [limit is None for limit in measured(norms, positions)] == [False, False, True, False, False, False]


def test_a_few_ordinary_tokens_beside_a_sink_do_not_hide_it() -> None:
    norms, positions = sample()
    norms[2:5, 77] = 80
    norms[2, [105, 110, 115]] = 2.3
    limits = measured(norms, positions)
    assert all(limit is not None and limit < 80 for limit in limits)


def test_a_sample_without_later_sinks_takes_the_first_tokens_word() -> None:
    norms, positions = sample()
    norms[3:, positions == 0] = 1.2  # the sinks are gone from layer 3 on
    limits = measured(norms, positions)
    assert [limit is None for limit in limits] == [False] * 3 + [True] * 3
    for layer in range(3):
        middle = np.sort(norms[layer, positions > 0])[(positions > 0).sum() // 2]
        assert limits[layer] == pytest.approx(3 * middle, rel=0.01)  # 1.5 times the floor of two medians


def wide(**more: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same with a bulk that spreads by a fifth, which puts its edge at 2.8 medians, though it ends at 1.9."""
    norms, positions = sample(**more)
    later = positions > 0
    norms[:, later] = np.minimum(np.exp(2 * np.log(norms[:, later])), 1.9)
    return norms, positions


def test_sinks_shorter_than_the_bulk_s_edge_are_found_beside_longer_ones() -> None:
    norms, positions = wide()
    later = np.flatnonzero(positions > 0)[::60]
    norms[1:5, later] = np.linspace(2.1, 9, len(later))  # a tenth of them below the edge
    norms[2, 1001] = 2.3  # an ordinary token at one layer
    for layer, limit in enumerate(measured(norms, positions)):
        assert limit is not None
        out = set(np.flatnonzero((norms[layer] > limit) & (positions > 0)))
        assert out == ((set(later) | ({1001} if layer == 2 else set())) if 1 <= layer <= 4 else set())


def test_a_bulk_with_more_tokens_above_two_medians_than_sinks_keeps_its_edge() -> None:
    norms, positions = wide()
    later = np.flatnonzero(positions > 0)
    sinks, tail = later[100::400], later[7::40]
    norms[1:5, sinks] = 9
    for layer in range(6):
        norms[layer, tail + layer] = 2.3
    for layer, limit in enumerate(measured(norms, positions)):
        assert limit is not None
        assert set(np.flatnonzero((norms[layer] > limit) & (positions > 0))) == (
            set(sinks) if 1 <= layer <= 4 else set()
        )


@pytest.mark.parametrize(("share", "found"), [(0.01, True), (0.1, False)])
def test_without_a_neighbour_only_rare_tokens_are_sinks(share: float, found: bool) -> None:
    norms, positions = sample(1)
    norms[0, np.flatnonzero(positions > 0)[:: int(1 / share)]] = 30
    assert (measured(norms, positions)[0] is not None) == found
    far = Counted().measure({3: norms[0], 9: norms[0]}, positions)  # layers 2, 4, 8 and 10 were not measured
    assert ({*far.norms.values()} != {None}) == found


def test_special_tokens_are_no_part_of_the_sample() -> None:
    norms, positions = sample(2)
    ids = np.where(np.arange(len(positions)) % 3 == 1, 7, 1)
    norms[:, ids == 7] *= 50
    limits = list(Counted(special=frozenset({7})).measure(dict(enumerate(norms)), positions, ids=ids).norms.values())
    assert all(limit is not None and 1.9 < limit < 3.1 for limit in limits)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_thresholds_scale_with_the_norms(scale: float) -> None:
    norms, positions = sample(3)
    norms[:, 60] = 15
    for one, other in zip(measured(norms, positions), measured(norms * scale, positions), strict=True):
        assert one is not None
        assert other == pytest.approx(one * scale)


def test_infinite_norms_are_long_ones() -> None:
    norms, positions = sample(3)
    norms[:, [60, 0]] = np.inf
    with np.errstate(all="raise"):
        limits = measured(norms, positions)
    assert all(limit is not None and math.isfinite(limit) for limit in limits)
    norms[1] = np.inf
    assert measured(norms, positions)[1] is None
    assert measured(np.zeros((1, len(positions))), positions) == [None]
    norms[2, ::4] = 1e300  # a quarter of the tokens: no bulk that sinks stand out from
    with np.errstate(all="raise"):
        assert measured(norms, positions)[2] is None


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_norms_that_are_none_are_refused(bad: float) -> None:
    norms, positions = sample(2)
    norms[1, 3] = bad
    with pytest.raises(FormatError, match=r"a residual norm at layers\.1\.resid_post is no number from 0 up"):
        measured(norms, positions)


def test_samples_that_do_not_fit_are_refused() -> None:
    norms, positions = sample(2)
    with pytest.raises(InputError, match="at least 100 ordinary tokens, not 98"):
        measured(norms[:, :100], positions[:100])
    with pytest.raises(InputError, match="no norms"):
        Counted().measure({}, positions)
    with pytest.raises(InputError, match="ids and"):
        inspect.unwrap(Counted.measure)(Counted(), {0: norms[0]}, positions, ids=positions[:-1])
    with pytest.raises(InputError, match="a hook point is a layer or a name such as"):
        Counted().measure({"layer 3": norms[0]}, positions)


def test_first_tokens_are_judged_apart_even_where_they_count() -> None:
    norms, positions = sample()
    kept = Counted(first=0).measure(dict(enumerate(norms)), positions)
    assert kept.norms == Counted().measure(dict(enumerate(norms)), positions).norms
    assert not Counted(first=0, norms=kept.norms).keep(torch.full((1, 1, 1), 100.0), 0, torch.ones(1, 1).long()).any()


# --- kept and read


def test_json_gives_back_an_equal_object() -> None:
    for counted in (FULL, Counted(), Counted.everything(), Counted(special=frozenset(range(5, 5000, 2)))):
        text = json.dumps(counted.to_json(), allow_nan=False)
        assert Counted.from_json(json.loads(text)) == counted
    assert FULL.to_json()["special"] == [[1, 3], [9, 9]]
    assert copy.deepcopy(FULL) == FULL == pickle.loads(pickle.dumps(FULL))
    assert hash(FULL) == hash(copy.deepcopy(FULL))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("version", 2),
        ("version", True),
        ("first", -1),
        ("first", 1.0),
        ("first", True),
        ("special", 3),
        ("special", [3]),
        ("special", [[3]]),
        ("special", [[5, 3]]),
        ("special", [[5, 7], [7, 9]]),
        ("special", [[5, 7], [1, 2]]),
        ("special", [[-1, 2]]),
        ("special", [[0, 2**31 - 1]]),
        ("special", [[1, 2.0]]),
        ("norms", []),
        ("norms", {"layers.1.resid_post": "5"}),
        ("norms", {"layers.1.resid_post": True}),
        ("norms", {"layers.1.resid_post": math.nan}),
        ("norms", {"layers.1.resid_post": math.inf}),
        ("norms", {"layers.1.resid_post": 0}),
        ("norms", {"layers.1.resid_post": -3}),
        ("norms", {"layers.01.resid_post": 3}),
        ("norms", {"12": 3}),
        ("phases", "answer"),
        ("phases", []),
        ("phases", ["answers"]),
        ("phases", [1]),
        ("sample", None),
        ("tokens", -1),
        ("tokens", "many"),
        ("extra", 1),
    ],
)
def test_json_that_does_not_fit_is_refused(key: str, value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        Counted.from_json(FULL.to_json() | {key: value}, "counted of sae.json")
    assert "counted of sae.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["version", "first", "special", "norms", "phases", "sample", "tokens"])
def test_json_that_lacks_a_key_is_refused(key: str) -> None:
    data = FULL.to_json()
    del data[key]
    with pytest.raises(FormatError):
        Counted.from_json(data)


@pytest.mark.parametrize(
    "bad",
    [
        {"first": -1},
        {"special": frozenset({-1})},
        {"special": frozenset({2**31})},
        {"norms": {"resid_post": 1.0}},
        {"norms": by_layer({-1: 1.0})},
        {"norms": by_layer({3: 0.0})},
        {"norms": by_layer({3: math.nan})},
        {"phases": frozenset()},
        {"phases": frozenset({"thoughts"})},
        {"tokens": -1},
    ],
)
def test_values_that_do_not_fit_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Counted(**bad)


def test_a_difference_is_one_sentence() -> None:
    assert FULL.difference(FULL) is None
    assert FULL.difference(copy.deepcopy(FULL)) is None
    said = FULL.difference(Counted.everything(), ("the SAE", "this run"))
    assert said == (
        "the SAE and this run count other tokens: the first tokens of a row left out: 1 in the SAE, 0 in this run;"
        " special tokens left out: 4 ids in the SAE, 0 ids in this run; phases that count: thinking, answer in the SAE,"
        " all in this run; thresholds for sinks: measured in the SAE, none in this run"
    )


@pytest.mark.parametrize(
    ("norm", "differs"), [(12.5, False), (20.0, False), (7.0, False), (40.0, True), (6.0, True), (None, True)]
)
def test_thresholds_of_two_samples_may_differ_a_little(norm: float | None, differs: bool) -> None:
    one, other = Counted(norms=by_layer({4: 12.5, 6: 3.0})), Counted(norms=by_layer({4: norm, 7: 99.0}))
    for a, b in ((one, other), (other, one)):
        assert (a.difference(b) is not None) == differs


def test_other_ids_of_equal_number_are_a_difference() -> None:
    said = Counted(special=frozenset({1})).difference(Counted(special=frozenset({2})))
    assert said is not None
    assert "1 ids in one, 1 ids that differ in the other" in said


# --- tokenizers


def word_level(template: str | None) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "<unk>": 3}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    ("template", "start"),
    [(None, []), ("$A", []), ("<s> $A", [0]), ("<s> $A </s>", [0]), ("$A </s>", []), ("</s> <s> $A </s>", [1, 0])],
)
def test_what_a_tokenizer_puts_before_a_text(template: str | None, start: list[int]) -> None:
    assert start_ids(word_level(template)) == start


def test_special_tokens_are_what_the_tokenizer_calls_so() -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder() / "model")
    counted = Counted.of(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")}
    assert set(ids.values()) <= counted.special
    assert tokenizer.convert_tokens_to_ids("<think>") not in counted.special
    assert counted.first == 1
    assert counted.phases is None
    assert not counted.norms
    assert start_ids(tokenizer) == []
    assert Counted.of(word_level("<s> $A"), first=0, phases=["answer"]) == Counted(
        0, frozenset({0, 1, 3}), phases=frozenset({"answer"})
    )
