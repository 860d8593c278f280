"""`plan` of folders: SAEs of one's own, and models, without loading weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from qwen_scope import load_sae, save_sae
from qwen_scope.cli import main
from qwen_scope.sae import catalog

LAB = catalog.find("lab")


def planned(capsys, *words: str) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_of_saes_is_planned_like_its_group(tmp_path: Path, capsys) -> None:
    assert LAB.folder is not None
    by_name = planned(capsys, "lab", "--train")
    by_folder = planned(capsys, str(LAB.folder), "--model", "lab", "--train")
    assert {**by_folder, "group": LAB.name} == by_name


@pytest.mark.parametrize(
    ("layers", "dtype", "n"), [(None, "float32", 2), ("0", "float32", 1), ("2", "bfloat16", 1), ("0,2", "float16", 2)]
)
def test_sizes_are_those_of_the_weights(layers: str | None, dtype: str, n: int, capsys) -> None:
    folder = tiny.folder()
    some = [] if layers is None else ["--layers", layers]
    found = planned(capsys, str(folder / "sae"), "--model", str(folder / "model"), "--sae-dtype", dtype, *some)
    item = {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
    sae = load_sae(folder / "sae", 0)
    assert found["n_saes"] == n
    assert found["sae"] == 2 * sae.d_sae * sae.d_model * item + 4 * (sae.d_sae + sae.d_model)


def test_a_model_s_folder_is_planned_from_its_config_and_files(capsys) -> None:
    from safetensors import safe_open

    folder = Path(LAB.model)
    found = planned(capsys, str(folder), "--device-memory", "1GB", "--dtype", "float32")
    with safe_open(folder / "model.safetensors", "np") as file:
        held = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    import math

    assert found["parameters"] == sum(math.prod(shape) for shape in held.values())
    assert found["model"] == 4 * found["parameters"]
    assert found["disk"] == (folder / "model.safetensors").stat().st_size
    assert (found["layers"], found["fits"]) == (6, True)
    assert main(["plan", str(folder), "--device-memory", "1MB"]) == 0
    assert "does not fit" in capsys.readouterr().out


def test_the_files_may_say_the_model(tmp_path: Path, capsys) -> None:
    save_sae(load_sae("lab", 5), tmp_path / "own")
    config = tmp_path / "own" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model": "lab"}))
    assert planned(capsys, str(tmp_path / "own"))["n_saes"] == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["SAE"], "do not say which language model they are for; name it with --model"),
        (["SAE", "--model", "lab", "--layers", "1"], "has no SAE for layer 1; it has 0, 2"),
        (["SAE", "--model", "Qwen/Qwen3-8B-Base"], "has 4096"),
        (["SAE", "--model", "no/such"], "the shape of 'no/such' is not known here"),
        (["EMPTY"], "holds no SAE"),
        (["BROKEN"], "config.json is not JSON"),
        (["./nowhere"], "there is no group './nowhere'"),
    ],
)
def test_what_can_t_be_planned_is_one_sentence(words: list, says: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    places = {"SAE": tiny.folder() / "sae", "EMPTY": tmp_path / "empty", "BROKEN": tmp_path / "broken"}
    assert main(["plan", *(str(places.get(word, word)) for word in words)]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1
