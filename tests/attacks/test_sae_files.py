"""Hostile SAE files: each meets one clear sentence of the right kind, and nothing in it runs."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import hostile_sae as hostile
import pytest
import torch

from qwen_scope import errors
from qwen_scope.sae import Identity, JumpReLU, TopK, load_sae, save_sae


def meets(folder: Path, kind: str, sentence: str, source: Path | None = None) -> None:
    """Loading fails with that kind of error and one sentence, whether the folder or the file is named; nothing ran."""
    for named in (source,) if source else (folder, next(folder.glob("layer*"))):
        with pytest.raises(errors.QwenScopeError, match=sentence) as caught:
            load_sae(named)
        assert type(caught.value).__name__ == kind
        message = str(caught.value)
        assert "\n" not in message
        assert 10 < len(message) < 400
        assert "weights_only" not in message, "the advice to switch the protection off is not passed on"
    assert not (folder / hostile.MARKER).exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "SAE-Res-Hostile-W1K-L0_5"
    path.mkdir()
    return path


def test_the_good_one_loads(folder: Path) -> None:
    assert load_sae(hostile.pt(folder, hostile.good())).k == 5


@pytest.mark.parametrize("attack", hostile.NOT_WHOLE)
def test_not_a_whole_file(folder: Path, attack: str) -> None:
    write, sentence = hostile.NOT_WHOLE[attack]
    write(folder)
    meets(folder, "FormatError", sentence)


@pytest.mark.parametrize("attack", hostile.RUNS_CODE)
def test_a_file_that_tries_to_run_code(folder: Path, attack: str) -> None:
    write, sentence = hostile.RUNS_CODE[attack]
    write(folder)
    meets(folder, "FormatError", sentence)


def test_the_trap_works(folder: Path) -> None:
    """The marker appears when such a file is opened the old way, so its absence above means something."""
    torch.load(hostile.pt(folder, {"W_enc": hostile.command(folder)}), weights_only=False)
    assert (folder / hostile.MARKER).exists()


@pytest.mark.parametrize("attack", hostile.WRONG_CONTENT)
def test_a_whole_file_with_the_wrong_content(folder: Path, attack: str) -> None:
    write, kind, sentence = hostile.WRONG_CONTENT[attack]
    write(folder)
    meets(folder, kind, sentence)


@pytest.mark.parametrize("attack", hostile.CONFIGS)
def test_a_config_that_is_wrong(folder: Path, attack: str) -> None:
    content, kind, sentence = hostile.CONFIGS[attack]
    hostile.pt(folder, hostile.good())
    (folder / "config.json").write_bytes(content)
    meets(folder, kind, sentence)


@pytest.mark.parametrize("name", ["threshold", "b_enc", "b_dec"])
@pytest.mark.parametrize("layout", ["official", "safetensors", "sae_lens", "dictionary_learning"])
def test_vectors_that_are_not_finite_in_every_layout(tmp_path: Path, layout: str, name: str) -> None:
    tensors = {**hostile.good(), "threshold": torch.ones(hostile.D_SAE)}
    tensors[name][1] = float("nan")
    sae = JumpReLU(**tensors)
    identity = type(sae.identity)("g", 3, "f")
    save_sae(type(sae)(**tensors, identity=identity), tmp_path / "s", layout)
    meets(tmp_path, "FormatError", f"{name} holds NaN or infinity, first at position 1", tmp_path / "s")


def test_files_that_are_not_there(folder: Path) -> None:
    meets(folder, "NotFoundError", "there is no file or folder", folder / "layer9.sae.pt")
    meets(folder, "FormatError", "holds no SAE in a known layout .* it holds nothing", folder)
    (folder / "layer3.sae.pt").mkdir()
    meets(folder, "FormatError", "holds no SAE in a known layout", folder)
    (folder / "notes.txt").write_text("x")
    meets(folder, "FormatError", "it holds notes.txt", folder)
    meets(folder, "InputError", "neither a folder nor a .pt or .safetensors file", folder / "notes.txt")


def test_names_that_mean_the_same_layer(folder: Path) -> None:
    shutil.copy(hostile.pt(folder, hostile.good()), folder / "layer03.sae.pt")
    with pytest.raises(errors.InputError, match=r"several SAEs for layer 3, .* 'layer03.sae.pt', 'layer3.sae.pt'"):
        load_sae(folder, 3)
    assert load_sae(folder, "layer3.sae.pt").identity.layer == 3


def test_a_file_that_says_another_layer_than_its_name(tmp_path: Path) -> None:
    sae = load_sae(hostile.pt(tmp_path, hostile.good()), k=5)
    save_sae(sae, tmp_path / "s", "safetensors")
    (tmp_path / "s" / "layer3.sae.safetensors").rename(tmp_path / "s" / "layer4.sae.safetensors")
    with pytest.raises(errors.FormatError, match="name says layer 4, but it describes itself as layer 3"):
        load_sae(tmp_path / "s")


K_GIVEN = {"nothing": 0, "below nothing": -5, "true": True, "a half": 2.5, "a float": 5.0, "words": "5", "more": 25}


@pytest.mark.parametrize("k", K_GIVEN.values(), ids=K_GIVEN)
def test_a_k_that_makes_no_sense_is_refused_where_it_is_given(tmp_path: Path, k: object) -> None:
    (tmp_path / "plain").mkdir()
    path = hostile.pt(tmp_path / "plain", hostile.good())
    unchecked = inspect.unwrap(load_sae)  # without the checks of signatures that run in tests alone
    with pytest.raises(
        errors.InputError, match=r"^k (must be a whole number of at least 1|must be between 1 and .* 24); got|, not"
    ):
        unchecked(path, k=k)
    if isinstance(k, int):
        with pytest.raises(errors.InputError, match=r"^k must be between 1 and the number of features, 24; got"):
            TopK(*hostile.good().values(), k=k)


@pytest.mark.parametrize("layout", ["official", "safetensors", "sparsify", "sae_lens", "dictionary_learning"])
def test_a_name_that_says_another_k_than_the_config_is_told(tmp_path: Path, layout: str) -> None:
    sae = TopK(*hostile.good().values(), k=5, identity=Identity("SAE-Res-Mine", 3, "f" * 64))
    save_sae(sae, tmp_path / "SAE-Res-Mine-L0_7", layout)
    with pytest.warns(errors.QwenScopeWarning, match=r"^the name 'SAE-Res-Mine-L0_7' says k=7, but .*k=5, which is"):
        assert load_sae(tmp_path / "SAE-Res-Mine-L0_7", 3).k == 5
    (tmp_path / "SAE-Res-Mine-L0_7").rename(tmp_path / "SAE-Res-Mine-L0_5")
    assert load_sae(tmp_path / "SAE-Res-Mine-L0_5", 3).k == 5


def test_a_threshold_below_zero_is_no_sae() -> None:
    with pytest.raises(errors.InputError, match="threshold holds -3 at position 2; thresholds are 0 or above"):
        JumpReLU(*hostile.good().values(), threshold=torch.ones(hostile.D_SAE).index_fill(0, torch.tensor(2), -3.0))
