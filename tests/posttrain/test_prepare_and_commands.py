"""Alpha tables equal brute force; the commands run from a labelled file to a measured model; bad input is refused."""

from __future__ import annotations

import json
import shutil
import unicodedata
from dataclasses import replace

import numpy as np
import posttrain_tiny as small
import pytest
import tiny
import torch

from qwen_scope import load_scope
from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, MismatchError, NotFoundError
from qwen_scope.lab import documents
from qwen_scope.model import HookPoint, capture
from qwen_scope.posttrain import (
    FeatureLoss,
    code_switch_ratio,
    lab_samples,
    prepare,
    read_monitor,
    read_table,
    switches,
)
from qwen_scope.posttrain.samples import dataset_of, sample_of

LABELLED = [
    ("calm", "The weather is fine today."),
    ("calm", "Where is the station?"),
    ("loud", "今天天气很好。"),
    ("loud", "车站在哪里？"),
    ("code", "def add(a, b): return a + b"),
    ("code", "print(add(1, 2))"),
]


@pytest.fixture(scope="module")
def scope():
    return load_scope(tiny.folder() / "model", tiny.folder() / "sae")


def dense(scope, layer: int, group: str):
    """Activations and pre-activations of a group's tokens, first tokens left out, token by feature."""
    acts, pre = [], []
    sae = scope.saes[layer]
    for name, text in LABELLED:
        if name == group:
            ids = torch.tensor([scope.tokenizer(text)["input_ids"]])
            h = capture(scope.model, ids, [HookPoint(layer)])[HookPoint(layer)][0, 1:]
            acts.append(sae.encode(h).to_dense().numpy())
            pre.append((h @ sae.W_enc.T + sae.b_enc).numpy())
    return np.concatenate(acts), np.concatenate(pre)


def test_features_and_thresholds_are_brute_force(scope, tmp_path) -> None:
    found = prepare(scope, LABELLED, "loud", layers=[0, 2], features=3)
    for one in found.layers:
        found_in = {group: dense(scope, one.layer, group) for group in ("calm", "code", "loud")}
        means = {group: (acts.mean(0), pre.mean(0)) for group, (acts, pre) in found_in.items()}
        score = means["loud"][0] - (means["calm"][0] + means["code"][0]) / 2
        assert list(one.features) == np.argsort(-score, kind="stable")[:3].tolist()
        assert list(one.scores) == pytest.approx(score[list(one.features)], abs=1e-3)
        for group, (_, pre) in means.items():
            assert list(one.alpha[group]) == pytest.approx(pre[list(one.features)], abs=1e-3)
    words = {scope.tokenizer.decode([token]) for token in found.tokens}
    assert words
    assert all(any(word in text for group, text in LABELLED if group == "loud") for word in words if "�" not in word)
    found.save(tmp_path / "table.json")
    assert read_table(tmp_path / "table.json") == found


@pytest.mark.parametrize("quantile", [0.0, 0.75, 1.0])
def test_thresholds_at_a_quantile_are_brute_force(scope, quantile) -> None:
    found = prepare(scope, LABELLED, "loud", layers=[0, 2], features=3, quantile=quantile)
    assert found.made["alpha"] == f"quantile {quantile:g}"
    plain = prepare(scope, LABELLED, "loud", layers=[0, 2], features=3)
    for one, other in zip(found.layers, plain.layers, strict=True):
        assert one.features == other.features
        for group in ("calm", "code", "loud"):
            for j, feature in enumerate(one.features):
                pre = np.sort(dense(scope, one.layer, group)[1][:, feature])
                at = quantile * (len(pre) - 1)
                below, above = pre[int(np.floor(at))], pre[int(np.ceil(at))]
                assert one.alpha[group][j] == pytest.approx(below + (at % 1) * (above - below), abs=1e-3)


def effects_by_hand(scope, layer: int, ids: list[int]) -> np.ndarray:
    """`sum over tokens of a_f (d_f . dlog p/dh)`, with torch's own hooks."""
    kept = []

    def keep(module, args, out) -> None:
        h = out[0] if isinstance(out, tuple) else out
        h.requires_grad_().retain_grad()
        kept.append(h)

    with torch.enable_grad():
        handle = scope.model.model.layers[layer].register_forward_hook(keep)
        logits = scope.model(torch.tensor([ids[:-1]]), use_cache=False).logits[0, -1]
        handle.remove()
        logits.log_softmax(-1)[ids[-1]].backward()
    sae, h, slope = scope.saes[layer], kept[0].detach()[0], kept[0].grad[0]
    scope.model.zero_grad()
    return (sae.encode(h).to_dense() * (slope @ sae.W_dec)).sum(0).numpy()


