"""What a graph takes in memory is said before; long prompts work with chosen positions, or are refused."""

from __future__ import annotations

import json

import pytest
from siblings import IDS, LAYERS, scope_of
from transformers import AutoConfig

from qwen_scope.circuits import Quantity, WhyOptions, effects, explain, faithfulness, graph_bytes, memory, read
from qwen_scope.cli import main
from qwen_scope.errors import InputError
from qwen_scope.model import GRAPH_TOKENS, model_sizes

SHAPE = AutoConfig.for_model(
    "qwen3", hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=16, vocab_size=500, max_position_embeddings=8192,
)  # fmt: skip


def test_memory_is_bounded_up_to_one_pass_and_grows_with_longer_prompts() -> None:
    sizes = model_sizes(SHAPE)

    def needs(tokens: int, positions: int | None = None) -> int:
        return graph_bytes(sizes, tokens, layers=4, k=50, positions=positions, dtype="float32") - memory.AROUND

    nodes = 3 * 4 * 128 * 50  # the directions of a token's active features, with two copies at work
    streams = 4 * 4 * 128 * 3
    assert needs(256) - needs(64) == (256 - 64) * (nodes + streams), "copies fill the pass either way"
    assert needs(2 * GRAPH_TOKENS, 64) < needs(2 * GRAPH_TOKENS)
    assert needs(2 * GRAPH_TOKENS, 64) > 1.9 * needs(GRAPH_TOKENS, 64)
    # per block the inner activations of the feed-forward layer alone are more than a half of what is counted
    assert needs(GRAPH_TOKENS, 1) > GRAPH_TOKENS * 4 * 3 * 384 * 4


def test_plan_states_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "lab", "--why", "64", "--json"]) == 0
    short = json.loads(capsys.readouterr().out)["graph"]
    assert main(["plan", "lab", "--why", "4096", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graph"] > short > memory.AROUND
    assert main(["plan", "lab", "--why", "64"]) == 0
    assert "graph of a prompt of 64 tokens" in capsys.readouterr().out
    assert main(["plan", "lab"]) == 0
    assert "graph" not in capsys.readouterr().out


def test_features_elsewhere_are_no_nodes_and_their_stream_is_error() -> None:
    scope = scope_of("qwen3")
    whole, part = (read(scope, IDS, Quantity.logit(5), positions=some) for some in (None, [-1, 3]))
    last = len(IDS) - 1
    for layer in LAYERS:
        assert set(part.active[layer].positions.tolist()) == {3, last}
        for position, reason in enumerate(part.left_out[layer]):
            assert reason == ("" if position in (3, last) else "first" if position == 0 else "not chosen")
        assert part.errors[layer][last].equal(whole.errors[layer][last])
        assert part.errors[layer][1].equal(part.streams[layer][1] - scope.saes[layer].b_dec)
    found = effects(part)
    for layer in LAYERS:  # features and errors still add up along the gradient
        slope = found.slopes[layer]
        total = float((part.streams[layer] * slope).sum())
        parts = float(found.features[layer].sum() + found.errors[layer].sum()) + found.bases[layer]
        assert parts == pytest.approx(total, rel=1e-4, abs=1e-5)
    (kept,) = faithfulness(part, [[]])
    assert kept.all == pytest.approx(part.value, abs=1e-4)


@pytest.mark.parametrize("positions", [[], [99], [-99]])
def test_positions_that_are_none_are_refused(positions: list[int]) -> None:
    with pytest.raises(InputError, match="positions of features are some of 0 to"):
        read(scope_of("qwen3"), IDS, Quantity.logit(5), positions=positions)


def test_a_long_prompt_works_with_positions_or_ends_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = scope_of("qwen3")
    monkeypatch.setattr("qwen_scope.circuits.memory.GRAPH_TOKENS", len(IDS) - 1)
    last = len(IDS) - 1
    graph = explain(read(scope, IDS, Quantity.logit(5), positions=[last]), WhyOptions(nodes=5, exact=0))
    assert {graph.nodes[i].position for i in graph.features} == {last}
    monkeypatch.setattr("qwen_scope.circuits.memory.machine", lambda: ("this machine", 10_000_000))
    with pytest.raises(InputError, match=r"a graph of \d+ tokens takes about .* and this machine has .*; choose --pos"):
        read(scope, IDS, Quantity.logit(5))


def test_positions_are_typed_like_layers(capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "Guten Morgen, wo ist"
    assert main(["why", prompt, "--positions", "7-8", "--nodes", "12", "--exact", "0", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert {one["ctx_idx"] for one in nodes if one["feature_type"] == "cross layer transcoder"} <= {7, 8}
    for given, says in (("last", "--positions takes numbers"), ("7-80", "positions of features are some of 0 to 8")):
        assert main(["why", prompt, "--model", "lab", "--positions", given]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
