"""An SAE on what an MLP or an attention writes is read, steered and stored there: not on the residual."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError
from qwen_scope.model import HookPoint, blocks
from qwen_scope.sae import FeatureActs, layers_of, load_sae, save_sae
from qwen_scope.scope import Scope, load_scope
from qwen_scope.steer import Decoding, Intervention, Recipe, steering

TEXT = "The weather is fine today. Where is the station?"
MODULES = {"mlp_out": "mlp", "attn_out": "self_attn"}


@pytest.fixture(scope="module", params=list(MODULES))
def stream(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def sae_folder(stream: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    saes = [replace(tiny.random_sae(n), hook_point=f"layers.{n}.{stream}") for n in (0, 2)]
    return save_sae(saes, tmp_path_factory.mktemp(stream) / "sae", "sae_lens")


@pytest.fixture(scope="module")
def scope(sae_folder: Path) -> Scope:
    return load_scope(tiny.folder() / "model", sae_folder, device="cpu")


def seen_by_a_plain_hook(scope: Scope, layer: int, stream: str, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    module: nn.Module = getattr(blocks(scope.model)[layer], MODULES[stream])

    def keep(_: nn.Module, __: Any, out: Any) -> None:
        seen.append(out[0] if isinstance(out, tuple) else out)

    handle = module.register_forward_hook(keep)
    with torch.no_grad():
        scope.model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.slow
def test_features_are_those_of_the_stream(scope: Scope, stream: str) -> None:
    found = scope.features([TEXT])
    for layer in (0, 2):
        sae = scope.saes[layer]
        x = seen_by_a_plain_hook(scope, layer, stream, found.input_ids)[0]
        pre = x @ sae.W_enc.T + sae.b_enc
        expected = FeatureActs.from_dense(pre.relu(), sae.k)
        torch.testing.assert_close(found.of(0, layer).to_dense(), expected.to_dense(), rtol=1e-4, atol=1e-4)
        assert scope.hook_point(layer) == HookPoint(layer, stream)


def test_capture_gives_what_the_sae_reads(scope: Scope, stream: str) -> None:
    tokens = scope.tokenize([TEXT])
    for layer, h in scope.capture(tokens).items():
        torch.testing.assert_close(h, seen_by_a_plain_hook(scope, layer, stream, tokens.input_ids))


def test_sizes_are_of_the_stream(scope: Scope, stream: str) -> None:
    stats = scope.stats[2]
    assert stats.hook_point == HookPoint(2, stream)
    plain = load_scope(tiny.folder() / "model", tiny.folder() / "sae", device="cpu").stats[2]
    assert stats.norm_median != plain.norm_median


def test_steering_pushes_the_stream(scope: Scope, stream: str) -> None:
    one = Intervention.add(layer=scope.hook_point(2), feature=3, amount=2.0)
    ids = scope.tokenize([TEXT]).input_ids
    before = seen_by_a_plain_hook(scope, 2, stream, ids)
    taken: list[Tensor] = []
    with steering(scope.model, [one], scope.saes):
        # A hook that was there later sees the changed output.
        taken.append(seen_by_a_plain_hook(scope, 2, stream, ids))
    torch.testing.assert_close(taken[0], before + 2 * scope.saes[2].W_dec[:, 3], rtol=0, atol=1e-4)
    assert scope.generate(TEXT, [one], decoding=Decoding(4)).tokens


def test_an_intervention_at_another_stream_than_its_sae_is_refused(scope: Scope, stream: str) -> None:
    with pytest.raises(MismatchError, match=rf"at layers\.2\.resid_post, the SAE reads layers\.2\.{stream}"):
        scope.generate(TEXT, [Intervention.add(layer=2, feature=3, amount=1.0)])


@pytest.mark.parametrize("op", ["add", "scale", "clamp", "ablate"])
def test_recipes_keep_the_stream(scope: Scope, stream: str, op: str, tmp_path: Path) -> None:
    amount = {} if op == "ablate" else {"amount": 2.0}
    one = getattr(Intervention, op)(layer=scope.hook_point(0), feature=7, **amount)
    Recipe.of("r", scope.model, [one], scope.saes).save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text())
    assert data["interventions"][0]["hook_point"] == f"layers.0.{stream}"
    assert Intervention.from_json(data["interventions"][0]).hook_point == HookPoint(0, stream)


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


@pytest.mark.slow
def test_the_command_line_steers_where_the_sae_reads(
    sae_folder: Path, stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--model", str(tiny.folder() / "model"), "--sae", str(sae_folder), "--device", "cpu")
    recipe = tmp_path / "r.json"
    steer = ("--feature", "2/5", "--amount", "1", "--max-new-tokens", "3", "--json")
    data = json.loads(run(capsys, "steer", TEXT, *where, *steer, "--save-recipe", str(recipe)))
    assert data["interventions"][0]["hook_point"] == f"layers.2.{stream}"
    again = json.loads(run(capsys, "steer", TEXT, *where, "--recipe", str(recipe), "--max-new-tokens", "3", "--json"))
    assert again["steered"] == data["steered"]


def test_a_store_says_where_it_was_read(
    scope: Scope, sae_folder: Path, stream: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow")
    from qwen_scope.store import FeatureStore

    (tmp_path / "t.txt").write_text(TEXT)
    where = ("--model", str(tiny.folder() / "model"), "--sae", str(sae_folder), "--device", "cpu")
    run(capsys, "extract", str(tmp_path / "t.txt"), "-o", str(tmp_path / "store"), "--count", "all", *where)
    store = FeatureStore(tmp_path / "store")
    assert [store.layer(n).hook_point for n in (0, 2)] == [f"layers.{n}.{stream}" for n in (0, 2)]
    expected = float(scope.features([TEXT], [2]).of(0, 2).values.max())
    stored = store.sql("SELECT max(value) AS most FROM activations WHERE layer = 2")["most"][0].as_py()
    assert stored == pytest.approx(expected, rel=1e-2)


def test_convert_keeps_the_stream(sae_folder: Path, stream: str, tmp_path: Path, capsys) -> None:
    run(capsys, "convert", str(sae_folder), "--layout", "sparsify", "-o", str(tmp_path / "s"))
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [f"layers.{n}.{MODULES[stream]}" for n in (0, 2)]
    assert [load_sae(tmp_path / "s", n).hook_point for n in layers_of(tmp_path / "s")] == [
        f"layers.{n}.{stream}" for n in (0, 2)
    ]


def test_two_streams_of_one_layer_are_one_sentence(tmp_path: Path) -> None:
    for name, hook_point in (("a.layers.0", "layers.0.resid_post"), ("layers.0.mlp", "layers.0.mlp_out")):
        save_sae(replace(tiny.random_sae(0), hook_point=hook_point), tmp_path / "g" / name, "sparsify")
    both = load_scope(tiny.folder() / "model", tmp_path / "g", device="cpu")
    with pytest.raises(InputError, match="has several SAEs for layer 0"):
        both.features([TEXT])
