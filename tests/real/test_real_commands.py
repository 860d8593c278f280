"""The main commands on SmolLM2-135M with an SAE of a minute's training, in the order in which a user types them.

Every band was fixed from one run (its figure stands beside it) with room for another processor and another version of
Python's help; `test_the_bands_are_of_this_sae` shows that they tell this SAE from another.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_SAE, LAYER, Ask, K

from qwen_scope.model import HookPoint, LoadedModel, capture, load_model
from qwen_scope.sae import load_sae

POINT = f"layers.{LAYER}.resid_post"
FVU = (0.15, 0.32)  # 0.212 on 512 held-out tokens
RECOVERED = (0.93, 1.0)  # 0.977
TEXT = "The capital of France is Paris, and the capital of Italy is Rome."


@pytest.fixture(scope="module")
def loaded(work: Path) -> LoadedModel:
    return load_model(work / "model.gguf", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def measured(ask: Ask, trained: dict[str, Any]) -> dict[str, Any]:
    return ask("eval", "held.jsonl", "--tokens", 1024, "--batch-size", 4, "--json")


@pytest.fixture(scope="module")
def feature(ask: Ask, trained: dict[str, Any]) -> str:
    """The feature that tells interactive sessions from prose best, by `find`."""
    found = ask("find", "--positive", "sessions.jsonl", "--negative", "prose.jsonl", "-n", 3, "--json")
    best = found["found"][0]
    assert best["significant"]
    assert best["auroc"]["estimate"] > 0.85  # 1.0
    assert found["left_out"][str(LAYER)]["first"] == 80  # of each document
    return f"{best['layer']}/{best['feature']}"


def test_plan_says_what_the_file_takes(ask: Ask, work: Path) -> None:
    needs = ask("plan", "model.gguf", "--json", model=False)
    assert needs["disk"] == (work / "model.gguf").stat().st_size
    assert needs["layers"] == 30
    assert needs["d_model"] == 576
    assert needs["parameters"] == 134_515_008


def test_train_writes_an_sae_that_reconstructs(trained: dict[str, Any]) -> None:
    quality = trained["quality"][POINT]
    assert FVU[0] < quality["fvu"] < FVU[1]
    assert quality["l0"] == pytest.approx(K, abs=0.1)
    assert quality["dead"] < 0.4


def test_eval_measures_on_other_text_and_leaves_sinks_out(measured: dict[str, Any], work: Path) -> None:
    quality = measured["quality"][POINT]
    assert FVU[0] < quality["fvu"] < FVU[1]
    assert RECOVERED[0] < quality["ce_recovered"] < RECOVERED[1]
    assert quality["reasons"]["first"] == 4  # the sink at the first token of each row of 256
    assert measured["counted"]["norms"][POINT] is not None


def test_the_clean_loss_is_that_of_a_plain_forward_pass(
    measured: dict[str, Any], loaded: LoadedModel, work: Path
) -> None:
    """The texts one after the other with the end of text between them, in rows of 256, without our package."""
    import json

    texts = [json.loads(line)["text"] for line in (work / "held.jsonl").read_text().splitlines()]
    end = loaded.tokenizer.eos_token_id
    ids = [i for text in texts for i in [*loaded.tokenizer(text)["input_ids"], end]]
    rows = torch.tensor(ids[: 4 * 256]).view(4, 256)
    with torch.no_grad():
        logits = loaded.model(input_ids=rows).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    perplexity = math.exp(measured["quality"][POINT]["ce_clean"])
    assert perplexity == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert 8 < perplexity < 60


def test_features_are_the_encoder_s_and_packed_weights_move_them_little(
    ask: Ask, trained: dict[str, Any], loaded: LoadedModel, work: Path
) -> None:
    seen = ask("features", TEXT, "--top", K, "--json")
    tokens = seen["tokens"]
    assert "".join(token["token"] for token in tokens) == TEXT
    assert [token["id"] for token in tokens] == loaded.tokenizer(TEXT)["input_ids"]
    assert tokens[0]["left_out"] == {str(LAYER): "first"}
    assert all(not token["left_out"] for token in tokens[1:])
    sae = load_sae(work / "run" / "tiny", LAYER)
    ids = torch.tensor([[token["id"] for token in tokens]])
    h = capture(loaded.model, ids, [HookPoint(LAYER)])[HookPoint(LAYER)][0].double()
    dense = h @ sae.W_enc.double().T + sae.b_enc.double()
    for token, row in zip(tokens, dense, strict=True):
        best = row.topk(K)
        shown = {one["feature"]: one["activation"] for one in token["layers"][str(LAYER)]}
        expected = {int(f): float(v) for f, v in zip(best.indices, best.values, strict=True) if v > 0}
        assert len(shown.keys() ^ expected.keys()) <= 2  # features that lie at rank k within rounding
        assert all(shown[f] == pytest.approx(expected[f], rel=1e-3, abs=1e-3) for f in shown.keys() & expected.keys())
    packed = ask(
        "features", TEXT, "--top", K, "--json", "--model", "model.gguf", "--sae", "run/tiny", model=False
    )  # fmt: skip
    same = [
        len({one["feature"] for one in a["layers"][str(LAYER)]} & {one["feature"] for one in b["layers"][str(LAYER)]})
        for a, b in zip(tokens[1:], packed["tokens"][1:], strict=True)
    ]
    assert sum(same) / len(same) > 0.9 * K  # packed weights are the same numbers, multiplied in another order


def test_compare_ranks_the_features_of_code_and_prose(ask: Ask, trained: dict[str, Any]) -> None:
    found = ask("compare", ">>> print(1 + 2) 3 >>> x = [1, 2]", "The weather was cold and the sky was grey.", "--json")
    best = found["layers"][str(LAYER)]
    assert found["left_out"][str(LAYER)]["first"] == 2
    assert all(one["difference"] == pytest.approx(one["rate_a"] - one["rate_b"]) for one in best)
    assert abs(best[0]["difference"]) > 0.35  # 0.56
    assert [abs(one["difference"]) for one in best] == sorted((abs(one["difference"]) for one in best), reverse=True)


def test_extract_store_and_show_speak_of_the_same_tokens(ask: Ask, feature: str, work: Path) -> None:
    made = ask("extract", "held.jsonl", "--out", "store", "--sample", 10, "--json")
    assert made["documents"] == 10
    (layer,) = made["layers"]
    assert layer["left_out"]["first"] == 10
    assert layer["tokens"] + sum(layer["left_out"].values()) == made["tokens"]
    assert layer["activations"] / layer["tokens"] == pytest.approx(K, abs=0.5)
    stated = ask("store", "store", "--json", model=False)
    assert stated["tokens"] == made["tokens"]
    card = ask("show", "store", "--feature", feature, "-n", 5, "--json")
    summary = card["summary"]
    assert f"{summary['layer']}/{summary['feature']}" == feature
    assert 0 < summary["tokens"] < layer["tokens"]  # 251 of 2,957
    assert summary["frequency"] == pytest.approx(summary["tokens"] / layer["tokens"])


def test_classify_separates_sessions_from_prose(ask: Ask, trained: dict[str, Any], work: Path) -> None:
    fitted = ask("classify", "fit", "sessions.jsonl", "prose.jsonl", "--rule", "rule.json", "--json")
    assert fitted["layers"][str(LAYER)] > 0.7  # 0.89
    assert fitted["noise"]["p"] < 0.05
    labels = ask("classify", "predict", "rule.json", "sessions.jsonl", lines=True)
    others = ask("classify", "predict", "rule.json", "prose.jsonl", lines=True)
    found, wrong = (sum(one["label"] for one in some) / len(some) for some in (labels, others))
    assert found > 0.8  # 1.0
    assert found - wrong > 0.4


def test_steering_changes_the_text_and_nothing_when_it_adds_nothing(
    ask: Ask, feature: str, loaded: LoadedModel
) -> None:
    prompt = "In this example"
    ids = loaded.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        greedy = loaded.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    same = ask("steer", prompt, "--feature", feature, "--amount", 0, "--max-new-tokens", 12, "--json")
    moved = ask("steer", prompt, "--feature", feature, "--amount", 1, "--max-new-tokens", 12, "--json")
    plain = loaded.tokenizer.decode(greedy)
    assert same["unsteered"]["text"] == same["steered"]["text"] == moved["unsteered"]["text"] == plain
    assert moved["steered"]["text"] != plain


def test_sweep_measures_what_a_forward_pass_does_and_keeps_its_budget(
    ask: Ask, feature: str, loaded: LoadedModel, work: Path
) -> None:
    """How probable a line of an interactive session is, unsteered by hand; a large amount breaks the text."""
    line = " >>> x = 1"
    swept = ask(
        "sweep", "prompts.jsonl", "--feature", feature, "--amounts", "0.2,1.5", "--continuation", line,
        "--max-new-tokens", 8, "--json",
    )  # fmt: skip
    by_amount = {dose["amount"]: dose for dose in swept["doses"]}
    found = []
    for prompt in (json.loads(one)["text"] for one in (work / "prompts.jsonl").read_text().splitlines()):
        before, after = (loaded.tokenizer(text)["input_ids"] for text in (prompt, line))
        with torch.no_grad():
            logits = loaded.model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
        found.append(float(logits.double().log_softmax(-1)[range(len(after)), after].mean()))
    assert by_amount[0.0]["effect"]["estimate"] == pytest.approx(sum(found) / len(found), abs=1e-3)
    assert by_amount[0.2]["effect"]["estimate"] != by_amount[0.0]["effect"]["estimate"]
    assert by_amount[1.5]["perplexity"] > 2 * swept["reference"]
    assert not by_amount[1.5]["fits"]
    assert swept["proposed"] != 1.5


def test_the_bands_are_of_this_sae(trained: dict[str, Any], loaded: LoadedModel, work: Path) -> None:
    """Controls: the SAE eight layers later, and with its features' directions shuffled."""
    sae = load_sae(work / "run" / "tiny", LAYER)
    ids = torch.tensor([loaded.tokenizer((work / "held.jsonl").read_text())["input_ids"][:512]])
    points = [HookPoint(LAYER), HookPoint(LAYER + 8)]
    seen = capture(loaded.model, ids, points)

    def fvu(h: torch.Tensor, decoder: torch.Tensor) -> float:
        acts = sae.encode(h).to_dense()
        return float((h - acts @ decoder.T - sae.b_dec).square().sum() / (h - h.mean(0)).square().sum())

    here, later = (seen[point][0, 1:] for point in points)
    assert FVU[0] < fvu(here, sae.W_dec) < FVU[1]
    assert fvu(later, sae.W_dec) > FVU[1]
    shuffled = sae.W_dec[:, torch.randperm(D_SAE, generator=torch.Generator().manual_seed(0))]
    assert fvu(here, shuffled) > FVU[1]
