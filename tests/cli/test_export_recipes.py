"""`export RECIPE`: what it writes opens elsewhere, and what it refuses writes nothing."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_scope import Intervention, load_scope
from qwen_scope.cli import main
from qwen_scope.model import HookPoint
from qwen_scope.steer import Decoding, Recipe

WHERE = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae")]
DIRECTION = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def scope():
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu")


@pytest.fixture
def saved(tmp_path, scope):
    def save(*interventions: Intervention) -> str:
        path = tmp_path / "recipe.yaml"
        Recipe.of("r", scope.model, list(interventions), scope.saes, counted=scope.counted).save(path)
        return str(path)

    return save


def test_a_control_vector(capsys, tmp_path, saved, scope) -> None:
    recipe = saved(Intervention.add(layer=2, feature=17, amount=3.0))
    out = tmp_path / "out" / "v.gguf"
    assert main(["export", recipe, "--to", "control-vector", "-o", str(out), *WHERE, "--json"]) == 0
    said, err = capsys.readouterr()
    assert (json.loads(said), err) == ({"written": str(out), "layers": [2]}, "")
    (one,) = GGUFReader(out).tensors
    torch.testing.assert_close(torch.from_numpy(one.data.copy()), 3 * scope.saes[2].W_dec[:, 17].float())


def test_an_ablated_checkpoint_of_parts_is_the_recipe(capsys, tmp_path, saved, scope) -> None:
    points = [HookPoint(layer, part) for layer in range(tiny.N_LAYERS) for part in ("attn_out", "mlp_out")]
    recipe = saved(*(Intervention.ablate(layer=point, direction=DIRECTION) for point in points))
    out = tmp_path / "model"
    assert main(["export", recipe, "--to", "ablated-checkpoint", "-o", str(out), *WHERE, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["difference"]["largest"] < 1e-4
    assert said["difference"]["tokens"] > 100
    prompt = "Guten Morgen"
    gone = [Intervention.ablate(layer=point, direction=DIRECTION) for point in points]
    wanted = scope.generate(prompt, gone, decoding=Decoding(max_new_tokens=20))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, do_sample=False, max_new_tokens=len(wanted.tokens))[0, ids.input_ids.shape[1] :]
    assert made.tolist() == [token.token_id for token in wanted.tokens]
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o777}


def test_an_ablated_checkpoint_of_all_layers(capsys, tmp_path, saved) -> None:
    recipe = saved(*(Intervention.ablate(layer=layer, direction=DIRECTION) for layer in range(tiny.N_LAYERS)))
    out = tmp_path / "model"
    assert main(["export", recipe, "--to", "ablated-checkpoint", "-o", str(out), *WHERE]) == 0
    assert "differ from the recipe's by" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not model.config.tie_word_embeddings
    unit = torch.tensor(DIRECTION) / torch.tensor(DIRECTION).norm()
    written = [
        value for name, value in model.named_parameters() if name.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    assert len(written) == 2 * tiny.N_LAYERS
    for value in (*written, model.get_input_embeddings().weight.T):
        assert (unit @ value).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("interventions", "to", "more", "says"),
    [
        ([Intervention.clamp(layer=2, feature=17, amount=1.0)], "control-vector", [], "clamp of feature 2/17"),
        ([Intervention.clamp(layer=2, feature=17, amount=1.0)], "ablated-checkpoint", [], "clamp of feature 2/17"),
        ([Intervention.ablate(layer=2, direction=DIRECTION)], "ablated-checkpoint", [], "layers 0, 1 are left out"),
        ([Intervention.add(layer=2, feature=17, amount=1.0)], "control-vector", ["--layers", "2"], "its own layers"),
        ([Intervention.add(layer=2, feature=17, amount=1.0)], "statistics", [], "there is no store"),
    ],
)
def test_refusals_write_nothing(capsys, tmp_path, saved, interventions, to, more, says) -> None:
    recipe, out = saved(*interventions), tmp_path / "out.gguf"
    assert main(["export", recipe, "--to", to, "-o", str(out), *WHERE, *more]) == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_another_ending_and_another_model(capsys, tmp_path, saved) -> None:
    recipe = saved(Intervention.add(layer=2, feature=17, amount=1.0))
    assert main(["export", recipe, "--to", "control-vector", "-o", str(tmp_path / "v.bin"), *WHERE]) == 2
    assert "has to end in .gguf" in capsys.readouterr().err
    argv = ["export", recipe, "--to", "control-vector", "-o", str(tmp_path / "v.gguf"), "--model", "lab"]
    assert main(argv) == 2
    assert "is for the model" in capsys.readouterr().err
