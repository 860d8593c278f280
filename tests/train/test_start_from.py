"""Training that begins with finished SAEs: same features, a record of where they come from, a fair comparison."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.sae import TopK, load_sae, save_sae
from qwen_scope.train import (
    ARCHITECTURES,
    Checkpoints,
    ResidualTable,
    TrainConfig,
    TrainResult,
    TrainRun,
    run_train,
    train,
)
from qwen_scope.train.began import history_of
from qwen_scope.train.card_began import reached
from qwen_scope.train.metrics import read_metrics

from .conftest import make_model, sentences
from .test_checkpoint import Stop, stop_after

LAYERS = ("layers.0.resid_post", "layers.2.resid_post")


def told(folder: Path, model: Path, out: str, **more) -> TrainRun:
    text = folder / "text.jsonl"
    if not text.exists():
        text.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(900)))
    config = TrainConfig(d_sae=64, k=4, tokens=30 * 128, batch=128)
    return TrainRun(
        **{
            "model": str(model), "data": str(text), "out": folder / out, "train": config, "layers": (0, 2),
            "context_length": 16, "batch_size": 8, "budget": 2**19, "checkpoint_every": 10, "eval_tokens": 512,
            "hold_out": 10, "log_every": 1, "group": out,
        }
        | more
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start")


@pytest.fixture(scope="module")
def post(folder: Path, model_folder: Path) -> Path:
    """Another checkpoint of the model: its weights a little changed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn(parameter.shape, generator=g))
    out = folder / f"{model_folder.name}-post"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def base(folder: Path, model_folder: Path) -> TrainResult:
    return run_train(told(folder, model_folder, "base"))


@pytest.fixture(scope="module")
def tuned(folder: Path, post: Path, base: TrainResult) -> TrainResult:
    return run_train(told(folder, post, "tuned", start_from=str(base.folder), against_scratch=True))


@pytest.mark.slow
def test_it_says_what_it_began_as_and_keeps_saying_so(
    folder: Path, post: Path, model_folder: Path, base: TrainResult, tuned: TrainResult
) -> None:
    third = run_train(
        told(folder, post, "third", start_from=str(tuned.folder), train=TrainConfig(64, 4, 1280, batch=128))
    )
    for name, layer in zip(LAYERS, (0, 2), strict=True):
        first, second, last = (load_sae(one.folder, layer) for one in (base, tuned, third))
        said = history_of(last, name)
        assert [one["fingerprint"] for one in said] == [one.identity.fingerprint for one in (first, second, last)]
        assert len({one["fingerprint"] for one in said}) == 3
        assert [one["group"] for one in said] == ["base", "tuned", "third"]
        assert [one["model"] for one in said] == [str(model_folder), str(post), str(post)]
        assert [one["tokens"] for one in said] == [one.saes[name].meta["tokens"] for one in (base, tuned, third)]
        card = (third.folder / "README.md").read_text()
        assert all(one["fingerprint"][:12] in card for one in said[:2])
        assert f"{said[0]['tokens']:,}" in card
    exported = folder / "as_sae_lens"
    save_sae([load_sae(third.folder, 2)], exported, layout="sae_lens")
    assert history_of(load_sae(exported, 2), LAYERS[1]) == history_of(load_sae(third.folder, 2), LAYERS[1])


@pytest.mark.slow
def test_features_keep_their_numbers_and_the_card_says_how_far_they_went(base: TrainResult, tuned: TrainResult) -> None:
    card = (tuned.folder / "README.md").read_text()
    for name in LAYERS:
        old, new = (torch.nn.functional.normalize(one.saes[name].W_dec, dim=0) for one in (base, tuned))
        cosines = old.T @ new
        assert cosines.argmax(1).equal(torch.arange(64))  # of all new features the one with its number is nearest
        with (tuned.folder / "moved" / f"{name}.csv").open() as lines:
            rows = list(csv.DictReader(lines))
        assert [int(row["feature"]) for row in rows] == list(range(64))
        torch.testing.assert_close(
            torch.tensor([float(row["cosine"]) for row in rows]), cosines.diag(), atol=1e-5, rtol=0
        )
        moved = tuned.began[name].moved
        assert moved.least == pytest.approx(float(cosines.diag().min()), abs=1e-5)
        assert moved.most[0][0] == int(cosines.diag().argmin())
        assert f"| {name} | {moved.median:.4f} | {moved.low:.4f}" in card


