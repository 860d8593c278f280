"""The Jacobian lens against a dense Jacobian, its files, resuming, and what it reads of a feature."""

from __future__ import annotations

import json
from pathlib import Path

import lab_store
import pytest
import torch
from families import build

from qwen_scope import load_scope
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError
from qwen_scope.features import (
    Lens,
    LensOptions,
    fit_lens,
    lens_effects,
    lens_logits,
    load_lens,
    save_lens,
    top_logits,
)
from qwen_scope.scope import Scope

PROMPTS = [[5 * i + j for i in range(9)] for j in (1, 2, 3)]
OPTIONS = LensOptions(prompts=3, length=8, skip=3)


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Scope:
    from byte_tokenizer import byte_tokenizer
    from tiny import random_sae

    from qwen_scope.sae import save_sae
    from qwen_scope.text import Counted

    folder = tmp_path_factory.mktemp("saes")
    save_sae(random_sae(1, 32), folder)
    model = build("qwen3").requires_grad_(False)
    return load_scope(model, str(folder), tokenizer=byte_tokenizer(), counted=Counted())


def dense(scope: Scope, layer: int) -> torch.Tensor:
    """The definition: the Jacobian of targets by sources, summed over targets, averaged over sources and prompts."""
    blocks, total = scope.model.model.layers, torch.zeros(32, 32)
    for ids in PROMPTS:
        ids = torch.tensor([ids[: OPTIONS.length]])
        kept: dict[str, torch.Tensor] = {}

        def last_of(h: torch.Tensor, ids: torch.Tensor = ids, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
            hooks = [
                blocks[layer].register_forward_hook(lambda *_: h),
                blocks[-1].register_forward_hook(lambda _, __, out: kept.__setitem__("last", out)),
            ]
            scope.model(ids, use_cache=False)
            for hook in hooks:
                hook.remove()
            return kept["last"][0]

        hook = blocks[layer].register_forward_hook(lambda _, __, out, kept=kept: kept.__setitem__("h", out))
        scope.model(ids, use_cache=False)
        hook.remove()
        whole = torch.autograd.functional.jacobian(last_of, kept["h"])[:, :, 0]  # target, row, source, column
        valid = slice(OPTIONS.skip, None)
        total += whole[valid][:, :, valid].sum(0).mean(1)
    return total / len(PROMPTS)


@pytest.mark.slow
def test_it_is_the_mean_jacobian(scope: Scope) -> None:
    lens = fit_lens(scope, PROMPTS, OPTIONS)
    assert (lens.layers, lens.n_prompts) == ([0, 1, 2], 3)
    for layer in (0, 2):
        torch.testing.assert_close(lens.jacobians[layer], dense(scope, layer), atol=1e-4, rtol=1e-3)


def test_batches_of_rows_change_nothing(scope: Scope, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_lens(scope, PROMPTS, OPTIONS)
    monkeypatch.setattr("qwen_scope.features.lens.BATCH_TOKENS", 56)
    torch.testing.assert_close(fit_lens(scope, PROMPTS, OPTIONS).jacobians[1], whole.jacobians[1], atol=1e-5, rtol=1e-4)


def test_work_goes_on_where_it_stopped(scope: Scope, tmp_path: Path) -> None:
    state = tmp_path / "lens.state"
    ran = []

    def cut():
        for ids in PROMPTS[:2]:
            ran.append(ids)
            yield ids

    fit_lens(scope, cut(), OPTIONS, state=state)
    told = []
    again = fit_lens(scope, PROMPTS, OPTIONS, state=state, progress=lambda stage, share, text: told.append(text))
    assert told == ["3 prompts"], "the first two are not computed again"
    torch.testing.assert_close(again.jacobians[1], fit_lens(scope, PROMPTS, OPTIONS).jacobians[1])
    with pytest.raises(InputError, match="other prompts"):
        fit_lens(scope, PROMPTS[::-1], OPTIONS, state=state)
    with pytest.raises(InputError, match="other options"):
        fit_lens(scope, PROMPTS, LensOptions(prompts=3, length=8, skip=2), state=state)


def test_files_are_those_that_are_published(scope: Scope, tmp_path: Path) -> None:
    lens = fit_lens(scope, PROMPTS, OPTIONS)
    save_lens(lens, tmp_path / "lens.pt")
    data = torch.load(tmp_path / "lens.pt", weights_only=True)
    assert data["source_layers"] == [0, 1, 2]
    assert (data["n_prompts"], data["d_model"]) == (3, 32)
    assert {one.dtype for one in data["J"].values()} == {torch.float16}
    again = load_lens(tmp_path / "lens.pt")
    torch.testing.assert_close(again.jacobians[1].float(), lens.jacobians[1], atol=1e-3, rtol=1e-3)
    torch.save({"parameters": {"jacobians": {"1": torch.eye(4)}}}, tmp_path / "later.pt")
    assert torch.equal(load_lens(tmp_path / "later.pt").jacobians[1], torch.eye(4))


BAD = {
    "nothing": {"other": 1},
    "ragged": {"J": {0: torch.eye(3), 1: torch.eye(4)}},
    "oblong": {"J": {0: torch.zeros(3, 4)}},
    "named": {"J": {"first": torch.eye(3)}},
    "not finite": {"J": {0: torch.full((2, 2), torch.nan)}},
    "empty": {"J": {}},
}


@pytest.mark.parametrize("name", list(BAD))
def test_other_files_are_refused(name: str, tmp_path: Path) -> None:
    torch.save(BAD[name], tmp_path / "lens.pt")
    with pytest.raises(FormatError, match="is no lens"):
        load_lens(tmp_path / "lens.pt")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"J": {0: Lens}}, tmp_path / "lens.pt")
    with pytest.raises(FormatError, match="can't be read"):
        load_lens(tmp_path / "lens.pt")
    with pytest.raises(NotFoundError, match="qwen-scope lens fit"):
        load_lens(tmp_path / "none.pt")