def test_features_that_begin_the_target_are_brute_force(scope) -> None:
    begun = switches(small.ROWS, scope.tokenizer, "zh", "CJK")
    found = prepare(scope, LABELLED, "loud", layers=[0, 2], features=3, onsets=begun)
    assert (found.made["features"], found.made["onsets"]) == ("by effect", 2)
    for one in found.layers:
        effects = np.mean([effects_by_hand(scope, one.layer, ids) for ids in begun], axis=0)
        assert list(one.features) == np.argsort(-effects, kind="stable")[:3].tolist()
        assert list(one.scores) == pytest.approx(effects[list(one.features)], rel=1e-3, abs=1e-7)
    control = prepare(scope, LABELLED, "loud", layers=[2], features=3, onsets=begun, at_random=1)
    assert not set(control.layers[0].features) & set(found.layers[1].features)


def test_switches_end_with_the_first_letter_of_the_script(scope) -> None:
    begun = switches(small.ROWS, scope.tokenizer, "zh", "CJK")
    wanted = ["Where is the station? 车", "Wo ist 你"]
    for ids, text in zip(begun, wanted, strict=True):
        before = scope.tokenizer.decode(ids[:-1])
        assert before.rstrip() == text[:-1].rstrip()
    # A group that writes in the script is not one that switches; nor is a question in it.
    native = [{"text": "駅はどこですか", "group": "ja"}, {"text": "天気", "group": "ja"}]
    asked = [{"prompt": "你好", "completion": "hello", "group": "en"}]
    assert switches([*small.ROWS, *native, *asked], scope.tokenizer, "zh", "CJK") == begun
    assert (
        len(
            switches(
                [{"text": "fine 今", "group": "en"}, {"text": "fine", "group": "en"}], scope.tokenizer, "zh", "CJK"
            )
        )
        == 1
    )
    with pytest.raises(NotFoundError, match="no sample outside 'zh' switches to CJK"):
        switches(small.ROWS[:3], scope.tokenizer, "zh", "CJK")


@pytest.mark.parametrize("asked", ["Wo ", [{"role": "user", "content": "Wo "}]])
def test_switches_begin_as_training_reads_them(scope, asked) -> None:
    """A BOS that the tokenizer adds is there once, whether or not a chat template writes one, too."""
    tokenizer = tiny.with_bos(scope.tokenizer)
    said = "ist 你" if isinstance(asked, str) else [{"role": "assistant", "content": "ist 你"}]
    others = [{"text": "fine", "group": "de"}]
    (ids,) = switches([{"prompt": asked, "completion": said, "group": "de"}, *others], tokenizer, "zh", "CJK")
    bare = tokenizer("Wo ", add_special_tokens=False)["input_ids"]
    assert ids[: len(bare) + 1] == [tokenizer.bos_token_id, *bare]


def test_no_sample_is_said() -> None:
    with pytest.raises(InputError, match="there is no sample"):
        dataset_of([])


def test_with_a_script_its_unused_tokens_belong_to_the_target(scope) -> None:
    """A penalty on the tokens of a few texts alone leaves the rest of a script free."""
    plain, whole = (set(prepare(scope, LABELLED, "loud", layers=[2], script=name).tokens) for name in (None, "CJK"))
    used = {i for _, text in LABELLED for i in scope.tokenizer(text)["input_ids"]}
    words = {i: scope.tokenizer.decode([i]) for i in range(len(scope.tokenizer))}
    letters = {i for i, word in words.items() if any("CJK" in unicodedata.name(char, "") for char in word)}
    assert letters - used, "the vocabulary has some that no text uses"
    assert whole - plain == letters - used
    assert plain <= whole
    shared = [*LABELLED, ("calm", "天")]  # what another group writes is not the target's own
    assert not set(scope.tokenizer("天")["input_ids"]) & set(prepare(scope, shared, "loud", script="CJK").tokens)


def test_the_control_draws_other_features(scope) -> None:
    best = prepare(scope, LABELLED, "loud", layers=[2])
    control = prepare(scope, LABELLED, "loud", layers=[2], at_random=1)
    assert len(control.layers[0].features) == 2
    assert not set(control.layers[0].features) & set(best.layers[0].features)
    assert control == prepare(scope, LABELLED, "loud", layers=[2], at_random=1)
    assert control.made["features"] == "at random"