@pytest.mark.slow
def test_the_one_from_scratch_is_the_one_that_a_run_without_a_beginning_makes(
    folder: Path, post: Path, tuned: TrainResult
) -> None:
    """Bit for bit: so it saw the same batches in the same order, and its learning rate is that of a new run."""
    alone = run_train(told(folder, post, "alone"))
    for name, layer in zip(LAYERS, (0, 2), strict=True):
        beside = load_sae(folder / "tuned" / "scratch" / "tuned", layer)
        assert beside.identity.fingerprint == alone.saes[name].identity.fingerprint
        assert beside.W_dec.equal(alone.saes[name].W_dec)
        scratch, before = tuned.began[name].scratch, tuned.began[name].before
        assert scratch is not None
        assert before is not None
        assert scratch.reconstruction == alone.quality[name].reconstruction
        card = (tuned.folder / "README.md").read_text()
        for what, found in (("before", before), ("now", tuned.quality[name]), ("from scratch", scratch)):
            assert f"| {name} | {what} | {found.reconstruction.fvu:.4f} |" in card
        assert tuned.quality[name].reconstruction.fvu < min(before.reconstruction.fvu, scratch.reconstruction.fvu)
    lines = read_metrics([folder / "tuned" / "metrics.jsonl"])
    other = read_metrics([folder / "alone" / "metrics.jsonl"])
    assert [line["layers"]["scratch:" + LAYERS[0]] for line in lines] == [line["layers"][LAYERS[0]] for line in other]
    assert reached(lines, LAYERS[0]) in [line["tokens"] for line in lines]
    assert "this one reached it after" in (tuned.folder / "README.md").read_text()


@pytest.mark.slow
def test_a_run_that_was_broken_off_goes_on_to_the_same(
    folder: Path, post: Path, base: TrainResult, tuned: TrainResult
) -> None:
    run = told(folder, post, "broken", start_from=str(base.folder), against_scratch=True)
    with pytest.raises(Stop):
        run_train(run, on_step=stop_after(17))
    with pytest.raises(MismatchError, match=r"began with base; resumed with tuned it would be another"):
        run_train(replace(run, resume=True, start_from=str(tuned.folder)))
    with pytest.raises(MismatchError, match=r"began with base; resumed with new weights"):
        run_train(replace(run, resume=True, start_from=None, against_scratch=False))
    with pytest.raises(MismatchError, match="scratch"):
        run_train(replace(run, resume=True, against_scratch=False))
    again = run_train(replace(run, resume=True))
    for name in LAYERS:
        assert again.saes[name].W_enc.equal(tuned.saes[name].W_enc)
        assert again.began[name].scratch == tuned.began[name].scratch


@pytest.mark.slow
def test_other_ks_and_stored_types(folder: Path, post: Path, base: TrainResult) -> None:
    """Qwen's are stored in bf16, without a record; k may be another."""
    saes = [replace(sae, meta={}) for sae in base.saes.values() if isinstance(sae, TopK)]
    save_sae(saes, folder / "bf16", layout="official", dtype=torch.bfloat16)
    run = told(folder, post, "wider", start_from=str(folder / "bf16"))
    found = run_train(replace(run, train=replace(run.train, k=6, tokens=1280)))
    assert all(sae.k == 6 for sae in found.saes.values())
    card = (found.folder / "README.md").read_text()
    assert "k was 4 at layers.0.resid_post, 4 at layers.2.resid_post, and is 6 here." in card
    assert "not known" in card
    assert "`--against-scratch` also trains SAEs from scratch" in card


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"train": TrainConfig(128, 4, 3840, batch=128)}, "trains 128 features .* so pass d_sae 64"),
        ({"train": TrainConfig(64, 4, 3840, batch=128, architecture="jumprelu")}, "is a topk SAE; jumprelu can"),
        ({"model": "narrow"}, "reads residuals of 32 dimensions, the model's have 16"),
    ],
)
def test_what_can_not_be_continued_is_said_before_the_model_runs(
    tmp_path: Path, model_folder: Path, change: dict, sentence: str
) -> None:
    sae = train(TrainConfig(64, 4, 64, batch=64), ResidualTable({LAYERS[0]: torch.randn(64, 32)}, batch=64))
    save_sae(list(sae.values()), tmp_path / "small", layout="official")
    if "model" in change:
        change = {"model": str(make_model(tmp_path / "narrow", d_model=16))}
    run = replace(told(tmp_path, model_folder, "refused", start_from=str(tmp_path / "small"), layers=(0,)), **change)
    with pytest.raises(MismatchError, match=sentence):
        run_train(run, on_step=lambda report: pytest.fail("training began"))
    assert not (tmp_path / "refused" / "run.json").exists()


