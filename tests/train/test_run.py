"""From a model's name to a folder that can be shared, and what stops a run before it starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.sae import load_sae
from qwen_scope.text import CorpusOptions
from qwen_scope.train import (
    EvalRun,
    JsonlMetrics,
    TensorBoardMetrics,
    TrainConfig,
    TrainRun,
    WandbMetrics,
    run_eval,
    run_train,
)

from .conftest import make_model, sentences


@pytest.fixture
def run(model_folder: Path, tmp_path: Path) -> TrainRun:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(900)))
    return TrainRun(
        model=str(model_folder), data=str(text), out=tmp_path / "run", group="tiny",
        train=TrainConfig(d_sae=64, k=4, tokens=40 * 128, batch=128, lr=3e-3), layers=(0, 2),
        context_length=16, batch_size=8, budget=2**19, checkpoint_every=20,
        eval_tokens=512, hold_out=10, log_every=5, exports=("sae_lens", "sparsify"),
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_leaves_everything_needed(run: TrainRun) -> None:
    steps, said = [], set()
    result = run_train(run, on_step=lambda r: steps.append(r.step), progress=lambda what, share, text: said.add(what))
    assert steps == list(range(1, 41))
    assert said == {"training", "means", "reconstruction", "loss"}
    assert result.folder == run.out / "tiny"
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(0))
    for layer in (0, 2):
        sae = result.saes[f"layers.{layer}.resid_post"]
        for again in (
            load_sae(result.folder, layer),
            load_sae(run.out / "sae_lens", layer),
            load_sae(run.out / "sparsify", layer),
        ):
            torch.testing.assert_close(again.decode(again.encode(x)), sae.decode(sae.encode(x)), rtol=1e-4, atol=1e-4)
    assert load_sae(result.folder, 2).identity == result.saes["layers.2.resid_post"].identity
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert set(lines[0]["layers"]) == {"layers.0.resid_post", "layers.2.resid_post"}
    facts = json.loads((run.out / "run.json").read_text())
    assert facts["train"]["k"] == 4
    assert facts["train"]["seed"] == 0
    assert facts["versions"]["torch"] == torch.__version__
    quality = json.loads((run.out / "quality.json").read_text())
    assert quality["layers.0.resid_post"]["fvu"] == result.quality["layers.0.resid_post"].reconstruction.fvu
    card = (result.folder / "README.md").read_text()
    assert f"{quality['layers.2.resid_post']['fvu']:.4f}" in card
    assert "CE recovered" in card


@pytest.mark.slow
def test_the_card_has_plots(run: TrainRun) -> None:
    folder = run_train(run).folder
    for name in ("loss", "fvu", "dead", "density"):
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"plots/{name}.png" in (folder / "README.md").read_text()


@pytest.mark.slow
def test_a_finished_run_resumes_to_the_same_folder(run: TrainRun) -> None:
    first = run_train(run)
    with pytest.raises(InputError, match="resume it, or name another folder"):
        run_train(run)
    again = run_train(replace(run, resume=True))
    for name, sae in first.saes.items():
        assert torch.equal(sae.W_enc, again.saes[name].W_enc)
        assert again.quality[name].reconstruction == first.quality[name].reconstruction


@pytest.mark.slow
def test_a_run_continues_a_group_on_another_checkpoint(run: TrainRun, tmp_path: Path) -> None:
    first = run_train(replace(run, eval_tokens=0))
    post = make_model(tmp_path / f"{Path(run.model).name}-post", seed=5)
    more = replace(run, model=str(post), start_from=str(first.folder), out=tmp_path / "more", eval_tokens=0)
    tuned = run_train(replace(more, train=replace(run.train, tokens=128 * 2, lr=1e-6, warmup=0)))
    for name, sae in first.saes.items():
        assert torch.cosine_similarity(tuned.saes[name].W_dec, sae.W_dec, dim=0).min() > 0.999


@pytest.mark.slow
def test_evaluation_by_name_and_the_transfer_report(run: TrainRun, tmp_path: Path) -> None:
    folder = run_train(replace(run, eval_tokens=0)).folder
    post = make_model(tmp_path / "post", seed=5)
    found = run_eval(
        EvalRun(
            model=run.model,
            sae=str(folder),
            data=run.data,
            post=str(post),
            tokens=1024,
            context_length=16,
            batch_size=8,
            loss=False,
        )
    )
    assert [str(point) for point in found.quality] == ["layers.0.resid_post", "layers.2.resid_post"]
    for point, figures in found.quality.items():
        assert figures.reconstruction.fvu < 1
        assert found.transfer[point].fvu_post.value > found.transfer[point].fvu_base.value
    json.dumps([figures.plain() for figures in found.transfer.values()])


@pytest.mark.parametrize(("tokens", "measured"), [(128, 12), (40 * 128, 512), (655_359, 65_535), (10**9, 65_536)])
def test_a_short_run_is_measured_on_a_tenth_of_its_tokens(run: TrainRun, tokens: int, measured: int) -> None:
    asked = replace(run, eval_tokens=None, train=replace(run.train, tokens=tokens))
    assert asked.measured_on == measured
    assert replace(asked, eval_tokens=7).measured_on == 7


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"layers": (3,)}, NotFoundError, "layer 3 does not exist: .* has layers 0 to 2"),
        ({"layers": (0, 0)}, InputError, "name each layer once"),
        ({"context_length": 512}, InputError, "do not fit the model's context of 128"),
        ({"budget": 10}, InputError, "too small for one batch"),
        ({"exports": ("sea_lens",)}, NotFoundError, "no layout 'sea_lens'"),
        ({"data": "nowhere.txt"}, NotFoundError, "no file, folder or dataset"),
        ({"store": "int8"}, InputError, "held as float32 or bfloat16"),
        ({"hold_out": 0}, InputError, "needs held-out documents"),
        ({"start_from": "nowhere/at/all"}, NotFoundError, "nowhere"),
        ({"parallel": "data"}, InputError, "torchrun"),
        ({"corpus": CorpusOptions(chat="default"), "data": "lab", "wandb": "x"}, NotFoundError, "pip install 'wandb>="),
    ],
)
def test_bad_input_is_one_sentence_before_training(
    run: TrainRun, changes: dict, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(kind, match=message) as caught:
        run_train(replace(run, **changes), on_step=lambda r: pytest.fail("training began"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_group_of_another_width_is_refused(run: TrainRun, tmp_path: Path) -> None:
    folder = run_train(replace(run, eval_tokens=0)).folder
    wider = replace(run, out=tmp_path / "wider", start_from=str(folder), train=replace(run.train, d_sae=128))
    with pytest.raises(MismatchError, match="this run trains 128 features"):
        run_train(wider)


def test_a_corpus_shorter_than_a_batch(run: TrainRun) -> None:
    Path(run.data).write_text('{"text": "the cat"}\n')
    with pytest.raises(InputError, match="less than one batch of 128"):
        run_train(run, on_step=lambda r: pytest.fail("training began"))


def test_metrics_callbacks(run: TrainRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    logged: list = []

    class Logger:
        def log(self, figures, step) -> None:
            logged.append((step, figures))

        def finish(self) -> None:
            logged.append("finished")

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = lambda **options: Logger()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_train(replace(run, wandb="project", eval_tokens=0, exports=()))
    assert [entry[0] for entry in logged[:-1]] == list(range(5, 41, 5))
    assert logged[-1] == "finished"
    assert {"lr", "tokens", "layers.0.resid_post/fvu", "layers.2.resid_post/dead"} <= set(logged[0][1])
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install 'tensorboard>="):
        TensorBoardMetrics(tmp_path)
    with pytest.raises(NotFoundError, match="pip install 'wandb>="):
        WandbMetrics({})
    assert JsonlMetrics(tmp_path / "m.jsonl").every == 10
