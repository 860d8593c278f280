"""`plan` of language models: folders, adapters, quantised ones, and what training SAEs on them takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from transformers import AutoConfig

from qwen_scope.cli import main
from qwen_scope.sae import catalog

LAB = Path(catalog.find("lab").model)


def planned(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict:
    assert main(["plan", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def unreadable(folder: Path, **config: object) -> Path:
    """The lab's model with other entries in its config and weights that nobody could load."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**json.loads((LAB / "config.json").read_text()), **config}))
    (folder / "model.safetensors").write_bytes(b"x" * 1234)
    return folder


def test_a_model_is_planned_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, unreadable(tmp_path / "m"), "--dtype", "float32")
    config = AutoConfig.from_pretrained(LAB)
    heads = config.num_key_value_heads * config.head_dim
    assert found["disk"] == 1234
    assert found["context"] == config.max_position_embeddings
    assert found["cache"] == 2 * heads * config.num_hidden_layers * config.max_position_embeddings * 4
    assert found["machine"]["bytes"] > 0
    assert found["total"] == found["model"] + found["working"]
    assert found["training"] is None


def test_an_adapter_is_planned_as_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(LAB), "r": 4})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 100)
    found, base = planned(capsys, folder), planned(capsys, LAB)
    assert found["base"] == str(LAB)
    assert found["disk"] == base["disk"] + 100
    assert (found["model"], found["layers"]) == (base["model"], base["layers"])


def test_a_quantised_checkpoint_takes_what_the_dense_one_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    found = planned(capsys, unreadable(tmp_path / "q", quantization_config=fp8))
    assert "FP8" in found["quantised"]
    assert found["model"] == planned(capsys, LAB)["model"]
    assert found["total"] == found["model"] + found["working"]


def test_training_is_planned_per_layer_and_in_all(capsys: pytest.CaptureFixture[str]) -> None:
    words = [LAB, "--train", "--d-sae", "1024", "--k", "16", "--tokens", "40960", "--batch", "1024"]
    one, two = (planned(capsys, *words, "--layers", layers)["training"] for layers in ("3", "3,4"))
    assert two["layer"] == one["layer"]
    assert two["steps"]["weights"] == 2 * one["steps"]["weights"] == 8 * (2 * 1024 * 128 + 1024 + 128)
    assert two["steps"]["buffer"] == 2 * one["steps"]["buffer"] == 2 * 4 * 128 * (40960 + 2048)
    assert two["total"] > one["total"]
    default = planned(capsys, LAB, "--train", "--layers", "3")["training"]
    assert default["steps"]["weights"] == 4 * (2 * 2048 * 128 + 2048 + 128)  # 16 features per dimension
    assert default["steps"]["buffer"] == 10**9


def test_the_machine_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(LAB), "--train", "--d-sae", str(2**24)]) == 0
    out = capsys.readouterr().out
    assert "which has" in out
    assert "does not fit" in out
    assert main(["plan", str(LAB), "--device-memory", "1TB"]) == 0
    assert "On a device of 1 TB: fits." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["LAB", "--layers", "6"], "layer 6 does not exist"),
        (["LAB", "--dtype", "int3"], "dtype is one of float32, bfloat16, float16, not 'int3'"),
        (["LAB", "--train", "--k", "50", "--d-sae", "9"], "the dictionary has only 9 features"),
        (["ORPHAN"], "the shape of 'no/such' is not known here"),
    ],
)
def test_what_can_t_be_planned_is_one_sentence(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orphan = tmp_path / "orphan"
    orphan.mkdir()
    (orphan / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "no/such"}')
    places = {"LAB": LAB, "ORPHAN": orphan}
    assert main(["plan", *(str(places.get(word, word)) for word in words)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_the_peak_of_train_is_the_one_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole command in a process of its own, language model, measuring and all: within 0.7 to 1.3 times."""
    shape = ["--layers", "0,2", "--d-sae", "8192", "--k", "16", "--batch", "512", "--dtype", "float32"]
    said = planned(capsys, tiny.folder() / "model", "--train", "--tokens", "8192", *shape)["training"]["total"]
    code = """
import sys
from qwen_scope.cli import main
assert main(sys.argv[1:]) == 0
print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(tiny.TEXTS[:3] * 400))
    words = ["train", str(texts), "--model", str(tiny.folder() / "model"), "--out", str(tmp_path / "run"), *shape]
    words += ["--tokens", "8192", "--eval-tokens", "1024", "--context-length", "64", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout.split()[-1])
    assert 0.7 < said / measured < 1.3, f"said {said / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB"
