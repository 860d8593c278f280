import json

import numpy as np
import pytest
import torch
from families import FAMILIES

from qwen_scope.errors import FormatError, InputError
from qwen_scope.model import HookPoint, LayerStats, capture, residual_norms

POINTS = [HookPoint(0), HookPoint(3)]


def test_norms_are_of_tokens_and_not_of_padding(qwen3):
    ids = torch.randint(0, 250, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [0] * 7 + [1] * 2])
    stats = residual_norms(
        qwen3, [(ids[:2], mask[:2]), (ids[2:], mask[2:]), (ids[:1], None)], POINTS, sample="random ids"
    )
    rows = [ids[:1], ids[1:2, :4], ids[2:, 7:], ids[:1]]
    for point in POINTS:
        norms = np.concatenate([capture(qwen3, row, [point])[point][0].double().norm(dim=-1).numpy() for row in rows])
        seen = stats[point]
        assert (seen.documents, seen.tokens, seen.sample) == (4, 24, "random ids")
        assert seen.norm_median == pytest.approx(np.median(norms), rel=1e-5)
        for share, norm in seen.norm_quantiles.items():
            assert norm == pytest.approx(np.quantile(norms, share), rel=1e-5)


def test_overflow_is_not_a_size():
    model = FAMILIES["qwen3"]()
    model.model.embed_tokens.weight.data[0] = float("inf")
    with pytest.raises(FormatError, match=r"at layers\.0\.resid_post is not finite; load the model in bfloat16"):
        residual_norms(model, [(torch.zeros(1, 2, dtype=torch.int64), None)], POINTS, sample="zeros")


def test_no_batch_says_nothing(qwen3):
    with pytest.raises(InputError, match="no batch"):
        residual_norms(qwen3, [], POINTS, sample="nothing")


def example(**changes):
    values = {
        "hook_point": HookPoint(2),
        "documents": 3,
        "tokens": 100,
        "sample": "lab, seed 0",
        "norm_median": 1 / 3,
        "norm_quantiles": {0.05: 0.1, 0.95: 2 / 3},
        "feature_max": np.array([0.1, 0.0, 7.3], dtype=np.float32),
        "firing_rate": np.array([0.5, 0.0, 1e-7], dtype=np.float32),
    }
    return LayerStats(**values | changes)


@pytest.mark.parametrize("stats", [example(), example(feature_max=None, firing_rate=None)])
def test_json_returns_the_same_bits(stats):
    back = LayerStats.from_json(json.loads(json.dumps(stats.to_json())))
    for field in ("hook_point", "documents", "tokens", "sample", "norm_median", "norm_quantiles"):
        assert getattr(back, field) == getattr(stats, field)
    for field in ("feature_max", "firing_rate"):
        ours, theirs = getattr(stats, field), getattr(back, field)
        assert ours is theirs is None or (ours.dtype == theirs.dtype and np.array_equal(ours, theirs))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("tokens"),
        lambda data: data.update(extra=1),
        lambda data: data.update(tokens="many"),
        lambda data: data.update(norm_quantiles=[1, 2]),
        lambda data: data.update(hook_point=2),
        lambda data: data.update(feature_max=["a"]),
    ],
)
def test_other_json_is_refused(damage):
    data = example().to_json()
    damage(data)
    with pytest.raises(FormatError, match="layer statistics"):
        LayerStats.from_json(data)


@pytest.mark.parametrize("changes", [{"tokens": 0}, {"norm_median": float("nan")}, {"norm_quantiles": {0.5: -1.0}}])
def test_figures_that_mean_nothing_are_refused(changes):
    with pytest.raises(InputError):
        example(**changes)
