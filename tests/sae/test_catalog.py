"""The catalog against table 1 of the report, written out here a second time."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from qwen_scope.errors import InputError, NotFoundError
from qwen_scope.sae import catalog

# Model: layers, d_model, then width in K and k of each group.
TABLE = {
    "Qwen3-1.7B-Base": (28, 2048, [(32, 50), (32, 100)]),
    "Qwen3-8B-Base": (36, 4096, [(64, 50), (64, 100)]),
    "Qwen3-30B-A3B-Base": (48, 2048, [(32, 50), (128, 100)]),
    "Qwen3.5-2B-Base": (24, 2048, [(32, 50), (32, 100)]),
    "Qwen3.5-9B-Base": (32, 4096, [(64, 50), (64, 100)]),
    "Qwen3.5-27B": (64, 5120, [(80, 50), (80, 100)]),
    "Qwen3.5-35B-A3B-Base": (40, 2048, [(32, 50), (128, 100)]),
}


def test_every_row_of_the_table() -> None:
    released = {group.repo: group for group in catalog.groups() if group.repo}
    assert len(released) == 14
    assert sum(group.layers for group in released.values()) == 544
    for model, (layers, d_model, widths) in TABLE.items():
        for width, k in widths:
            group = released[f"Qwen/SAE-Res-{model}-W{width}K-L0_{k}"]
            assert (group.model, group.layers, group.d_model) == (f"Qwen/{model}", layers, d_model)
            assert (group.d_sae, group.k, group.hook_point) == (width * 1024, k, "resid_post")
            assert group.kind == ("base" if model.endswith("Base") else "instruct")
            release = model.removeprefix("Qwen").lower()
            assert group.aliases == (f"qwen-scope-{release}-w{width}k-l{k}",)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50",
        "qwen-scope-3-1.7b-base-w32k-l50",
        "QWEN/sae-res-qwen3-1.7b-base-w32k-l0_50",
    ],
)
def test_all_names_of_a_group(name: str) -> None:
    group = catalog.find(name)
    assert group.name == "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    assert group.filename(27) == "layer27.sae.pt"
    with pytest.raises(NotFoundError, match="layers 0 to 27"):
        group.filename(28)


NEAR_MISSES = ["SAE-Res-Qwen3-1.7B-Base-W32K-L0_5O", "qwen-scope-3-1.7b-base-w32k-150", "qwen3-1.7b-base-w32k-l0_50"]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_misspelt_name_answers_with_the_nearest(name: str) -> None:
    with pytest.raises(NotFoundError, match=re.compile("did you mean .*1.7b-base-w32k-l", re.IGNORECASE)):
        catalog.find(name)


def test_sizes() -> None:
    group = catalog.find("qwen-scope-3-1.7b-base-w32k-l50")
    assert group.bytes_per_layer() == 2 * 32768 * 2048 * 4 + (32768 + 2048) * 4
    assert group.bytes_per_layer(torch.bfloat16) == group.bytes_per_layer("bfloat16") < group.bytes_per_layer() * 0.51
    assert group.total_bytes() == 28 * group.bytes_per_layer()
    assert round(catalog.find("qwen-scope-3.5-27b-w80k-l50").bytes_per_layer() / 1e9, 2) == 3.36
    with pytest.raises(InputError, match="float64"):
        group.bytes_per_layer(torch.float64)


def test_the_lab_describes_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room = Path(catalog.__file__).parent
    monkeypatch.setattr("importlib.resources.files", lambda package: room if "sae" in package else tmp_path)
    with pytest.raises(NotFoundError, match="qwen-scope lab build"):
        catalog.find("lab")
    folder = tmp_path / "assets" / "lab" / "sae"
    folder.mkdir(parents=True)
    config = {"group": "SAE-Res-Lab-W2K-L0_32", "d_model": 96, "d_sae": 2048, "k": 32}
    (folder / "config.json").write_text(json.dumps(config))
    for layer in range(6):
        (folder / f"layer{layer}.sae.pt").touch()
    for name in ("lab", "LAB", "SAE-Res-Lab-W2K-L0_32"):
        group = catalog.find(name)
        assert (group.layers, group.d_model, group.d_sae, group.k, group.repo) == (6, 96, 2048, 32, None)
        assert group.folder == folder
        assert group.model == str(tmp_path / "assets" / "lab" / "model")
    assert catalog.groups()[0].name == "SAE-Res-Lab-W2K-L0_32"
