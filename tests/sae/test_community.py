"""The community's SAEs: what the catalog says of them, and small folders written as each release lays its files out,
read by `load_sae` and compared with the release's own formula in float64."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError, QwenScopeError
from qwen_scope.sae import SAE, catalog, compare_saes, layers_of, load_sae, save_sae
from qwen_scope.scope import config_of, plan_group, resolve

D_MODEL, D_SAE, K, SCALE = 16, 64, 5, 0.37
FULLSTACK = (15, 19, 23, 27, 35, 39, 43, 47, 51, 59, 63)

# Group: model, layers, d_model, d_sae, k, architecture; 0 is not known.
GROUPS = {
    "caiovicentino1/qwen36-27b-sae-papergrade": ("Qwen3.6-27B", (11, 31, 55), 5120, 65536, 128, "topk"),
    "caiovicentino1/qwen36-27b-sae-fullstack": ("Qwen3.6-27B", FULLSTACK, 5120, 40960, 128, "topk"),
    "ceselder/qwen36-27b-sae-l42": ("Qwen3.6-27B", (42,), 5120, 131072, 64, "jumprelu"),
    "LeonInverse/qwen3.8-27b-scope-code": ("Qwen3.8-27B", tuple(range(64)), 5120, 40960, 50, "topk"),
    "qwen-3.5-0.8b-saes": ("Qwen3.5-0.8B", (5, 11, 17), 1024, 0, 100, "jumprelu"),
    "qwen-3.5-0.8b-base-saes": ("Qwen3.5-0.8B-Base", (), 1024, 0, 100, "jumprelu"),
    "qwen-3.5-4b-saes": ("Qwen3.5-4B", (15,), 2560, 65536, 100, "jumprelu"),
    "qwen-3.5-4b-base-saes": ("Qwen3.5-4B-Base", (15,), 2560, 65536, 100, "jumprelu"),
}
for size, d_model, depth in (("1.7B", 2048, 28), ("8B", 4096, 36), ("14B", 5120, 40), ("32B", 5120, 64)):
    for width, k in ((16, 80), (16, 160), (65, 80), (65, 160)):
        quarters = tuple(depth * part // 4 for part in (1, 2, 3))
        facts = (f"Qwen3-{size}", quarters, d_model, {16: 16384, 65: 65536}[width], k, "jumprelu")
        GROUPS[f"qwen3-{size.lower()}-saes-W{width}K-L0_{k}"] = facts


def weights(dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, Tensor]:
    """Random weights as `x @ W_enc`, with biases large enough that a wrong fold shows."""
    g = torch.Generator().manual_seed(seed)
    made = {
        "W_enc": torch.randn(D_MODEL, D_SAE, generator=g),
        "W_dec": torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=g), dim=1),
        "b_enc": torch.randn(D_SAE, generator=g),
        "b_dec": torch.randn(D_MODEL, generator=g) * 2,
    }
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def residuals(rows: int = 50) -> Tensor:
    return torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(7)) * 3


def written(path: Path, content: object) -> Path:
    """A file of that kind with that content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)  # pyright: ignore
    else:
        torch.save(content, path)
    return path


def topk(pre: Tensor, k: int = K) -> Tensor:
    values, indices = torch.relu(pre).topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values)