def test_a_table_of_another_sae_is_refused(scope) -> None:
    found = prepare(scope, LABELLED, "loud", layers=[0])
    other = replace(scope.saes[0], identity=replace(scope.saes[0].identity, fingerprint="f" * 64))
    with pytest.raises(MismatchError, match="the alpha table was made with"):
        FeatureLoss(found, {0: other}, weight=1.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: "{", "is not JSON"),
        (lambda data: [], "holds no JSON object"),
        (lambda data: {**data, "version": 2}, "is of version 2"),
        (lambda data: {**data, "layers": []}, "has no layer"),
        (lambda data: {k: v for k, v in data.items() if k != "target"}, "lacks 'target'"),
        (lambda data: {**data, "target": "xx"}, "does not name the same groups"),
        (lambda data: {**data, "layers": [{**data["layers"][0], "scores": []}]}, "one number per feature"),
        (lambda data: {**data, "layers": [{**data["layers"][0], "alpha": {"zh": [float("nan")] * 3}}]}, "finite"),
    ],
)
def test_damaged_tables(change, says, tmp_path) -> None:
    path = tmp_path / "table.json"
    small.table().save(path)
    damaged = change(json.loads(path.read_text()))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    with pytest.raises(FormatError, match=says):
        read_table(path)


def test_what_prepare_refuses(scope) -> None:
    with pytest.raises(NotFoundError, match="no text belongs to the target 'lout'; did you mean 'loud'"):
        prepare(scope, LABELLED, "lout")
    with pytest.raises(InputError, match="texts of other groups"):
        prepare(scope, LABELLED[:2], "calm")
    with pytest.raises(InputError, match="a quantile lies between 0 and 1"):
        prepare(scope, LABELLED, "loud", quantile=99)
    with pytest.raises(InputError, match="no text of 'loud' has a second token"):
        prepare(scope, [("calm", "Where is"), ("loud", "a")], "loud")


def test_samples_of_chats_and_of_the_lab() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    assert sample_of(chat, None, "en") == {"prompt": chat[:1], "completion": chat[1:], "group": "en"}
    with pytest.raises(InputError, match="ends with a message of the assistant"):
        sample_of(chat[:1], None, "en")
    for document in documents(n=40, kinds=["drift", "chat"], seed=1):
        (sample,) = lab_samples([document])
        assert sample["group"] == document.factors.get("answer_language", document.language)
        if "prompt" in sample:
            assert sample["prompt"] + sample["completion"] == document.text.rstrip()
            assert sample["prompt"].endswith("</think>\n\n")


def test_code_switching_is_counted_by_script(scope) -> None:
    found = code_switch_ratio(
        scope.model, scope.tokenizer, ["The weather", "Where is", "hello"], "CJK", samples=4, max_new_tokens=8, seed=3
    )
    flat = [text for row in found.answers for text in row]
    assert len(flat) == 12
    assert len(set(flat)) > 6, "samples differ"
    assert found.switched == [[any("\u4e00" <= c <= "\u9fff" for c in text) for text in row] for row in found.answers]
    assert found.ratio.estimate == pytest.approx(np.mean(found.switched))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    texts = folder / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": text, "group": group}) for group, text in LABELLED))
    rows = [
        {**row, "group": {"en": "calm", "de": "calm", "zh": "loud", None: None}[row["group"]]} for row in small.ROWS
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "prompts.txt").write_text("The weather\nWhere is\n")
    return folder


