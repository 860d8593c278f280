"""Control vectors: the file as gguf reads it, its effect by hooks written out by hand, and refusals by name."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch
from gguf import GGUFReader

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.model import HookPoint, blocks
from qwen_scope.steer import Intervention, check_control_vector, control_vector, steering, write_control_vector

add = Intervention.add


def test_the_file_holds_what_is_added_by_layer(scope, tmp_path) -> None:
    plain = torch.linspace(-1, 1, 32)
    recipe = [
        add(layer=2, feature=17, amount=0.5, unit="resid_norm"),
        add(layer=2, direction=plain, amount=-2.0),
        add(layer=1, direction=plain, amount=0.25),
        add(layer=1, direction=plain, amount=0.0),
    ]
    vectors = control_vector(scope.model, recipe, scope.saes, scope.stats)
    path = tmp_path / "v.gguf"
    write_control_vector(vectors, path, "qwen3")

    read = GGUFReader(path)
    assert read.get_field("general.architecture").contents() == "controlvector"
    assert read.get_field("controlvector.model_hint").contents() == "qwen3"
    assert read.get_field("controlvector.layer_count").contents() == 2
    assert [(one.name, one.tensor_type.name, list(one.shape)) for one in read.tensors] == [
        ("direction.1", "F32", [32]),
        ("direction.2", "F32", [32]),
    ]
    found = {one.name: torch.from_numpy(one.data.copy()) for one in read.tensors}
    column = scope.saes[2].W_dec[:, 17].float()
    wanted = 0.5 * scope.stats[2].norm_median * column / column.norm() - 2 * plain
    torch.testing.assert_close(found["direction.2"], wanted)
    torch.testing.assert_close(found["direction.1"], plain / 4)

    # llama.cpp adds `direction.N` to the output of block N, for all tokens
    ids = torch.arange(1, 40)[None]
    with torch.no_grad(), ExitStack() as stack:
        for name, vector in found.items():
            block = blocks(scope.model)[int(name.split(".")[1])]

            def added(module, args, output, vector=vector):
                return output + vector

            stack.callback(block.register_forward_hook(added).remove)
        by_hand = scope.model(input_ids=ids).logits
    with torch.no_grad(), steering(scope.model, recipe, scope.saes, scope.stats):
        steered = scope.model(input_ids=ids).logits
    torch.testing.assert_close(by_hand, steered, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("one", "says"),
    [
        (
            Intervention.clamp(layer=2, feature=17, amount=1.0),
            "the clamp of feature 2/17 at layers.2.resid_post: it",
        ),
        (Intervention.scale(layer=2, feature=17, amount=2.0), "the scale of feature 2/17"),
        (Intervention.ablate(layer=2, feature=17), "the ablate of feature 2/17"),
        (Intervention.ablate(layer=2, direction=[1.0] * 32), "the ablate of a direction"),
        (add(layer=0, feature=17, amount=1.0), "the add of feature 0/17 at layers.0.resid_post: llama.cpp adds none"),
        (add(layer=2, feature=17, amount=1.0, where="generated"), "it is added at all tokens, not at 'generated'"),
        (add(layer=2, feature=17, amount=1.0, where="0,2-4"), "not at '0,2-4'"),
        (add(layer=2, feature=17, amount=1.0, where="thinking"), "not at 'thinking'"),
    ],
)
def test_what_it_can_not_express_is_named(one, says) -> None:
    with pytest.raises(InputError, match=f"a control vector can't express .*{says}"):
        check_control_vector([add(layer=1, direction=[1.0] * 32, amount=1.0), one])


def test_other_streams_nothing_and_no_layer(scope, tmp_path) -> None:
    with pytest.raises(InputError, match=r"at layers.2.mlp_out: it is added to the outputs of blocks"):
        check_control_vector([add(layer=HookPoint(2, "mlp_out"), direction=[1.0] * 32, amount=1.0)])
    with pytest.raises(InputError, match="add nothing"):
        control_vector(scope.model, [add(layer=1, direction=[1.0] * 32, amount=0.0)])
    with pytest.raises(NotFoundError, match="no layer 3"):
        control_vector(scope.model, [add(layer=3, direction=[1.0] * 32, amount=1.0)])
    with pytest.raises(MismatchError, match="does not fit a residual of 32"):
        control_vector(scope.model, [add(layer=1, direction=[1.0] * 31, amount=1.0)])
    with pytest.raises(InputError, match="at least 1"):
        write_control_vector({0: torch.ones(32)}, tmp_path / "v.gguf")
    with pytest.raises(InputError, match="at least one layer"):
        write_control_vector({}, tmp_path / "v.gguf")
    assert not list(tmp_path.iterdir())