def of_open_interpretability(x: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k of relu((x - b_dec) W_enc + b_enc)."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    acts = topk((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    return acts, acts @ w["W_dec"] + w["b_dec"]


def of_threshold(x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """BatchTopK at inference, in dictionary_learning and in sae_lens: what lies above the threshold."""
    w = {name: tensor.double() for name, tensor in weights().items()}
    pre = torch.relu((x.double() - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    acts = pre * (pre > threshold.double())
    return acts, acts @ w["W_dec"] + w["b_dec"]


def of_scope_code(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of its card, on the bf16 weights as they are."""
    w = {name: tensor.double() for name, tensor in weights(torch.bfloat16).items()}
    acts = topk((x.double() * SCALE - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    return acts, (acts @ w["W_dec"] + w["b_dec"]) / SCALE


def papergrade(root: Path) -> Path:
    config = {"architecture": "topk", "d_in": D_MODEL, "d_sae": D_SAE, "k": K, "model_name": "Qwen/Qwen3.6-27B"}
    for layer in (11, 31, 55):
        written(root / f"sae_L{layer}_latest.safetensors", weights(seed=1 if layer == 31 else layer))
        written(root / f"sae_L{layer}_cfg.json", config | {"hook_name": f"model.language_model.layers.{layer}"})
    return root


def fullstack(root: Path) -> Path:
    for layer in FULLSTACK:
        written(root / f"sae_L{layer}_latest.safetensors", weights(seed=1 if layer == 31 else layer))
        written(root / f"sae_L{layer}_cfg.json", {"d_in": D_MODEL, "k": K})
    written(root / "sae_L31_latest.safetensors", weights())
    return written(root / "sae_L31_cfg.json", {"d_in": D_MODEL, "k": K}).parent


def dictionary(root: Path) -> Path:
    w = weights()
    for layer in (9, 31):
        tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"] + (layer == 9)}
        tensors |= {"decoder.weight": w["W_dec"].T.contiguous(), "b_dec": w["b_dec"]}
        tensors |= {"k": torch.tensor(K), "threshold": torch.tensor(1.58)}
        at = root / "saes_Qwen_Qwen3-8B_batch_top_k" / f"resid_post_layer_{layer}" / "trainer_2"
        trainer = {"trainer_class": "BatchTopKTrainer", "dict_class": "BatchTopKSAE", "k": K, "layer": layer}
        trainer |= {"activation_dim": D_MODEL, "dict_size": D_SAE, "lm_name": "Qwen/Qwen3-8B"}
        trainer |= {"submodule_name": f"resid_post_layer_{layer}"}
        written(at / "ae.pt", tensors)
        written(at / "config.json", {"trainer": trainer, "buffer": {"d_submodule": D_MODEL, "io": "out"}})
    return root


def thresholds() -> Tensor:
    return 1 + torch.rand(D_SAE, generator=torch.Generator().manual_seed(3))


def matryoshka(root: Path) -> Path:
    for layer in (15, 31):
        at = root / "qwen-3.5-4b" / f"btk-mat-layer-{layer}-k-100"
        written(at / "sae_weights.safetensors", weights() | {"threshold": thresholds() + (layer == 15)})
        named = {"hook_name": f"model.language_model.layers.{layer}", "model_name": "Qwen/Qwen3.5-4B"}
        config = {"architecture": "jumprelu", "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32"}
        config |= {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
        said = {"sae_lens_version": "6.21.0", "training_architecture": "matryoshka_batchtopk", **named}
        written(at / "cfg.json", config | {"metadata": said})
    return root


def checkpoint(seed: int = 1) -> dict:
    w = weights(torch.bfloat16, seed)
    state = {"b_pre": w["b_dec"], "W_enc": w["W_enc"], "b_enc": w["b_enc"], "W_dec": w["W_dec"]}
    return {"state": state, "scale": SCALE, "k": K, "width": D_SAE, "tokens": 110_000_000}


def scope_code(root: Path) -> Path:
    for layer in (0, 31):
        written(root / "v2" / f"layer_{layer:02d}.pt", checkpoint(1 if layer == 31 else 2))
    return root / "v2"


RELEASES: dict[str, tuple[Callable[[Path], Path], Callable[[Tensor], tuple[Tensor, Tensor]], float]] = {
    "papergrade": (papergrade, of_open_interpretability, 1),
    "fullstack": (fullstack, of_open_interpretability, 1),
    "dictionary_learning": (dictionary, lambda x: of_threshold(x, torch.tensor(1.58)), 1),
    "matryoshka": (matryoshka, lambda x: of_threshold(x, thresholds()), 1),
    "scope_code": (scope_code, of_scope_code, SCALE),
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_folder_as_it_was_released_gives_what_the_release_computes(tmp_path: Path, name: str) -> None:
    make, formula, units = RELEASES[name]
    sae = load_sae(make(tmp_path / "repo"), 31)
    assert (sae.hook_point, sae.identity.layer) == ("layers.31.resid_post", 31)
    x = residuals()
    acts, x_hat = formula(x)
    found = sae.encode(x).to_dense().double() * units
    assert torch.equal(found > 0, acts > 0), "the same features are active"
    assert (acts > 0).sum() > len(x), "and some are"
    torch.testing.assert_close(found, acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(sae.encode(x)).double(), x_hat, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", RELEASES)
def test_it_computes_the_same_once_it_is_converted(tmp_path: Path, name: str) -> None:
    sae = load_sae(RELEASES[name][0](tmp_path / "repo"), 31)
    back = load_sae(save_sae(sae, tmp_path / "out", "safetensors"))
    found = compare_saes(sae, back, residuals())
    assert back.identity == sae.identity
    assert (found.jaccard, found.value_error) == (1, 0)


def test_a_bare_file_needs_its_k_and_takes_it_from_the_catalog_where_it_is_listed(tmp_path: Path) -> None:
    written(tmp_path / "sae_L31_latest.safetensors", weights())
    with pytest.raises(InputError, match="pass k="):
        load_sae(tmp_path)
    sae = load_sae(tmp_path, k=K)
    assert torch.equal(sae.encode(residuals()).to_dense() > 0, of_open_interpretability(residuals())[0] > 0)


def cached(root: Path, repo: str, files: Callable[[Path], Path]) -> Path:
    """A cache of huggingface_hub that holds those files of the repository."""
    top, commit = root / f"models--{repo.replace('/', '--')}", "1" * 40
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(commit)
    files(top / "snapshots" / commit)
    return root


def small(name: str) -> catalog.Group:
    return replace(catalog.find(name), d_model=D_MODEL, d_sae=D_SAE, k=K)


@pytest.mark.parametrize(
    ("name", "make", "layers"),
    [
        ("caiovicentino1/qwen36-27b-sae-papergrade", papergrade, [11, 31, 55]),
        ("qwen-3.5-4b-saes", matryoshka, [15, 31]),
        ("LeonInverse/qwen3.8-27b-scope-code", lambda root: scope_code(root), list(range(64))),
    ],
)
def test_a_listed_group_is_read_from_the_cache_without_the_hub(
    tmp_path: Path, name: str, make: Callable[[Path], Path], layers: list[int]
) -> None:
    group = small(name)
    assert group.repo is not None
    cache = cached(tmp_path, group.repo, make)
    assert layers_of(group, cache_dir=cache) == layers
    sae = load_sae(group, 31, cache_dir=cache)
    assert (sae.identity.group, sae.identity.layer) == (group.name, 31)
    with pytest.raises(MismatchError, match="according to the catalog"):
        load_sae(replace(group, d_model=D_MODEL + 1), 31, cache_dir=cache)


def test_k_of_the_catalog_stands_in_where_a_config_does_not_say_it(tmp_path: Path) -> None:
    group = small("caiovicentino1/qwen36-27b-sae-papergrade")

    def of(name: str, config: dict[str, object]) -> Path:
        def files(root: Path) -> Path:
            written(root / "sae_L31_latest.safetensors", weights())
            return written(root / "sae_L31_cfg.json", {"d_in": D_MODEL, "d_sae": D_SAE, **config})

        return cached(tmp_path / name, str(group.repo), files)

    sae = load_sae(group, 31, cache_dir=of("without", {}))
    assert sae.k == K
    torch.testing.assert_close(
        sae.encode(residuals()).to_dense().double(),
        of_open_interpretability(residuals().double())[0],
        rtol=1e-5,
        atol=1e-5,
    )
    assert load_sae(group, 31, cache_dir=of("stated", {"k": K})).k == K
    with pytest.raises(MismatchError, match=f"k={K} according to the catalog, but .* says k={K + 1}"):
        load_sae(group, 31, cache_dir=of("other", {"k": K + 1}))
    with pytest.raises(MismatchError, match=f"k={K} according to the catalog"):
        load_sae(group, 31, k=K + 2, cache_dir=of("typed", {}))


def test_the_layers_of_a_release_are_known_without_the_hub(tmp_path: Path) -> None:
    assert layers_of("caiovicentino1/qwen36-27b-sae-fullstack", cache_dir=tmp_path) == list(FULLSTACK)
    assert layers_of("qwen-3.5-0.8b-saes", cache_dir=tmp_path) == [5, 11, 17]
    with pytest.raises(NotFoundError, match=r"sae_L15_cfg\.json of caiovicentino1"):
        load_sae("caiovicentino1/qwen36-27b-sae-fullstack", 15, cache_dir=tmp_path)
    with pytest.raises(NotFoundError, match="no SAE for layer 16; it has layers 15, 19, 23"):
        load_sae("caiovicentino1/qwen36-27b-sae-fullstack", 16, cache_dir=tmp_path)


def test_files_numbered_from_1_are_counted_from_0(tmp_path: Path) -> None:
    group = replace(small("qwen3.8-27b-scope-code"), layers=3, which=(0, 1, 2))

    def files(root: Path) -> Path:
        for number in (1, 2, 3):
            written(root / "v2" / f"layer{number}.pt", checkpoint(number))
            written(root / "stage1" / f"layer{number}.pt", checkpoint(9))
        return root

    cache = cached(tmp_path, "LeonInverse/qwen3.8-27b-scope-code", files)
    sae = load_sae(group, 0, cache_dir=cache)
    assert torch.equal(sae.W_enc, weights(torch.bfloat16, 1)["W_enc"].T)
    assert sae.hook_point == "layers.0.resid_post"


def test_the_fold_of_a_scale_leaves_the_matrices_and_rounds_the_biases_once(tmp_path: Path) -> None:
    sae = load_sae(scope_code(tmp_path), 31)
    w = {name: tensor.double() for name, tensor in weights(torch.bfloat16).items()}
    assert sae.dtype == torch.bfloat16
    assert torch.equal(sae.W_enc.double(), w["W_enc"].T)
    assert torch.equal(sae.W_dec.double(), w["W_dec"].T)
    b_enc = (w["b_enc"] - w["b_dec"] @ w["W_enc"]) / SCALE
    torch.testing.assert_close(sae.b_enc.double(), b_enc, rtol=1.2e-7, atol=0)
    torch.testing.assert_close(sae.b_dec.double(), w["b_dec"] / SCALE, rtol=1.2e-7, atol=0)
    assert sae.meta["scope_code"] == {"scale": SCALE, "tokens": "110000000"}


def test_two_sets_of_one_release_are_told_apart_by_their_files(tmp_path: Path) -> None:
    scope_code(tmp_path)
    written(tmp_path / "stage1" / "layer_31.pt", checkpoint(4))
    with pytest.raises(InputError, match=r"'stage1/layer_31\.pt', 'v2/layer_31\.pt'"):
        load_sae(tmp_path, 31)
    found = load_sae(tmp_path, "stage1/layer_31.pt")
    assert torch.equal(found.W_enc, weights(torch.bfloat16, 4)["W_enc"].T)


def without(name: str) -> dict:
    made = checkpoint()
    del made["state"][name]
    return made


def with_state(**changed: Tensor) -> dict:
    made = checkpoint()
    made["state"] |= changed
    return made


class Evil:
    """Something that runs code when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (exec, ("raise SystemExit",))


BAD = {
    "no scale": (
        "layer3.pt",
        {key: value for key, value in checkpoint().items() if key != "scale"},
        "lacks the number",
    ),
    "scale 0": ("layer3.pt", checkpoint() | {"scale": 0.0}, "'scale' in the weights file must be a positive number"),
    "a negative scale": ("layer3.pt", checkpoint() | {"scale": -1}, "must be a positive number, not -1"),
    "a scale of nan": ("layer3.pt", checkpoint() | {"scale": float("nan")}, "must be a positive number, not nan"),
    "an infinite scale": (
        "layer3.pt",
        checkpoint() | {"scale": torch.tensor(float("inf"))},
        "positive number, not inf",
    ),
    "a scale in words": ("layer3.pt", checkpoint() | {"scale": "1"}, "'scale' of type str; beside 'state' stand num"),
    "several scales": ("layer3.pt", checkpoint() | {"scale": torch.ones(2)}, "'scale' of type Tensor"),
    "k no whole number": ("layer3.pt", checkpoint() | {"k": 2.5}, "'k' beside the weights must be a whole number"),
    "another width": ("layer3.pt", checkpoint() | {"width": 65}, "d_sae 65, but the weights have d_sae 64"),
    "no b_pre": ("layer3.pt", without("b_pre"), "lacks b_pre"),
    "a further tensor": ("layer3.pt", with_state(threshold=torch.ones(D_SAE)), "has the unknown threshold"),
    "another type": ("layer3.pt", with_state(W_enc=weights()["W_enc"].double()), "W_enc is stored as torch.float64"),
    "transposed": ("layer3.pt", with_state(W_enc=weights(torch.bfloat16)["W_enc"].T), "W_enc"),
    "b_enc not finite": ("layer3.pt", with_state(b_enc=torch.full((D_SAE,), float("nan"))), "b_enc holds NaN"),
    "a surprise": ("layer3.pt", checkpoint() | {"tokens": Evil()}, "asks to import __builtin__.exec"),
    "a state in a list": ("layer3.pt", {"state": list(checkpoint()["state"].values()), "scale": 1.0}, "no dict of ten"),
    "a flat file": ("layer3.pt", weights(), "holds no dict of tensors 'state', but 'W_enc'"),
    "under the official name": ("layer3.sae.pt", checkpoint(), "'state' of type dict; only named tensors are read"),
    "dictionary_learning's tensors": (
        "sae_L3_latest.safetensors",
        {"encoder.weight": weights()["W_enc"]},
        "lacks W_dec, W_enc, b_dec, b_enc",
    ),
    "no b_dec": ("sae_L3_latest.safetensors", {n: t for n, t in weights().items() if n != "b_dec"}, "lacks b_dec"),
    "integers": ("sae_L3_latest.safetensors", {n: t.int() for n, t in weights().items()}, "stored as torch.int32"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_not_of_its_layout_is_one_sentence(tmp_path: Path, capsys, name: str) -> None:
    file, content, message = BAD[name]
    written(tmp_path / "sae" / file, content)
    with pytest.raises(QwenScopeError, match="(?i)" + message.replace("(", r"\(")):
        load_sae(tmp_path / "sae", 3, k=K)
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "sae"), "-o", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not {"Traceback", "ran"} & set(said.split())
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_is_no_zip_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "layer3.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match="it is no zip archive"):
        load_sae(tmp_path)
    (tmp_path / "layer3.pt").write_bytes(b"")
    with pytest.raises(FormatError, match="is empty"):
        load_sae(tmp_path)


@pytest.mark.parametrize("layout", ["scope_code", "open_interpretability"])
def test_layouts_of_single_releases_are_only_read(tmp_path: Path, layout: str) -> None:
    sae: SAE = load_sae(scope_code(tmp_path / "in"), 31)
    with pytest.raises(InputError, match=f"{layout} is only read; write one of official, safetensors"):
        save_sae(sae, tmp_path / "out", layout)
    with pytest.raises(FormatError, match="already holds SAEs in the layout scope_code"):
        save_sae(sae, tmp_path / "in" / "v2", "official")
    assert not (tmp_path / "out").exists()


def test_the_catalog_knows_the_groups_of_others() -> None:
    known = {group.name: group for group in catalog.community()}
    assert set(known) == {name.rpartition("/")[2] for name in GROUPS}
    for name, (model, layers, d_model, d_sae, k, architecture) in GROUPS.items():
        group = catalog.find(name)
        assert (group.model, group.layer_numbers, group.layers) == (f"Qwen/{model}", layers, len(layers))
        assert (group.d_model, group.d_sae, group.k, group.architecture) == (d_model, d_sae, k, architecture)
        assert group.kind == ("base" if model.endswith("Base") else "instruct")
        assert group.repo is not None
        assert group.by == group.repo.split("/")[0] != "Qwen"
        assert group.by not in {one.by for one in catalog.groups()}
    with pytest.raises(InputError, match="holds several groups of SAEs; name one: qwen3-8b-saes-W16K-L0_80, "):
        catalog.find("adamkarvonen/qwen3-8b-saes")
    path = "saes_Qwen_Qwen3-8B_batch_top_k/resid_post_layer_18/trainer_2/ae.pt"
    assert catalog.find("qwen3-8b-saes-W65K-L0_80").filename(18) == path


@pytest.mark.parametrize("name", GROUPS)
def test_a_plan_needs_no_download(name: str) -> None:
    group = catalog.find(name)
    config = config_of(group.model)
    assert config.hidden_size == group.d_model  # pyright: ignore[reportAttributeAccessIssue]
    assert max(group.layer_numbers, default=0) < config.num_hidden_layers  # pyright: ignore
    if not group.d_sae:
        with pytest.raises(InputError, match="is not known here"):
            plan_group(group)
        return
    each = 2 * group.d_sae * group.d_model * {None: 4, "bfloat16": 2}[group.stored]
    each += 4 * (group.d_sae + group.d_model)
    assert plan_group(group).disk == len(group.layer_numbers) * each


def test_a_model_finds_the_one_group_that_others_made_for_it() -> None:
    assert resolve("Qwen/Qwen3.8-27B", None) == ("Qwen/Qwen3.8-27B", "qwen3.8-27b-scope-code")
    with pytest.raises(InputError, match="qwen36-27b-sae-papergrade, qwen36-27b-sae-fullstack, qwen36-27b-sae-l42"):
        resolve("Qwen/Qwen3.6-27B", None)


def test_the_command_prints_them_apart_and_says_what_was_checked(capsys) -> None:
    assert main(["catalog"]) == 0
    ours, _, others = capsys.readouterr().out.partition("groups of others")
    assert "layout checked, weights not" in others
    for name in GROUPS:
        assert name.rpartition("/")[2] in others
        assert name.rpartition("/")[2] not in ours
    assert main(["catalog", "ceselder/qwen36-27b-sae-l42", "--json"]) == 0
    (said,) = json.loads(capsys.readouterr().out)
    assert (said["by"], said["checked"], said["layers are"]) == ("ceselder", "layout checked, weights not", "42")
    assert main(["plan", "adamkarvonen/qwen3-8b-saes"]) == 2
