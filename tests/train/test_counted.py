"""Which tokens count in a run, in its files and in what is measured of it afterwards."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qwen_scope.cli.spellings import respelled
from qwen_scope.errors import FormatError, InputError, MismatchError, QwenScopeWarning
from qwen_scope.model import HookPoint, LoadedModel, blocks, capture, counted_of, load_model, measure_counted
from qwen_scope.sae import TopK, load_sae, save_sae
from qwen_scope.text import REASONS, Corpus, CorpusOptions, Counted, TokenRows, summary
from qwen_scope.train import (
    EvalRun,
    ResidualBuffer,
    TrainConfig,
    TrainRun,
    evaluate_saes,
    run_eval,
    run_train,
    transfer,
)
from qwen_scope.train.held_out import HeldOut, held_out_of

from .conftest import make_model, sentences

POINT = HookPoint(1)


class Massive(nn.Module):
    """A block after which each token of one kind, and the first token of each row, is a sink."""

    def __init__(self, block: nn.Module, spot: int) -> None:
        super().__init__()
        self.block, self.spot = block, spot
        self.ids = torch.empty(0, dtype=torch.int64)

    def forward(self, h: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = self.block(h, *args, **kwargs)
        at = self.ids == self.spot
        at[:, 0] = True
        push = torch.zeros_like(out)
        push[at, 0] = 500.0
        return out + push


def spot_of(loaded: LoadedModel) -> int:
    """The token that `with_sinks` makes a sink of."""
    return loaded.tokenizer.get_vocab()["rain"]


def with_sinks(loaded: LoadedModel, spot: int) -> LoadedModel:
    """The model, with massive activations from its first block on."""
    layers = blocks(loaded.model)
    layers[0] = massive = Massive(layers[0], spot)

    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        massive.ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]

    loaded.model.model.register_forward_pre_hook(note, with_kwargs=True)
    return loaded


@pytest.fixture(scope="module")
def sunk(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    loaded = load_model(make_model(tmp_path_factory.mktemp("sunk")), device="cpu")
    return with_sinks(loaded, spot_of(loaded))


def rows_of(loaded: LoadedModel, n: int = 12) -> list[Tensor]:
    stream = iter(TokenRows(Corpus(sentences(400), repeat=True), loaded.tokenizer, context_length=32, batch_size=8))
    return [next(stream) for _ in range(n)]


def some_sae(width: int = 32) -> TopK:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(64, width, generator=g)
    return TopK(W, W.T.contiguous(), torch.zeros(64), torch.zeros(width), k=4, hook_point=str(POINT))


def test_thresholds_tell_planted_sinks_and_nothing_else(sunk: LoadedModel) -> None:
    rows = rows_of(sunk)
    counted = measure_counted(sunk.model, sunk.tokenizer, rows, sample="planted")
    assert list(counted.norms) == [f"layers.{layer}.resid_post" for layer in range(3)]
    assert (counted.tokens, counted.sample) == (3072, "the first 3,072 tokens of planted")
    spot = spot_of(sunk)
    special = set(sunk.tokenizer.all_special_ids)
    for layer in range(3):
        for ids in rows[:3]:
            h = capture(sunk.model, ids, [HookPoint(layer)])[HookPoint(layer)]
            left = torch.ne(ids, spot)
            left[:, 0] = False
            left &= ~torch.isin(ids, torch.tensor(sorted(special)))
            assert torch.equal(counted.keep(h, layer, ids), left)


def test_no_more_is_read_than_is_needed(loaded: LoadedModel) -> None:
    taken = []

    def endless():
        for ids in rows_of(loaded) * 1000:
            taken.append(len(ids))
            yield ids

    found = measure_counted(loaded.model, loaded.tokenizer, endless(), tokens=600)
    assert len(taken) == 3  # 256 tokens each
    assert found.tokens == 608  # whole rows
    with pytest.raises(InputError, match="no tokens to measure"):
        measure_counted(loaded.model, loaded.tokenizer, [])


def test_a_short_sample_measures_nothing_and_says_so(loaded: LoadedModel) -> None:
    with pytest.warns(QwenScopeWarning, match="thresholds need 100 ordinary ones"):
        found = measure_counted(loaded.model, loaded.tokenizer, [rows_of(loaded)[0][:2]])
    assert found == Counted.of(loaded.tokenizer)


def test_other_streams_are_measured_where_they_are_read(loaded: LoadedModel) -> None:
    point = HookPoint(1, "mlp_out")
    found = measure_counted(loaded.model, loaded.tokenizer, rows_of(loaded), [point])
    assert set(found.norms) == {*(f"layers.{layer}.resid_post" for layer in range(3)), "layers.1.mlp_out"}


def test_the_buffer_leaves_out_first_and_special_tokens(loaded: LoadedModel) -> None:
    counted = Counted.of(loaded.tokenizer)
    rows = TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4)
    source = ResidualBuffer(loaded.model, rows, [POINT], batch=32, budget=32 * 4 * 640, counted=counted)
    stream = iter(source)
    for _ in range(30):
        next(stream)
    again = TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4)
    read = torch.cat([ids for ids, _ in zip(again, range(source.passes * (source.filling + 1)), strict=False)])
    special = torch.isin(read, torch.tensor(sorted(loaded.tokenizer.all_special_ids)))
    first = torch.zeros_like(special)
    first[:, 0] = True
    assert source.read["special"] == int(special.sum()) > 0
    assert source.read["first"] == int((first & ~special).sum())
    assert source.read["counts"] == int((~first & ~special).sum())
    assert sum(source.read.values()) == read.numel()
    fresh = TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4)
    other = ResidualBuffer(loaded.model, fresh, [POINT], batch=32, budget=32 * 4 * 640, counted=counted)
    other.seek(json.loads(json.dumps(source.cursor())))
    assert other.read == source.read
    assert torch.equal(next(iter(other))[str(POINT)], next(stream)[str(POINT)])
    assert other.read == source.read
    with pytest.raises(InputError, match="rows of 16 tokens hold none that counts"):
        ResidualBuffer(loaded.model, fresh, [POINT], batch=32, counted=Counted(first=16))


def test_measuring_skips_sinks_at_any_place(sunk: LoadedModel) -> None:
    rows = rows_of(sunk, 4)
    counted = measure_counted(sunk.model, sunk.tokenizer, rows_of(sunk))
    found = evaluate_saes(sunk.model, {POINT: some_sae()}, rows, loss=False, counted=counted)[POINT].reconstruction
    spot, ids = spot_of(sunk), torch.cat(rows)
    special = torch.isin(ids, torch.tensor(sorted(sunk.tokenizer.all_special_ids)))
    first = torch.zeros_like(special)
    first[:, 0] = True
    sinks = (ids == spot) & ~special & ~first
    expected = {
        "counts": int((~special & ~first & ~sinks).sum()), "padding": 0, "special": int(special.sum()),
        "first": int((first & ~special).sum()), "phase": 0, "sink": int(sinks.sum()),
    }  # fmt: skip
    assert found.reasons == expected
    assert found.tokens == expected["counts"]
    assert found.left_out == ids.numel() - found.tokens
    assert expected["sink"] > 10
    whole = evaluate_saes(sunk.model, {POINT: some_sae()}, rows, loss=False, counted=Counted.everything())[POINT]
    assert whole.reconstruction.reasons == dict.fromkeys(REASONS, 0) | {"counts": ids.numel()}


def test_both_checkpoints_are_measured_on_the_same_tokens(sunk: LoadedModel, tmp_path: Path) -> None:
    plain, rows, sae = load_model(make_model(tmp_path / "plain", seed=3), device="cpu"), rows_of(sunk, 4), some_sae()
    counted = measure_counted(sunk.model, sunk.tokenizer, rows_of(sunk))
    found = transfer(sunk.model, plain.model, {POINT: sae}, rows, counted=counted)[POINT]
    other = transfer(plain.model, sunk.model, {POINT: sae}, rows, counted=counted)[POINT]
    x, y = (torch.cat([capture(m, ids, [POINT])[POINT] for ids in rows]) for m in (sunk.model, plain.model))
    ids = torch.cat(rows)
    keep = torch.ne(ids, spot_of(sunk))
    keep[:, 0] = False
    keep &= ~torch.isin(ids, torch.tensor(sorted(sunk.tokenizer.all_special_ids)))
    for h, got in ((x, found.fvu_base), (y, found.fvu_post), (y, other.fvu_base), (x, other.fvu_post)):
        some = h[keep].double()
        error = (some - sae.decode(sae.encode(h[keep])).double()).square().sum()
        assert got.value == pytest.approx(float(error / (some - some.mean(0)).square().sum()), rel=1e-6)
    with pytest.raises(InputError, match=r"every token at .* is left out on one of the models"):
        transfer(sunk.model, plain.model, {POINT: sae}, rows, counted=Counted(norms={str(POINT): 1e-3}))


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> TrainRun:
    folder = tmp_path_factory.mktemp("told")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(900)))
    return TrainRun(
        model=str(make_model(folder / "model")), data=str(folder / "text.jsonl"), out=folder / "run", group="tiny",
        train=TrainConfig(d_sae=64, k=4, tokens=10 * 128, batch=128, lr=3e-3), layers=(0, 2),
        context_length=24, batch_size=4, budget=2**19, checkpoint_every=5, eval_tokens=700, hold_out=10, log_every=5,
        exports=("sae_lens", "sparsify", "dictionary_learning", "safetensors"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(told: TrainRun):
    return run_train(told)


def test_what_counts_is_in_the_run_its_files_and_its_card(told: TrainRun, trained: Any) -> None:
    facts = json.loads((told.out / "run.json").read_text())
    counted = Counted.from_json(facts["counted"])
    assert set(counted.norms) == {f"layers.{layer}.resid_post" for layer in range(3)}
    assert counted.special
    for place in (trained.folder, *(told.out / layout for layout in told.exports)):
        saes = [load_sae(place, layer) for layer in (0, 2)]
        assert all(Counted.from_json(sae.meta["counted"]) == counted for sae in saes), place
        assert counted_of(saes) == counted
        assert saes[0].meta["held_out"] == trained.saes["layers.0.resid_post"].meta["held_out"]
    card = (trained.folder / "README.md").read_text()
    assert summary(facts["tokens_read"]) in card
    assert "the first token of each row; special tokens" in card
    assert summary(trained.quality["layers.2.resid_post"].reconstruction.reasons) in card
    assert facts["tokens_read"]["first"] + facts["tokens_read"]["special"] > 0


@pytest.mark.parametrize("place", ["tiny", "sae_lens", "dictionary_learning"])
def test_eval_gives_the_figures_of_the_card(told: TrainRun, trained: Any, place: str, tmp_path: Path) -> None:
    # The text lies elsewhere now, and is known again.
    (tmp_path / "text.jsonl").write_bytes(Path(told.data).read_bytes())
    run = EvalRun(model=told.model, sae=str(told.out / place), data=str(tmp_path / "text.jsonl"))
    found = run_eval(run)
    assert found.held_out == 10
    for point, quality in found.quality.items():
        card = trained.quality[str(point)].plain()
        got = quality.plain()
        # dictionary_learning folds the biases in another way, which moves last digits.
        near = 1e-4 if place == "dictionary_learning" else 1e-12
        for name, value in card.items():
            assert got[name] == (pytest.approx(value, rel=near, abs=near) if isinstance(value, float) else value), name
        assert f"{card['fvu']:.4f}" in (trained.folder / "README.md").read_text()


def test_another_text_and_other_wishes_are_read_as_they_say(told: TrainRun, trained: Any, tmp_path: Path) -> None:
    folder = str(trained.folder)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences(300, seed=4)))
    other = EvalRun(
        model=told.model, sae=folder, data=str(tmp_path / "text.jsonl"), context_length=24, tokens=700, loss=False
    )
    assert run_eval(other).held_out == 0
    own = replace(other, data=told.data)
    assert run_eval(own).held_out == 10
    assert run_eval(replace(own, hold_out=0)).held_out == 0
    assert run_eval(replace(own, hold_out=7)).held_out == 7
    # Cut in another way, so nothing is known of it.
    assert run_eval(replace(own, corpus=CorpusOptions(unit="line"))).held_out == 0
    everything = run_eval(replace(own, counted=Counted.everything()))
    assert everything.counted == Counted.everything()
    assert all(q.reconstruction.left_out == 0 for q in everything.quality.values())


def test_a_run_goes_on_with_the_thresholds_it_began_with(told: TrainRun, trained: Any, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(report: Any) -> None:
        if report.step == 7:
            raise Stop

    run = replace(told, out=tmp_path / "run", exports=())
    with pytest.raises(Stop):
        run_train(run, on_step=stop)
    began = (run.out / "run.json").read_text()
    for other in (Counted.everything(), Counted(first=2)):
        with pytest.raises(MismatchError, match="first tokens of a row left out: 1 in that run"):
            run_train(replace(run, resume=True, counted=other))
    (run.out / "run.json").write_text(began)
    resumed = run_train(replace(run, resume=True))
    for name, sae in trained.saes.items():
        assert torch.equal(sae.W_enc, resumed.saes[name].W_enc)
        assert sae.meta["counted"] == resumed.saes[name].meta["counted"]
    facts = json.loads((run.out / "run.json").read_text())
    assert facts["tokens_read"] == json.loads((told.out / "run.json").read_text())["tokens_read"]
    (run.out / "run.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "counted"}))
    with pytest.raises(MismatchError, match="begun by an earlier version"):
        run_train(replace(run, resume=True))


def test_a_run_on_all_tokens_says_so(told: TrainRun, tmp_path: Path) -> None:
    run = replace(told, out=tmp_path / "run", exports=(), counted=Counted.everything(), layers=(1,))
    result = run_train(run)
    assert counted_of(result.saes.values()) == Counted.everything()
    assert result.quality["layers.1.resid_post"].reconstruction.left_out == 0
    assert "All tokens were trained and measured on" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("value", ["yes", 3, [], {"version": 1}, {"version": 2}, None])
def test_a_record_that_is_none_is_refused(trained: Any, tmp_path: Path, value: Any) -> None:
    sae = trained.saes["layers.0.resid_post"]
    folder = save_sae(sae, tmp_path / "sae")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"counted": value}))
    with pytest.raises(FormatError, match="counted"):
        counted_of([load_sae(folder, 0)])


def test_groups_are_joined_and_keep_each_ones_threshold(trained: Any, tmp_path: Path) -> None:
    one, two = (trained.saes[f"layers.{layer}.resid_post"] for layer in (0, 2))
    measured = Counted.from_json(two.meta["counted"])
    again = replace(measured, norms=dict.fromkeys(measured.norms, 77.0))
    save_sae(one, tmp_path / "a")
    save_sae(replace(two, meta={**two.meta, "counted": again.to_json()}), tmp_path / "a")
    found = counted_of([load_sae(tmp_path / "a", layer) for layer in (0, 2)])
    assert found is not None
    assert dict(found.norms) == {**measured.norms, "layers.2.resid_post": 77.0}
    save_sae(one, tmp_path / "b")
    with pytest.raises(MismatchError, match="trained on other tokens"):
        save_sae(replace(two, meta={**two.meta, "counted": replace(again, first=3).to_json()}), tmp_path / "b")
    save_sae(replace(two, meta={}), tmp_path / "b")
    assert counted_of([load_sae(tmp_path / "b", layer) for layer in (0, 2)]) is None


def bos_model(folder: Path) -> Path:
    """A tiny model whose tokenizer begins every text with BOS, as Gemma's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    make_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.bos_token = "<user>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_perplexity_is_that_of_a_plain_pass_with_bos(tmp_path: Path) -> None:
    folder = bos_model(tmp_path / "model")
    loaded = load_model(folder, device="cpu")
    bos = loaded.tokenizer.bos_token_id
    assert loaded.tokenizer("the cat")["input_ids"][0] == bos
    texts = sentences(120)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    save_sae(replace(some_sae(), identity=replace(some_sae().identity, layer=1)), tmp_path / "sae")
    run = EvalRun(
        model=str(folder), sae=str(tmp_path / "sae"), data=str(tmp_path / "text.jsonl"), context_length=20, batch_size=4
    )
    found = run_eval(replace(run, tokens=800))
    # Restated: documents one after the other with end tokens, cut into rows of 19 that each get a BOS unless a document
    # with its own BOS begins there.
    stream = [i for text in texts for i in [*loaded.tokenizer(text)["input_ids"], loaded.tokenizer.eos_token_id]]
    rows = []
    while len(rows) < 40:
        size = 20 if stream[0] == bos else 19
        rows.append([bos] * (20 - size) + stream[:size])
        stream = stream[size:]
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss = found.quality[POINT].loss
    assert loss is not None
    assert math.exp(loss.ce_clean) == pytest.approx(math.exp(float(expected)), rel=1e-5)
    assert bos in found.counted.special


