"""The real commands, in process: what they print, and how mistakes end."""

from __future__ import annotations

import json

import pytest
import tiny

from qwen_scope.cli import main


@pytest.fixture
def where() -> list[str]:
    return ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae")]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    out, err = capsys.readouterr()
    return code, out, err


def as_json(capsys: pytest.CaptureFixture[str], *argv: str) -> dict | list:
    code, out, err = run(capsys, *argv, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_features_lists_every_token(capsys, where) -> None:
    code, out, err = run(capsys, "features", "Guten Morgen", *where, "--layer", "2")
    assert (code, err) == (0, "")
    assert "Layer 2" in out
    data = as_json(capsys, "features", "Guten Morgen", *where, "--top", "3")
    assert "".join(t["token"] for t in data["tokens"]) == "Guten Morgen"
    for token in data["tokens"]:
        assert set(token["layers"]) == {"0", "2"}
        for found in token["layers"].values():
            values = [f["activation"] for f in found]
            assert values == sorted(values, reverse=True)
            assert len(found) <= 3


def test_features_of_a_response_are_ranked_over_the_answer_only(capsys, where) -> None:
    data = as_json(capsys, "features", "hello", *where, "--response", " station", "--layers", "0", "--top", "99")
    from qwen_scope import load_scope

    scope = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")
    dense = scope.features(["hello station"], [0]).of(0, 0).to_dense()[data["response_starts_at"] :]
    expected = {f: float(dense[:, f].max()) for f in range(tiny.D_SAE) if dense[:, f].max() > 0}
    assert {f["feature"]: pytest.approx(f["maximum"]) for f in data["layers"]["0"]} == expected
    code, out, _ = run(capsys, "features", "hello", *where, "--response", " station")
    assert code == 0
    assert "features of the response" in out
    assert "prompt, left out: 1 first token of 1 token" in " ".join(out.split())
    assert "response, left out" not in out, "every token of the response counts"
    counts = len(dense)
    assert data["left_out"]["0"]["response"]["counts"] == counts
    assert data["left_out"]["0"]["prompt"]["first"] == 1


def test_features_reads_standard_input_and_chats(capsys, where, monkeypatch) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    data = as_json(capsys, "features", "-", *where, "--chat", "non_thinking")
    assert data["text"].startswith("<|im_start|>user\nhello<|im_end|>")
    assert data["text"].endswith("<think>\n\n</think>\n\n")


def test_compare_ranks_by_difference(capsys, where) -> None:
    code, out, _ = run(capsys, "compare", "The station", "Guten Morgen", *where)
    assert code == 0
    assert "difference" in out
    data = as_json(capsys, "compare", "The station", "Guten Morgen", *where, "--top", "2", "--layers", "0-0,2")
    assert {layer: len(found) for layer, found in data["layers"].items()} == {"0": 2, "2": 2}


def test_catalog_lists_the_released_groups_and_describes_one(capsys) -> None:
    released = [g for g in as_json(capsys, "catalog") if g["repository"].startswith("Qwen/")]
    assert len(released) == 14
    assert sum(g["layers"] for g in released) == 544
    code, out, _ = run(capsys, "catalog", "qwen-scope-3-1.7b-base-w32k-l50")
    assert code == 0
    assert "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50" in out


def test_plan_says_what_fits(capsys) -> None:
    name = "SAE-Res-Qwen3-8B-Base-W64K-L0_50"
    data = as_json(capsys, "plan", name, "--layers", "0-1", "--device-memory", "24GB")
    assert data["model"] == 2 * 8_190_735_360, "the published parameter count of Qwen3-8B in bf16"
    assert data["disk"] == 2 * 4 * (2 * 65536 * 4096 + 65536 + 4096)
    assert "fits with every SAE" in data["fits"]
    _, out, _ = run(capsys, "plan", name, "--device-memory", "12GB")
    assert "does not fit" in out


@pytest.mark.parametrize("layout", ["official", "safetensors", "sae_lens", "sparsify", "dictionary_learning"])
def test_convert_writes_what_loads_again(capsys, tmp_path, where, layout) -> None:
    from qwen_scope import load_sae

    source = str(tiny.folder() / "sae")
    data = as_json(capsys, "convert", source, "-o", str(tmp_path / "out"), "--layout", layout, "--dtype", "bfloat16")
    assert [row["layer"] for row in data["layers"]] == [0, 2]
    for row in data["layers"]:
        assert row["bytes_after"] < 0.55 * row["bytes_before"]
        assert 0.8 < row["jaccard"] <= 1
        assert row["value_error"] < 0.1
    again = load_sae(tmp_path / "out", 2)
    assert again.k == tiny.K
    if layout in ("official", "safetensors", "sae_lens"):
        assert again.identity == load_sae(source, 2).identity, "a converted copy is the same SAE"


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("official", "bfloat16"), ("safetensors", "bfloat16"), ("sae_lens", "float32"), ("sparsify", "float32")],
)
def test_convert_keeps_float32_for_tools_that_compute_in_the_stored_type(capsys, tmp_path, layout, expected) -> None:
    from qwen_scope import load_sae

    source = str(tiny.folder() / "sae")
    code, _, err = run(capsys, "convert", source, "--layers", "2", "-o", str(tmp_path / "out"), "--layout", layout)
    assert code == 0, err
    assert str(load_sae(tmp_path / "out", 2).dtype) == f"torch.{expected}"