@pytest.mark.slow
def test_a_feature_is_read_through_it(scope: Scope) -> None:
    lens = fit_lens(scope, PROMPTS, OPTIONS)
    found = lens_effects(scope, lens, 1, 7, n=4, randoms=20)
    direction = dense(scope, 1) @ scope.saes[1].W_dec[:, 7]
    direction = direction / direction.norm() * 32**0.5
    logits = scope.model.lm_head(scope.model.model.norm(direction))[: len(scope.tokenizer)]
    effect = logits - logits.mean()
    assert [one.token for one in found.promoted] == effect.topk(4).indices.tolist()
    assert found.promoted[0].effect == pytest.approx(float(effect.max()), rel=1e-3)
    assert found.peak == pytest.approx(float(effect.max() / effect.std()), rel=1e-3)
    assert len(found.random_peaks) == 20
    assert found.beaten == sum(peak < found.peak for peak in found.random_peaks) / 20


def test_without_layers_above_the_lens_is_the_direct_effect() -> None:
    from qwen_scope.features import token_effects

    scope = lab_store.scope()
    same = Lens({2: torch.eye(scope.d_model)}, 1)
    direct, _ = token_effects(scope, 2, 11, n=5)
    through = lens_effects(scope, same, 2, 11, n=5, randoms=2)
    assert [one.token for one in through.promoted] == [one.token for one in direct]


def test_what_makes_no_sense_is_refused(scope: Scope) -> None:
    with pytest.raises(InputError, match="no prompt has the 5 tokens"):
        fit_lens(scope, [[1, 2]], OPTIONS)
    with pytest.raises(NotFoundError, match="leads to the last layer, 3"):
        fit_lens(scope, PROMPTS, LensOptions(layers=(3,)))
    with pytest.raises(InputError, match="at least skip"):
        LensOptions(length=10)
    with pytest.raises(InputError, match="the lens is for 4 dimensions"):
        lens_effects(scope, Lens({1: torch.eye(4)}, 1), 1, 0)
    with pytest.raises(NotFoundError, match="the lens has no layer 1"):
        lens_effects(scope, Lens({0: torch.eye(32)}, 1), 1, 0)