def test_what_an_earlier_version_held_out_is_known(trained: Any) -> None:
    def with_record(record: Any) -> HeldOut | None:
        return held_out_of([replace(sae, meta={**sae.meta, "held_out": record}) for sae in trained.saes.values()])

    now = next(iter(trained.saes.values())).meta["held_out"]
    renamed = {"context_length": "row", "batch_size": "rows"}
    before = {renamed.get(name, name): value for name, value in now.items()}
    assert set(before) - set(now) == {"row", "rows"}
    assert with_record(before) == with_record(now) == HeldOut(**now)
    with pytest.raises(FormatError, match="'held_out' in the files of"):
        with_record({**before, "row": 1})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["train", "lab", "--skip-special", "--k", "4"], ["train", "lab", "--k", "4"]),
        (["train", "lab", "--sink-multiple", "10"], ["train", "lab"]),
        (["train", "--sink-multiple=10", "lab"], ["train", "lab"]),
        (["train", "lab", "--sink-multiple", "0"], ["train", "lab", "--count", "all"]),
        (
            ["eval", "lab", "--sink-multiple=0.0", "--context-length", "8"],
            ["eval", "lab", "--count", "all", "--context-length", "8"],
        ),
        (["eval", "lab", "--sink-multiple"], ["eval", "lab"]),
        (["eval", "lab", "--row", "8", "--rows=4"], ["eval", "lab", "--context-length", "8", "--batch-size=4"]),
        (["train", "lab", "--spread", "data"], ["train", "lab", "--parallel", "data"]),
    ],
)
def test_old_spellings_are_taken_with_a_note(given: list[str], expected: list[str]) -> None:
    with pytest.warns(QwenScopeWarning, match="the old spelling goes with the next version"):
        assert respelled(given) == expected


def test_spellings_of_other_commands_stay() -> None:
    words = ["compare", "a", "b", "--sink-multiple", "10", "--skip-special"]
    assert respelled(words) == words
    assert respelled([]) == []


def test_the_commands_say_what_was_left_out(told: TrainRun, trained: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from qwen_scope.cli import main

    words = ["eval", told.data, "--model", told.model, "--sae", str(trained.folder), "--no-loss", "--device", "cpu"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "one in 10" in out
    assert summary(trained.quality["layers.0.resid_post"].reconstruction.reasons) in out
    assert main([*words, "--count", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["held_out"] == 10
    assert Counted.from_json(found["counted"]) == Counted.everything()
    assert [figures["left_out"] for figures in found["quality"].values()] == [0, 0]
    assert main([*words, "--count", "some"]) == 2
    assert "--count is one of all, not 'some'" in capsys.readouterr().err
