"""Choosing a layer, keeping types and identity, and writing whole files or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sae_toys import toy

from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.sae import LAYOUTS, layers_of, load_sae, save_sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_sae([toy(layer=layer) for layer in (0, 1, 2, 12)], tmp_path / "saes", "safetensors")


@pytest.mark.parametrize(
    "layer",
    [
        *(12, "12", "layer12", "layers.12", "layers.12.resid_post", "blocks.12.hook_resid_post", "model.layers.12"),
        *("model.language_model.layers.12", "language_model.model.layers.12", "gpt_neox.layers.12", "transformer.h.12"),
    ],
)
def test_every_spelling_of_a_layer(folder: Path, layer: int | str) -> None:
    sae = load_sae(folder, layer)
    assert (sae.identity.layer, sae.hook_point) == (12, "layers.12.resid_post")


@pytest.mark.parametrize("layer", ["twelve", "layers.12.mlp_out", "blocks.12.hook_resid_pre", "", "12.5", -1, True])
def test_a_layer_that_is_none(folder: Path, layer: int | str) -> None:
    with pytest.raises(InputError, match="layer"):
        load_sae(folder, layer)


def test_layers_that_exist_are_listed(folder: Path) -> None:
    assert layers_of(folder) == [0, 1, 2, 12]
    with pytest.raises(NotFoundError, match="no SAE for layer 3; it has layers 0, 1, 2, 12"):
        load_sae(folder, 3)
    with pytest.raises(InputError, match="choose one with layer=: layers 0, 1, 2, 12"):
        load_sae(folder)
    (folder / "layer12.sae.safetensors").unlink()
    with pytest.raises(NotFoundError, match="it has layers 0 to 2"):
        load_sae(folder, 3)


def test_one_file_needs_no_layer_and_refuses_another(folder: Path) -> None:
    assert load_sae(folder / "layer2.sae.safetensors").identity.layer == 2
    assert layers_of(folder / "layer2.sae.safetensors") == [2]
    with pytest.raises(NotFoundError, match="no SAE for layer 1; it has layer 2"):
        load_sae(folder / "layer2.sae.safetensors", 1)


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    save_sae(toy(), tmp_path / "s")
    (tmp_path / "s" / "layer3.sae.pt").rename(tmp_path / "mine.pt")
    sae = load_sae(tmp_path / "mine.pt", layer=9, k=5)
    assert sae.identity.layer == 9
    assert load_sae(tmp_path / "mine.pt", k=5).identity.layer is None


def test_type_and_device_are_kept_or_changed(folder: Path) -> None:
    assert load_sae(folder, 0).dtype == torch.float32
    half = load_sae(folder, 0, dtype=torch.bfloat16)
    assert (half.dtype, half.b_enc.dtype, half.identity) == (torch.bfloat16, torch.float32, toy(layer=0).identity)
    assert load_sae(folder, 0, device="meta").device.type == "meta"
    with pytest.raises(InputError, match="float64"):
        load_sae(folder, 0, dtype=torch.float64)


def test_the_width_of_the_model_is_checked(folder: Path) -> None:
    assert load_sae(folder, 0, d_model=16).d_model == 16
    with pytest.raises(MismatchError, match="reads residuals of 16 dimensions, but the model has 2048"):
        load_sae(folder, 0, d_model=2048)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/folder", "there is no file or folder no/such/folder"),
        ("layer3.sae.pt", "there is no file or folder layer3.sae.pt"),
        (Path("nowhere"), "there is no file or folder nowhere"),
        ("qwen-scope-3-1.7b-base-w32k-l5", "did you mean 'qwen-scope-3-1.7b-base-w32k-l50'"),
        ("SAE-Res-Qwen3-8B-Bass-W64K-L0_50", "is not in the local cache and HF_HUB_OFFLINE is set"),
        ("someone/something", "is not in the local cache and HF_HUB_OFFLINE is set"),
        ("qwen/sae-res-qwen3-8b-base-w64k-l0_50", "is not in the local cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_source_that_is_not_there(source: str | Path, message: str) -> None:
    with pytest.raises(NotFoundError, match=message) as caught:
        load_sae(source, 3)
    assert "\n" not in str(caught.value)


def test_a_revision_is_for_repositories(folder: Path) -> None:
    with pytest.raises(InputError, match="has no revisions"):
        load_sae(folder, 0, revision="main")


def test_the_catalogs_groups_have_their_layers() -> None:
    assert layers_of("qwen-scope-3.5-27b-w80k-l50") == list(range(64))
    with pytest.raises(NotFoundError, match="no SAE for layer 64; it has layers 0 to 63"):
        load_sae("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50", 64)


def test_a_folder_holds_one_group_of_one_kind(folder: Path) -> None:
    before = sorted(p.name for p in folder.iterdir())
    with pytest.raises(MismatchError, match="with group"):
        save_sae(toy(layer=5, group="Other"), folder, "safetensors")
    with pytest.raises(MismatchError, match="with k 5, and this one has 6"):
        save_sae(toy(layer=5, k=6), folder, "safetensors")
    with pytest.raises(MismatchError, match="architecture 'topk'"):
        save_sae(toy("jumprelu", layer=5), folder, "safetensors")
    other = toy(layer=77)
    other = replace(other, identity=replace(other.identity, layer=1), hook_point=None)
    with pytest.raises(MismatchError, match="another SAE for layer 1"):
        save_sae(other, folder, "safetensors")
    with pytest.raises(FormatError, match="already holds SAEs in the layout safetensors"):
        save_sae(toy(layer=5), folder, "official")
    with pytest.raises(MismatchError, match="one group of SAEs, not A, B"):
        save_sae([toy(layer=5, group="A"), toy(layer=6, group="B")], folder.parent / "new")
    with pytest.raises(InputError, match="same layer"):
        save_sae([toy(layer=5), toy(layer=5)], folder.parent / "new")
    with pytest.raises(InputError, match="no SAE to save"):
        save_sae([], folder.parent / "new")
    with pytest.raises(InputError, match="did you mean 'sae_lens'"):
        save_sae(toy(), folder.parent / "new", "saelens")
    assert sorted(p.name for p in folder.iterdir()) == before
    assert not (folder.parent / "new").exists()


@pytest.mark.parametrize("layout", ["sae_lens", "sparsify", "dictionary_learning"])
def test_a_folder_of_one_sae_is_not_overwritten_by_another(tmp_path: Path, layout: str) -> None:
    save_sae(toy(), tmp_path / "s", layout)
    with pytest.raises(MismatchError):
        save_sae(toy(layer=4), tmp_path / "s", layout)
    assert load_sae(tmp_path / "s").identity == toy().identity
    save_sae(toy(), tmp_path / "s", layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layer_is_not_overwritten_by_another_sae(tmp_path: Path, layout: str) -> None:
    """Not even where no config lists the fingerprints, as in a folder somebody else made."""
    save_sae(toy(), tmp_path / "s", layout)
    config = tmp_path / "s" / "config.json"
    if config.exists() and layout in ("official", "safetensors"):
        config.write_text(json.dumps({"k": 5}))
    other = replace(toy(layer=4), identity=replace(toy(layer=4).identity, layer=3), hook_point=None)
    with pytest.raises(MismatchError, match="already holds another SAE for layer 3, choose another folder"):
        save_sae(other, tmp_path / "s", layout)
    (tmp_path / "s" / LAYOUTS[layout].weights_name(3)).write_bytes(b"broken")
    with pytest.raises(FormatError):
        save_sae(toy(), tmp_path / "s", layout)


def test_saving_over_the_file_an_sae_is_mapped_from(tmp_path: Path) -> None:
    save_sae(toy(), tmp_path / "s")
    mapped = load_sae(tmp_path / "s")
    save_sae(mapped, tmp_path / "s")
    assert torch.equal(mapped.W_enc, toy().W_enc)
    assert torch.equal(load_sae(tmp_path / "s").W_enc, toy().W_enc)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_interrupted_save_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str, step: int
) -> None:
    """The disk fills up at the first weights file, at the second, and while the config is written."""
    from qwen_scope.sae import save

    real, calls = save.write_weights, []

    def failing(*args: object) -> None:
        calls.append(args)
        if len(calls) > step:
            raise OSError(28, "No space left on device")
        real(*args)  # type: ignore[arg-type]

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    if step < 2:
        monkeypatch.setattr(save, "write_weights", failing)
    else:
        monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_sae([toy(layer=1), toy(layer=2)], tmp_path / "deep" / "er", layout)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["official", "safetensors"])
def test_a_file_that_may_not_grow(tmp_path: Path, layout: str) -> None:
    """A real refusal of the system in the middle of a weights file, not a pretended one."""
    code = (
        "import resource, signal, sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}]\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from sae_toys import toy\n"
        "from qwen_scope.errors import InputError\n"
        "from qwen_scope.sae import save_sae\n"
        "sae = toy(d_sae=4096)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        f"    save_sae(sae, {str(tmp_path / 'out')!r}, {layout!r})\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith(f"the SAE could not be written to {tmp_path / 'out'}: ")
    assert done.stdout.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_config_lists_what_the_folder_holds(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert list(config["fingerprints"]) == ["0", "1", "2", "12"]
    assert config["fingerprints"]["12"] == toy(layer=12).identity.fingerprint
    assert (config["k"], config["d_model"], config["d_sae"], config["hook_point"]) == (5, 16, 64, "resid_post")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
def test_our_safetensors_are_what_their_package_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    from qwen_scope.sae.formats.container import write_safetensors

    generator = torch.Generator().manual_seed(3)
    made = {"b": torch.randn(3, 5, generator=generator), "a\u2028": torch.randn((), generator=generator)}
    tensors = {name: one.to(dtype) for name, one in made.items()} | {"empty": torch.zeros(0, 2), "f": torch.ones(7)}
    paths = [tmp_path / name for name in ("x.safetensors", "a_longer_name.safetensors")]
    for path in paths:
        write_safetensors(path, tensors, {"z": "1", "k": "\u00e4"})
    assert paths[0].read_bytes() == paths[1].read_bytes()
    read = load_file(paths[0])
    assert read.keys() == tensors.keys()
    for name, one in tensors.items():
        assert read[name].dtype == one.dtype
        assert read[name].shape == one.shape
        assert torch.equal(read[name], one)
    with safe_open(paths[0], "pt") as file:
        assert file.metadata() == {"z": "1", "k": "\u00e4"}
    write_safetensors(paths[0], {"only": tensors["b"]}, {})
    assert torch.equal(load_file(paths[0])["only"], tensors["b"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_sae_is_the_same_bytes(tmp_path: Path, layout: str) -> None:
    found = []
    for name in "ab":
        save_sae(toy(), tmp_path / name, layout)
        found.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()})
    assert found[0] == found[1]
