"""The panel and its benchmarks: sound items, honest scores, a run that goes on."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
import torch

from qwen_scope.errors import InputError
from qwen_scope.foundry import BENCHMARKS, Benchmark, PanelConfig, Run, build_panel, items, score
from qwen_scope.model import load_model
from qwen_scope.sae import catalog


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda b: b.name)
def test_items_are_sound(benchmark: Benchmark) -> None:
    small = replace(benchmark, n=12, pool=min(benchmark.pool, 6))
    found = items(small)
    assert found == items(small)
    assert len({i.id for i in found}) == 12
    assert len({i.prompt for i in found}) <= 6
    for item in found:
        assert item.prompt
        assert len(set(item.choices)) == 4
    assert max(b.pool for b in BENCHMARKS) > 10 * min(b.pool for b in BENCHMARKS)


def test_scores_are_those_of_the_likeliest_choice() -> None:
    loaded = load_model(catalog.find("lab").model, device="cpu")
    some = items(replace(BENCHMARKS[0], n=6, pool=6, languages=("en", "zh")))
    found = score(loaded.model, loaded.tokenizer, some)
    for item, right in zip(some, found.tolist(), strict=True):
        means = []
        for choice in item.choices:
            prompt, rest = (loaded.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (item.prompt, choice))
            with torch.no_grad():
                logits = loaded.model(input_ids=torch.tensor([prompt + rest])).logits[0].log_softmax(-1)
            means.append(sum(float(logits[len(prompt) + j - 1, t]) for j, t in enumerate(rest)) / len(rest))
        assert right == float(means[0] == max(means))


@pytest.mark.slow
def test_a_panel_goes_on_and_its_scores_are_read(tmp_path) -> None:
    config = PanelConfig(
        (Run("tiny", 32, 1, {"talk": 1.0}, ("en",), tokens=12_000, at=(0.5, 1.0)),),
        (replace(BENCHMARKS[0], n=4, pool=4, languages=("en",)),),
        batch=4,
    )
    made = build_panel(tmp_path / "p", config)
    assert made["models"] == ["tiny-050", "tiny-100"]
    weights = (tmp_path / "p" / "models" / "tiny-100" / "model.safetensors").stat().st_mtime_ns
    assert build_panel(tmp_path / "p", config) == made
    assert (tmp_path / "p" / "models" / "tiny-100" / "model.safetensors").stat().st_mtime_ns == weights
    rows = list(csv.reader((tmp_path / "p" / "scores" / "language.csv").read_text().splitlines()))
    assert rows[0] == ["id", "tiny-050", "tiny-100"]
    ids = [
        json.loads(line)["id"] for line in (tmp_path / "p" / "benchmarks" / "language.jsonl").read_text().splitlines()
    ]
    assert [row[0] for row in rows[1:]] == ids
    with pytest.raises(InputError, match="another configuration"):
        build_panel(tmp_path / "p", replace(config, lr=1.0))
    with pytest.raises(InputError, match="holds no panel"):
        build_panel(tmp_path, config)
    with pytest.raises(InputError, match="needs a task"):
        items(Benchmark("x", "riddle", 3, 3))