def test_convert_measures_on_a_model_when_told(capsys, tmp_path, where) -> None:
    sae, model = str(tiny.folder() / "sae"), str(tiny.folder() / "model")
    code, out, _ = run(capsys, "convert", sae, "-o", str(tmp_path / "o"), "--model", model, "--text", "The station")
    assert code == 0
    assert "agreement on residuals of" in " ".join(out.split())


def test_lab_prints_texts_with_their_factors(capsys) -> None:
    code, out, _ = run(
        capsys, "lab", "texts", "-n", "3", "--kind", "talk", "--language", "de", "--register", "rude", "--json"
    )
    assert code == 0
    for line in out.splitlines():
        row = json.loads(line)
        assert (row["kind"], row["language"], row["register"]) == ("talk", "de", "rude")


BAD = [
    (["features", "", "WHERE"], "text 0 is empty"),
    (["features", "x", "WHERE", "--layers", "9"], "no SAE for layer 9"),
    (["features", "x", "WHERE", "--layers", "two"], "'two' is not a hook point"),
    (["features", "x", "WHERE", "--layers", "5-3"], "runs backwards"),
    (["features", "x", "WHERE", "--chat", "loud"], "--chat is one of"),
    (["features", "x", "WHERE", "--response", ""], "the response is empty"),
    (["features", "word " * 200, "WHERE"], "the context holds"),
    (["features", "x", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    (["features", "x", "--model", "somebody/unknown", "--sae", "lab"], "somebody/unknown"),
    (["compare", "a", "", "WHERE"], "text 1 is empty"),
    (["catalog", "SAE-Res-Qwen3-8B-Base-W64K-L0_5"], "did you mean 'SAE-Res-Qwen3-8B-Base-W64K-L0_50'"),
    (["plan", "qwen-scope-3-8b"], "did you mean"),
    (["plan", "SAE-Res-Qwen3-8B-Base-W64K-L0_50", "--layers", "36"], "no SAE for layer 36"),
    (["plan", "SAE-Res-Qwen3-8B-Base-W64K-L0_50", "--device-memory", "lots"], "is not a size"),
    (["plan", "SAE-Res-Qwen3-8B-Base-W64K-L0_50", "--dtype", "int3"], "int3"),
    (["convert", "/nowhere", "-o", "OUT"], "/nowhere"),
    (["convert", "SAE", "-o", "OUT", "--layout", "onnx"], "onnx"),
    (["convert", "SAE", "-o", "OUT", "--dtype", "int4"], "--dtype is one of"),
    (["convert", "SAE", "-o", "OUT", "--dtype", "int8", "--layout", "sae_lens"], "layout safetensors alone"),
    (["convert", "SAE", "-o", "OUT", "--layers", "1"], "layer 1"),
    (["lab", "texts", "--language", "xx"], "xx"),
    (["lab", "build", "-o", "OUT", "--family", "mamba"], "mamba"),
    (["lab", "card", "/nowhere"], "holds no lab"),
]


@pytest.mark.parametrize(("argv", "says"), BAD, ids=lambda x: " ".join(x)[:40] if isinstance(x, list) else None)
def test_bad_input_ends_with_one_sentence_and_code_2(capsys, tmp_path, where, argv, says) -> None:
    filled = {"OUT": [str(tmp_path / "out")], "SAE": [str(tiny.folder() / "sae")], "WHERE": where}
    code, _, err = run(capsys, *(part for arg in argv for part in filled.get(arg, [arg])))
    assert code == 2
    assert says in err
    assert err.startswith("qwen-scope: ")
    assert err.count("\n") == 1, "one sentence on one line"
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_usage_errors_end_with_code_2_too(capsys) -> None:
    assert run(capsys, "nope")[0] == 2
    assert run(capsys, "features")[0] == 2
    assert run(capsys, "features", "x", "--top", "0")[0] == 2
