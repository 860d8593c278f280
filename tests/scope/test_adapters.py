"""A LoRA: its folder, the merged checkpoint and the live PEFT model are one model to a scope."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
import transformers

from qwen_scope import Intervention, load_scope
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError, QwenScopeError
from qwen_scope.model import load_config, load_model, load_tokenizer
from qwen_scope.steer import Decoding

# PEFT asks transformers by an old name.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

TEXTS = tiny.TEXTS[:3]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(model: Any, **options: Any) -> Any:
    """The model under a LoRA whose both halves are random, so that it changes something."""
    torch.manual_seed(3)
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, **options))
    for name, one in live.named_parameters():
        if "lora_" in name or "magnitude" in name:
            torch.nn.init.normal_(one, 1.0 if "magnitude" in name else 0.0, 0.1)
    return live.eval()


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny.folder() / "model").eval()


@pytest.fixture(scope="module", params=[{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def made(request, tmp_path_factory) -> tuple[Path, Any]:
    """A folder with `adapter` and `merged`, and the live model."""
    folder, live = tmp_path_factory.mktemp("lora"), adapted(base(), **request.param)
    live.save_pretrained(folder / "adapter")
    merged = adapted(base(), **request.param).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    load_tokenizer(tiny.folder() / "model").save_pretrained(folder / "merged")
    return folder, live


def seen(scope: Any) -> Any:
    return scope.features(TEXTS, layers=[2]).acts[2]


@pytest.mark.slow
def test_folder_merged_and_live_give_the_same_features(made: tuple[Path, Any]) -> None:
    folder, live = made
    saes = tiny.folder() / "sae"
    by_folder, merged = (load_scope(folder / name, saes, device="cpu") for name in ("adapter", "merged"))
    named = load_scope(tiny.folder() / "model", saes, adapter=folder / "adapter", device="cpu")
    tokenizer = load_tokenizer(tiny.folder() / "model")
    in_memory = load_scope(live, saes, tokenizer=tokenizer)
    want = seen(by_folder)
    for other in (merged, named):
        assert torch.equal(want.indices, seen(other).indices)
        assert torch.equal(want.values, seen(other).values)
    # W x + B (A x) against (W + B A) x: equal up to the order of additions.
    torch.testing.assert_close(seen(in_memory).to_dense(), want.to_dense(), rtol=1e-4, atol=1e-4)
    plain = seen(load_scope(tiny.folder() / "model", saes, device="cpu"))
    assert not torch.allclose(want.to_dense(), plain.to_dense(), atol=0.1)
    one = Intervention.add(layer=2, feature=5, amount=3.0)
    how = Decoding(max_new_tokens=8)
    texts = [scope.generate("The", [one], decoding=how).text for scope in (in_memory, merged)]
    assert texts[0] == texts[1]
    assert any("lora_" in name for name, _ in live.named_parameters()), "the live model is left as it is"


@pytest.mark.slow
def test_config_tokenizer_and_command_know_the_folder(made: tuple[Path, Any], capsys) -> None:
    folder = made[0] / "adapter"
    assert load_config(folder).hidden_size == tiny.D_MODEL
    assert load_tokenizer(folder)("The")["input_ids"] == load_tokenizer(tiny.folder() / "model")("The")["input_ids"]
    words = ["features", "The station", "--layers", "2", "--sae", str(tiny.folder() / "sae"), "--json", "--model"]
    found = []
    for model in (folder, made[0] / "merged"):
        assert main([*words, str(model)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] | {"model": ""} == found[1] | {"model": ""}


@pytest.mark.parametrize("words", [["features", "hi"], ["find", "--near", "2/5"], ["find", "--promotes", "hi"]])
def test_no_command_drops_an_adapter(words: list[str], tmp_path: Path, capsys) -> None:
    where = ["--model", str(tiny.folder() / "model"), "--sae", str(tiny.folder() / "sae"), "--device", "cpu"]
    assert main([*words, *where, "--adapter", str(tmp_path)]) == 2
    assert "there is no adapter in" in capsys.readouterr().err


def test_a_live_model_is_taken_as_it_is() -> None:
    model, saes = base(), tiny.folder() / "sae"
    tokenizer = load_tokenizer(tiny.folder() / "model")
    scope = load_scope(model, saes, tokenizer=tokenizer)
    assert scope.model is model
    want = seen(load_scope(tiny.folder() / "model", saes, device="cpu"))
    assert torch.equal(seen(scope).values, want.values)
    assert all(one.requires_grad for one in model.parameters())
    for options, says in (
        ({}, "needs its tokenizer"), ({"tokenizer": tokenizer, "dtype": "float32"}, "settled in a model in memory"),
        ({"tokenizer": tokenizer, "adapter": "x"}, "settled in a model in memory"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=says):
            load_scope(model, saes, **options)
    with pytest.raises(InputError, match="training mode"):
        load_scope(model.train(), saes, tokenizer=tokenizer)
    with pytest.raises(InputError, match="a name, a folder or a model"):
        load_scope(torch.nn.Linear(2, 2), saes, tokenizer=tokenizer)


def broken(folder: Path, tmp_path: Path, **values: Any) -> Path:
    out = Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | values))
    return out


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"base_model_name_or_path": None}, "does not say which model"),
        ({"base_model_name_or_path": 3}, "does not say which model"),
        ({"base_model_name_or_path": "nobody/nothing"}, "nobody/nothing"),
        ({"peft_type": "OF_TOMORROW"}, "does not fit"),
        ({"target_modules": ["no_such_module"]}, "does not fit"),
        ({"r": 5}, "does not fit"),
    ],
)
def test_adapters_that_can_not_be_read(made, tmp_path: Path, values: dict[str, Any], says: str) -> None:
    with pytest.raises(QwenScopeError, match=says) as caught:
        load_model(broken(made[0], tmp_path, **values), device="cpu")
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder = made[0] / "adapter"
    narrow = transformers.AutoConfig.from_pretrained(tiny.folder() / "model")
    narrow.hidden_size, narrow.head_dim = 16, 8
    transformers.AutoModelForCausalLM.from_config(narrow).save_pretrained(tmp_path / "other")
    load_tokenizer(tiny.folder() / "model").save_pretrained(tmp_path / "other")
    with (
        pytest.warns(UserWarning, match="was trained on .* and is put on"),
        pytest.raises(FormatError, match="not fit"),
    ):
        load_model(tmp_path / "other", adapter=folder, device="cpu")
    deeper = transformers.AutoConfig.from_pretrained(tiny.folder() / "model")
    deeper.num_hidden_layers, deeper.layer_types = 4, ["full_attention"] * 4
    transformers.AutoModelForCausalLM.from_config(deeper).save_pretrained(tmp_path / "deeper")
    load_tokenizer(tiny.folder() / "model").save_pretrained(tmp_path / "deeper")
    with pytest.warns(UserWarning, match="put on"), pytest.raises(FormatError, match="does not fit"):
        load_model(tmp_path / "deeper", adapter=folder, device="cpu")
    with pytest.raises(NotFoundError, match="no adapter in"):
        load_model(tiny.folder() / "model", adapter=tmp_path, device="cpu")


def test_an_adapter_that_changes_no_weights(tmp_path: Path) -> None:
    live = peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    live.save_pretrained(str(tmp_path / "prompt"))
    with pytest.raises(InputError, match="no change of weights"):
        load_model(tmp_path / "prompt", device="cpu")


IDS = torch.arange(24).reshape(2, 12)


def other_kinds() -> dict[str, Any]:
    targets = ["k_proj", "v_proj", "down_proj"]
    return {
        "scales (IA3)": peft.IA3Config(
            target_modules=targets, feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
        "whole modules": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["norm"]),
        "new embedding": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"]),
        "LoHa": peft.LoHaConfig(r=4, target_modules=TARGETS, init_weights=False),
    }


@pytest.mark.parametrize("kind", list(other_kinds()))
def test_other_kinds_of_adapters_give_what_the_live_model_gives(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    live = peft.get_peft_model(base(), other_kinds()[kind])
    for name, one in live.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(one, 1.0, 0.1)
    live.eval().save_pretrained(str(tmp_path / "adapter"))
    merged = load_model(tmp_path / "adapter", device="cpu").model
    with torch.no_grad():
        want, got, plain = (model(IDS).logits for model in (live, merged, base()))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, plain, atol=0.01)


def test_an_adapter_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    model = base()
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    live = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"]))
    live.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(FormatError, match="does not fit") as caught:
        load_model(tmp_path / "adapter", device="cpu")
    assert "\n" not in str(caught.value)


def test_an_adapter_beside_the_config_of_its_base_is_an_adapter(made: tuple[Path, Any], tmp_path: Path) -> None:
    both = Path(shutil.copytree(made[0] / "adapter", tmp_path / "adapter"))
    shutil.copy(tiny.folder() / "model" / "config.json", both)
    found, want = (load_model(folder, device="cpu").model(IDS).logits for folder in (both, made[0] / "merged"))
    assert torch.equal(found, want)