@pytest.mark.slow
def test_the_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from qwen_scope.cli import main

    out = tmp_path / "lens.pt"
    options = ["--prompts", "1", "--length", "24", "--layers", "4", "--model", "lab"]
    assert main(["lens", "fit", "lab", "-o", str(out), *options]) == 0
    assert "averaged over 1 prompts" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lens.pt"]
    assert main(["show", "--feature", "4/283", "--model", "lab", "--lens", str(out), "-n", "3"]) == 0
    assert "Disposes to say (Jacobian lens" in capsys.readouterr().out
    assert main(["show", "--feature", "3/1", "--model", "lab", "--lens", str(out)]) == 2
    assert "the lens has no layer 3; it has layers 4" in capsys.readouterr().err
    assert main(["lens", "fit", "lab", "-o", str(tmp_path / "x.bin"), "--model", "lab"]) == 2
    assert ".pt" in capsys.readouterr().err


def test_features_are_found_by_what_they_dispose_to_say(scope: Scope) -> None:
    """The ranking against reading every feature by itself; the control against directions that are drawn here."""
    lens = Lens({1: torch.randn(32, 32, generator=torch.Generator().manual_seed(3))}, 1)
    found = lens_logits(scope, lens, [7, 9], n=5)
    words = scope.model.get_output_embeddings().weight[: len(scope.tokenizer)].float()

    def score(directions: torch.Tensor) -> torch.Tensor:
        moved = directions @ lens.jacobians[1].T
        moved = moved / moved.norm(dim=-1, keepdim=True) * 32**0.5
        logits = scope.model.model.norm(moved).float() @ words.T
        return (logits[:, [7, 9]].mean(-1) - logits.mean(-1)) / logits.std(-1, correction=0)

    every = score(scope.saes[1].W_dec.T.float())
    best = every.topk(5)
    assert [one.feature for one in found] == best.indices.tolist()
    assert [one.score for one in found] == pytest.approx(best.values.tolist(), rel=1e-3)
    random = score(torch.randn(4000, 32, generator=torch.Generator().manual_seed(11)))
    for one in found:
        assert one.beaten == pytest.approx(float((random < one.score).float().mean()), abs=0.04)
    straight = {one.feature: one.score for one in top_logits(scope, [7, 9], n=scope.saes[1].d_sae)}
    assert [one.direct for one in found] == pytest.approx([straight[one.feature] for one in found], rel=1e-4)


def test_a_lens_that_moves_nothing_finds_what_the_direct_logits_find(scope: Scope) -> None:
    found = lens_logits(scope, Lens({1: torch.eye(32)}, 1), [7], n=4)
    plain = top_logits(scope, [7], n=4)
    assert [(one.layer, one.feature) for one in found] == [(one.layer, one.feature) for one in plain]
    assert [one.score for one in found] == pytest.approx([one.score for one in plain], rel=1e-4)
    assert [one.direct for one in found] == pytest.approx([one.score for one in found], rel=1e-4)


def test_a_search_through_a_lens_that_does_not_fit_is_refused(scope: Scope) -> None:
    with pytest.raises(InputError, match="the lens is for 8 dimensions"):
        lens_logits(scope, Lens({1: torch.eye(8)}, 1), [7])
    with pytest.raises(NotFoundError, match="the lens has layers 0, and none of them has an SAE"):
        lens_logits(scope, Lens({0: torch.eye(32)}, 1), [7])
    with pytest.raises(InputError, match="name tokens by their ids"):
        lens_logits(scope, Lens({1: torch.eye(32)}, 1), [10**6])


def test_find_reads_promotes_through_a_lens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_lens(Lens({2: torch.eye(128), 4: torch.eye(128)}, 1), tmp_path / "lens.pt")
    asked = ["find", "--promotes", "der", "-n", "3", "--lens", str(tmp_path / "lens.pt")]
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(one) for one in found] == [{"layer", "feature", "score", "direct", "beaten"}] * 3
    assert {one["layer"] for one in found} <= {2, 4}
    assert main(asked) == 0
    assert "random below" in capsys.readouterr().out
    assert main(["find", "--near", "4/3", "--lens", str(tmp_path / "lens.pt")]) == 2
    assert "give --promotes WORDS with it" in capsys.readouterr().err