def test_without_layers_it_continues_those_there_are(folder: Path, model_folder: Path, base: TrainResult) -> None:
    run = told(folder, model_folder, "all", start_from=str(base.folder), layers=None, eval_tokens=0)
    assert sorted(run_train(run).saes) == sorted(LAYERS)


def test_what_is_missing_is_said_of_a_file_that_names_no_layer(
    folder: Path, model_folder: Path, base: TrainResult
) -> None:
    alone = folder / "alone.sae.pt"
    alone.write_bytes((base.folder / "layer0.sae.pt").read_bytes())
    with pytest.raises(InputError, match="how many features are active per token"):
        run_train(told(folder, model_folder, "nameless", start_from=str(alone), layers=None))


def test_a_comparison_needs_a_beginning(tmp_path: Path, model_folder: Path, capsys) -> None:
    with pytest.raises(InputError, match="against_scratch compares SAEs that start_from names"):
        told(tmp_path, model_folder, "x", against_scratch=True)
    words = ["train", "lab", "-o", str(tmp_path / "out"), "--d-sae", "64", "--k", "4", "--tokens", "5000"]
    assert main([*words, "--against-scratch"]) == 2
    assert "against_scratch compares" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    config = TrainConfig(64, 4, 640, batch=64)
    with pytest.raises(InputError, match="beside SAEs that are continued"):
        train(config, table(), scratch=config)
    with pytest.raises(InputError, match="640 tokens in batches of 64, not 320 in batches of 64"):
        train(config, table(), init=train(config, table()), scratch=replace(config, tokens=320))


def table() -> ResidualTable:
    x = torch.randn(512, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    return ResidualTable({LAYERS[0]: x}, batch=64)


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_every_architecture_beside_one_from_scratch_and_resumed(tmp_path: Path, kind: str) -> None:
    config = TrainConfig(d_sae=48, k=4, tokens=640, batch=64, architecture=kind)
    first = train(config, table())
    going, new = replace(config, lr=1e-3), replace(config, seed=5)
    alone = train(going, table(), init=first)
    beside = train(going, table(), init=first, scratch=new)
    assert set(beside) == {LAYERS[0], "scratch:" + LAYERS[0]}
    assert beside[LAYERS[0]].W_enc.equal(alone[LAYERS[0]].W_enc)
    assert beside["scratch:" + LAYERS[0]].W_enc.equal(train(new, table())[LAYERS[0]].W_enc)
    kept = Checkpoints(tmp_path, every=4, resume=True)
    with pytest.raises(Stop):
        train(going, table(), init=first, scratch=new, checkpoints=kept, callbacks=[stop_after(6)])
    again = train(going, table(), init=first, scratch=new, checkpoints=kept)
    for name, sae in beside.items():
        assert again[name].identity == sae.identity
        assert again[name].W_dec.equal(sae.W_dec)


def test_defaults_of_continuing_are_not_those_of_a_new_run() -> None:
    new = TrainConfig(d_sae=48, k=4, tokens=6400, batch=64)
    going = new.continuing()
    assert 0 < going.peak_lr < new.peak_lr
    assert (new.aux, going.aux) == (1 / 32, 0.0)
    chosen = replace(new, lr=1e-3, aux_weight=0.25)
    assert chosen.continuing() == chosen
    assert chosen.anew() == new


@pytest.mark.parametrize(
    "record",
    [
        {"model": 3, "tokens": 1, "began_as": []}, {"model": "m", "tokens": -1, "began_as": []}, ["x"],
        {"model": "m", "tokens": 1, "began_as": {}}, {"model": "m", "tokens": 1, "began_as": [{"group": "g"}]},
        {"model": "m", "tokens": 1},
    ],
)  # fmt: skip
def test_a_record_that_is_none(record: object) -> None:
    sae = train(TrainConfig(48, 4, 64, batch=64), table())[LAYERS[0]]
    assert isinstance(sae, TopK)
    with pytest.raises(FormatError, match="'history' in the files of"):
        history_of(replace(sae, meta={"history": {LAYERS[0]: record}}), LAYERS[0])