def run(capsys, *words: object) -> dict:
    assert main(["posttrain", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_prepare_by_effect_at_a_quantile(corpus, tmp_path, capsys) -> None:
    words = ("prepare", corpus / "texts.jsonl", "--target", "loud", "--model", tiny.folder() / "model")
    words += ("--sae", tiny.folder() / "sae", "--onsets", corpus / "chats.jsonl", "--script", "cjk")
    made = run(capsys, *words, "--quantile", 0.9, "-o", tmp_path / "t.json")["made"]
    assert (made["features"], made["onsets"], made["alpha"]) == ("by effect", 2, "quantile 0.9")
    assert main(["posttrain", *map(str, words), "-o", str(tmp_path / "t.json")]) == 0
    assert "mean pre-activations" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_from_labels_to_a_measured_model(corpus, tmp_path, capsys) -> None:
    model = ("--model", tiny.folder() / "model")
    sae = ("--sae", tiny.folder() / "sae")
    made = run(capsys, "prepare", corpus / "texts.jsonl", "--target", "loud", "-o", tmp_path / "t.json", *model, *sae)
    assert [one["layer"] for one in made["layers"]] == [0, 2]
    quick = ("--table", tmp_path / "t.json", "--accumulate", 1, "--batch", 4, "--warmup", 0, "--lr", 1e-2)
    quick += ("--max-length", 48, "--held-out", corpus / "chats.jsonl")
    chats = corpus / "chats.jsonl"
    out = tmp_path / "run"
    watched = ("--monitor", corpus / "prompts.txt", "--monitor-prompts", corpus / "chats.jsonl", "--monitor-every", 2)
    words = (*model, *sae, *quick, *watched)
    done = run(capsys, "sft", chats, "-o", out, *words, "--weight", 0.5, "--lora", 2, "--epochs", 2)
    assert done["steps"] == 4
    seen = read_monitor(out / "monitor.jsonl")
    assert [line["step"] for line in seen] == [0, 2, 4]
    chosen = {one["layer"]: set(one["features"]) for one in made["layers"]}
    assert {entry["layer"]: {one["feature"] for one in entry["watched"]} for entry in seen[-1]["layers"]} == chosen
    assert {one["label"] for entry in seen[-1]["layers"] for one in entry["watched"]} == {"loud"}
    assert all(isinstance(one["rise_in_generation"], float) for line in seen for one in line["concepts"])
    assert done["alarms"] == [alarm for line in seen for alarm in line["alarms"]]
    facts = json.loads((out / "run.json").read_text())
    assert (facts["method"], facts["weight"], facts["target"], facts["seed"]) == ("features", 0.5, "loud", 42)
    assert "trl" in facts["versions"]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("eval_loss" in line for line in log)
    assert any("monitor/drift_2" in line for line in log)
    measured = run(capsys, "eval", "--model", out / "model", "--held-out", chats)
    assert measured["held_out_loss"] == pytest.approx(done["held_out_loss"], abs=1e-4)  # the adapter is merged
    asked = ("--script", "CJK", "--samples", 2, "--max-new-tokens", 4)
    measured = run(capsys, "eval", corpus / "prompts.txt", *asked, "--model", out / "model")
    assert 0 <= measured["code_switch_ratio"]["estimate"] <= 1
    penalised = run(capsys, "sft", chats, "-o", tmp_path / "p", *model, *quick, "--method", "penalty", "--max-steps", 1)
    assert penalised["steps"] == 1


@pytest.mark.slow
def test_an_interrupted_run_goes_on(corpus, tmp_path, capsys) -> None:
    words = ("sft", corpus / "chats.jsonl", "--method", "plain", "--model", tiny.folder() / "model", "--accumulate", 1)
    words += ("--batch", 4, "--warmup", 0, "--max-length", 48, "--epochs", 3, "--save-every", 2)
    whole = run(capsys, *words, "-o", tmp_path / "whole")
    run(capsys, *words, "-o", tmp_path / "part")
    (tmp_path / "part" / "metrics.json").unlink()
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "checkpoint-6")
    again = run(capsys, *words, "-o", tmp_path / "part", "--resume")
    assert again["steps"] == whole["steps"] == 6
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "part")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["eval"], "nothing to measure"),
        (["eval", "lab"], "needs both"),
        (["eval", "lab", "--script", "KLINGON"], "no letter of Unicode"),
        (["sft", "lab", "-o", "out"], "needs an alpha table"),
        (["sft", "lab", "-o", "out", "--method", "magic"], "the method is one of"),
        (["sft", "lab", "-o", "out", "--method", "plain", "--zero"], "belong to the method"),
        (["sft", "lab", "-o", "out", "--table", "none.json"], "there is no alpha table"),
        (
            ["sft", "lab", "-o", "out", "--method", "plain", "--resume", "--save-every", "5"],
            "no checkpoint to go on from",
        ),
        (["sft", "lab", "-o", "file/out", "--method", "plain", "--sample", "20"], "can't be written: Not a directory"),
        (
            ["sft", "lab", "-o", "out", "--method", "plain", "--sample", "20", "--monitor", "one.txt"],
            "at least two texts",
        ),
        (["sft", "lab", "-o", "out", "--method", "plain", "--sample", "20", "--monitor", "no.txt"], "no.txt"),
        (
            [
                "sft",
                "lab",
                "-o",
                "out",
                "--method",
                "plain",
                "--sample",
                "20",
                "--monitor",
                "lab",
                "--monitor-prompts",
                "lab",
            ],
            "goes with --monitor and --table",
        ),
        (["prepare", "lab", "--target", "zh", "-o", "t.json", "--onsets", "lab"], "ranking by effect needs --script"),
        (["prepare", "lab", "--target", "tlh", "-o", "t.json", "--sample", "30"], "no text belongs to the target"),
    ],
)
def test_bad_input_ends_with_one_sentence(words, says, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "one.txt").write_text("Guten Morgen.")
    assert main(["posttrain", *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(monkeypatch, capsys) -> None:
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    for command in (["prepare", "lab", "--target", "zh", "-o", "t.json"], ["sft", "lab", "-o", "out"], ["eval", "lab"]):
        assert main(["posttrain", *command]) == 2
        assert "pip install 'trl<2,>=1.16' 'peft>=0.21' 'datasets>=4'" in capsys.readouterr().err
