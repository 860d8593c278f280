"""Documents, packing, and the shuffling buffer, with their cursors."""

from __future__ import annotations

import gzip
import json
import sys
import types
from itertools import islice
from pathlib import Path

import pytest
import torch

from qwen_scope.cli import main
from qwen_scope.errors import FormatError, InputError, NotFoundError, QwenScopeWarning
from qwen_scope.model import HookPoint, capture
from qwen_scope.text import Corpus, Counted, TokenRows
from qwen_scope.train import ResidualBuffer, ResidualTable, TrainConfig, train

from .conftest import sentences

POINTS = [HookPoint(0), HookPoint(2)]


def once(source, **options) -> list:
    return [document.text for document in Corpus(source, **options)]


def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path) -> None:
    texts = ["one\ntwo", "three", "vier ü 五"]
    lines = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "a.txt").write_text("\n\n" + "\n\n\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert [d.strip() for d in once(tmp_path / "a.txt")] == texts
    assert once(tmp_path / "a.jsonl") == once(tmp_path / "a.jsonl.gz") == once(texts) == texts
    assert len(once(tmp_path)) == 9, "a folder gives all its files"


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": sentences(700), "n": list(range(700))}), tmp_path / "a.parquet")
    assert once(tmp_path / "a.parquet") == sentences(700)
    with pytest.raises(InputError, match="no column 'body' but 'text', 'n'; pass column='text'"):
        once(tmp_path / "a.parquet", column="body")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(FormatError, match="not a Parquet file"):
        once(tmp_path / "b.parquet")


def test_a_hub_data_set_is_streamed_and_skipped_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}

    class Stream:
        def skip(self, n: int):
            asked["skipped"] = n
            return ({"text": f"row {i}"} for i in range(n, 10))

    def load_dataset(name, subset, *, split, streaming):
        asked.update(name=name, subset=subset, split=split, streaming=streaming)
        return Stream()

    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    documents = Corpus("owner/set", subset="en", split="test")
    assert [document.text for document in islice(documents, 7)] == [f"row {i}" for i in range(7)]
    again = Corpus("owner/set", subset="en", split="test")
    again.seek(documents.cursor())
    assert [document.text for document in again] == ["row 7", "row 8", "row 9"]
    assert asked == {"name": "owner/set", "subset": "en", "split": "test", "streaming": True, "skipped": 7}


def test_the_lab_corpus_has_no_end() -> None:
    assert all(isinstance(d.text, str) for d in islice(Corpus("lab"), 3))


def test_sources_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError, match="no file, folder or dataset"):
        Corpus(tmp_path / "none.txt", repeat=True)
    with pytest.raises(InputError, match="holds no file that ends with"):
        Corpus(tmp_path, repeat=True)
    (tmp_path / "a.pdf").write_text("")
    with pytest.raises(InputError, match="no corpus this package reads"):
        Corpus(tmp_path / "a.pdf", repeat=True)
    monkeypatch.setattr("qwen_scope.errors.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install 'datasets>="):
        Corpus("owner/set", repeat=True)


def test_lines_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.warns(
        QwenScopeWarning, match=r"1 of 2 rows .*\(the first: row 2 of a.jsonl: no 'text'; it has 'body'\)"
    ):
        assert once(path) == ["fine"]
    path.write_text('{"body": "x"}\n')
    with pytest.raises(InputError, match=r"no row of a.jsonl can be used.* have no column 'text' but 'body'"):
        once(path)
    path.write_text("{not json}\n")
    with pytest.raises(InputError, match=r"1 bad JSON \(the first: row 1 of a.jsonl: Expecting"):
        once(path)
    path.write_text('{"text": 3}\n')
    with pytest.raises(InputError, match=r"not text .*int: 3"):
        once(path)
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputError, match="invalid UTF-8"):
        once(path)


UNUSABLE = [
    "{not json}", "[]", "3", "null", '{"text": null}', '{"text": 3}', '{"text": true}', '{"text": ""}', '{"text": []}',
    '{"text": ["a", "b"]}', '{"text": [{"content": "x"}]}', '{"text": {"a": "b"}}', '{"body": "x"}', "[" * 100_000,
    '{"text": "\\ud800"}', '{"text": ' + "9" * 5000 + "}",
]  # fmt: skip


@pytest.mark.parametrize("line", UNUSABLE)
def test_a_row_that_holds_no_document_is_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(['{"text": "one"}', line, '{"text": "two"}', line, ""]))
    documents = Corpus(path)
    with pytest.warns(QwenScopeWarning, match=r"2 of 4 rows of a\.jsonl can't be used .*row 2 of a") as said:
        assert [document.text for document in documents] == ["one", "two"]
    assert len(said) == 1
    assert documents.unused.total() == 2
    path.write_text(line + "\n")
    with pytest.raises(InputError, match=r"no row of a\.jsonl can be used"):
        list(Corpus(path, repeat=True))


def test_bytes_that_are_no_text_cost_their_row_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\n\nt\xffo\n\n" + "three\u0085four\u2028\n".encode())
    with pytest.warns(QwenScopeWarning, match="1 of 3 rows of .*invalid UTF-8"):
        assert once(tmp_path / "a.txt") == ["one", "three\u0085four\u2028"]
    whole = gzip.compress(b"".join(b'{"text": "row %d"}\n' % i for i in range(5000)))
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(QwenScopeWarning, match="1 damaged file"):
        assert len(once(tmp_path / "b.jsonl.gz")) > 100
    (tmp_path / "c.jsonl.gz").write_bytes(b"not zipped")
    with pytest.raises(InputError, match="1 damaged file"):
        once(tmp_path / "c.jsonl.gz")


def test_a_passed_over_row_keeps_its_number(tmp_path: Path) -> None:
    """So a cursor, a share and the held-out documents are the same whatever else the file holds."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" if i % 3 else "x\n" for i in range(30)))
    with pytest.warns(QwenScopeWarning):
        whole = [once(path, hold_out=5, rank=rank, world=2) for rank in range(2)]
    with pytest.warns(QwenScopeWarning):
        held = once(path, hold_out=5, held_out=True)
    assert held == [str(i) for i in range(0, 30, 5) if i % 3]
    assert sorted(map(int, whole[0] + whole[1])) == [i for i in range(30) if i % 5 and i % 3]
    documents = Corpus(path)
    first = list(islice(documents, 7))
    again = Corpus(path)
    again.seek(documents.cursor())
    with pytest.warns(QwenScopeWarning):
        assert [document.text for document in [*first, *again]] == [str(i) for i in range(30) if i % 3]


@pytest.mark.parametrize(
    "name", ["nosuch.jsonl", "data/nosuch.jsonl", "data/nosuch.csv", "data/a.json", "data/x.txt.gz", "a/b/c", "~/none"]
)
def test_a_misspelt_file_is_one_sentence_and_asks_nobody(name: str, capsys, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file, folder or dataset"):
        Corpus(name, repeat=True)
    words = ["train", name, "-o", str(tmp_path / "run"), "--d-sae", "64", "--k", "4", "--tokens", "8192"]
    assert main(words) == 2
    said = capsys.readouterr().err.strip().split("\n")
    assert "there is no file, folder or dataset" in said[-1]


def test_a_data_set_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn:
        def skip(self, n: int):
            yield {"text": "one"}
            raise ConnectionError("the line went dead\nlong story")

    module = types.ModuleType("datasets")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "datasets", module)
    module.load_dataset = lambda *a, **k: Torn()  # type: ignore[attr-defined]
    with pytest.raises(FormatError, match=r"can't be read on: the line went dead$"):
        list(Corpus("owner/set"))

    def refuse(*args, **options):
        raise RuntimeError("Cannot send a request, as the client is offline")

    module.load_dataset = refuse  # type: ignore[attr-defined]
    with pytest.raises(NotFoundError, match="no file 'owner/set' here, and the Hub does not give it"):
        Corpus("owner/set", repeat=True)


def test_shares_and_held_out_documents_part_the_source() -> None:
    texts = [str(i) for i in range(50)]
    kept = once(texts, hold_out=7, held_out=True)
    assert kept == [str(i) for i in range(0, 50, 7)]
    shares = [once(texts, hold_out=7, rank=rank, world=3) for rank in range(3)]
    assert sorted([*kept, *(d for share in shares for d in share)], key=int) == texts
    assert {len(share) for share in shares} == {14}
    documents = Corpus(texts, hold_out=7, rank=1, world=3)
    assert len(list(islice(documents, 5))) == 5
    again = Corpus(texts, hold_out=7, rank=1, world=3)
    again.seek(documents.cursor())
    assert [document.text for document in again] == shares[1][5:]
    with pytest.raises(InputError, match="nothing to train on"):
        Corpus(texts, hold_out=1, repeat=True)


def test_a_source_repeats_unless_it_can_not() -> None:
    documents = Corpus(["a", "b"], repeat=True)
    assert [document.text for document in islice(documents, 5)] == ["a", "b", "a", "b", "a"]
    assert {"epoch": 2, "seen": 1}.items() <= documents.cursor().items()
    assert once(iter(["a", "b"]), repeat=True) == ["a", "b"]
    assert once([], repeat=True) == []
    assert once(["held out"], repeat=True, hold_out=100) == []
    assert once(["one", "two"], repeat=True, rank=2, world=3) == []
    assert list(Corpus(["one"], repeat=True, rank=1, world=2).rows()) == []


def test_rows_are_the_documents_with_ends_between_them(loaded) -> None:
    texts = sentences(200)
    rows = list(TokenRows(Corpus(texts), loaded.tokenizer, context_length=16, batch_size=4))
    flat = [i for text in texts for i in [*loaded.tokenizer(text)["input_ids"], loaded.tokenizer.eos_token_id]]
    got = torch.cat(rows).flatten().tolist()
    assert got == flat[: len(got)]
    assert len(flat) - len(got) < 16
    assert all(r.shape == (4, 16) and r.dtype == torch.int64 for r in rows[:-1])


def test_ids_beyond_eighteen_bits_survive() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {"a": 2**18 + 1, "b": 2**20 + 3, "c": 151_643, "</s>": 2**20 + 7}
    raw = Tokenizer(models.WordLevel(ids, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wide = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    rows = next(iter(TokenRows(Corpus(["a b c"] * 8, repeat=True), wide, context_length=4, batch_size=2)))
    assert rows.tolist() == [list(ids.values())] * 2


def test_conversations_are_rendered_by_the_chat_template(loaded) -> None:
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    rows = TokenRows(Corpus([talk] * 4, repeat=True), loaded.tokenizer, context_length=8, batch_size=1, chat="default")
    words = loaded.tokenizer.convert_ids_to_tokens(next(iter(rows))[0].tolist())
    assert words[:5] == ["<unk>", "<unk>", "the", "cat", "</s>"] or words[1:4] == ["the", "cat", "</s>"]
    with pytest.raises(InputError, match="pass chat='default' to use the chat template"):
        next(iter(TokenRows(Corpus([talk], repeat=True), loaded.tokenizer, context_length=4, batch_size=1)))


@pytest.mark.parametrize("taken", [0, 1, 3, 7])
def test_rows_go_on_from_a_cursor(loaded, taken: int) -> None:
    texts = sentences(37)  # seven batches need several epochs

    def fresh() -> TokenRows:
        return TokenRows(Corpus(texts, hold_out=5, repeat=True), loaded.tokenizer, context_length=16, batch_size=4)

    first = fresh()
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    again = fresh()
    again.seek(json.loads(json.dumps(first.cursor())))
    assert again.cursor() == first.cursor()
    for a, b in islice(zip(stream, again, strict=False), 5):
        assert torch.equal(a, b)


def buffer(loaded, texts=None, **options) -> ResidualBuffer:
    rows = TokenRows(Corpus(texts or sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4)
    every = {"batch": 32, "budget": 2 * 32 * 4 * 640, "counted": Counted.everything()}
    return ResidualBuffer(loaded.model, rows, POINTS, **{**every, **options})


def test_a_filling_is_the_models_residuals_shuffled(loaded) -> None:
    source = buffer(loaded)
    assert (source.tokens, source.nbytes) == (640, 2 * 32 * 4 * 640)
    batches = list(islice(source, 20))
    rows = torch.cat(
        list(
            islice(
                TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4), 10
            )
        )
    )
    expected = capture(loaded.model, rows, POINTS)
    for point in POINTS:
        got = torch.cat([batch[str(point)] for batch in batches])
        want = expected[point].flatten(0, 1)
        assert not torch.equal(got, want)
        # Every token once: equal as multisets, seen from a few directions.
        look = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close((got @ look).sort(0).values, (want @ look).sort(0).values, rtol=1e-4, atol=1e-3)


def test_special_tokens_are_left_out_of_a_filling(loaded) -> None:
    rows = torch.cat(
        list(
            islice(
                TokenRows(Corpus(sentences(300), repeat=True), loaded.tokenizer, context_length=16, batch_size=4), 10
            )
        )
    )
    special = frozenset(rows[0, :2].tolist())
    kept = ~torch.isin(rows, torch.tensor(sorted(special)))
    assert 0 < kept.sum() < rows.numel()
    source = buffer(loaded, counted=Counted(first=0, special=special))
    batches = list(islice(source, int(kept.sum()) // 32))
    assert (source.filling, source.served) == (0, len(batches))
    expected = capture(loaded.model, rows, POINTS)
    for point in POINTS:
        got, want = torch.cat([batch[str(point)] for batch in batches]), expected[point][kept]
        apart = torch.cdist(got, want, compute_mode="donot_use_mm_for_euclid_dist")
        assert (apart.amin(1) < 1e-3).all()
        assert len(got) > len(want) - 32
    with pytest.raises(InputError, match="too small for one batch"):
        buffer(loaded, batch=512, budget=2 * 32 * 4 * 640, counted=Counted(first=0, special=special))


def test_a_short_run_fills_no_more_than_it_needs(loaded) -> None:
    assert buffer(loaded, most=100).tokens == 192
    assert buffer(loaded, most=10**9).tokens == 640
    assert len(list(islice(buffer(loaded, most=160), 5))) == 5


@pytest.mark.parametrize("taken", [0, 5, 20, 33])
def test_the_buffer_goes_on_from_its_cursor_bit_for_bit(loaded, taken: int) -> None:
    first = buffer(loaded)
    stream = iter(first)
    for _ in range(taken):
        next(stream)
    again = buffer(loaded)
    again.seek(json.loads(json.dumps(first.cursor())))
    for a, b in islice(zip(stream, again, strict=False), 25):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_resumes_through_the_buffer_bit_for_bit(loaded, tmp_path: Path) -> None:
    from qwen_scope.train import Checkpoints

    class Stop(Exception):
        pass

    def stop(report) -> None:
        if report.step == 26:
            raise Stop

    config = TrainConfig(d_sae=64, k=4, tokens=40 * 32, batch=32, lr=1e-3, dead_tokens=128)
    whole = train(config, buffer(loaded))
    with pytest.raises(Stop):
        train(config, buffer(loaded), checkpoints=Checkpoints(tmp_path, every=25), callbacks=[stop])
    resumed = train(config, buffer(loaded), checkpoints=Checkpoints(tmp_path, every=25, resume=True))
    for name, sae in whole.items():
        assert torch.equal(sae.W_enc, resumed[name].W_enc)
        assert torch.equal(sae.b_dec, resumed[name].b_dec)


def test_too_little_text_or_memory_is_said_at_once(loaded) -> None:
    once_only = TokenRows(Corpus(sentences(2)), loaded.tokenizer, context_length=16, batch_size=4)
    config = TrainConfig(d_sae=64, k=4, tokens=320, batch=32)
    short = ResidualBuffer(loaded.model, once_only, POINTS, batch=32)
    with pytest.raises(InputError, match="less than one batch of 32"):
        train(config, short)
    with pytest.raises(InputError, match="too small for one batch; give it 16,384"):
        buffer(loaded, budget=1000)
    with pytest.raises(InputError, match="at least one hook point"):
        ResidualBuffer(loaded.model, once_only, [])
    ends = TokenRows(Corpus(sentences(15)), loaded.tokenizer, context_length=16, batch_size=4)
    with pytest.raises(InputError, match=r"ended after \d+ of 10 steps"):
        train(config, ResidualBuffer(loaded.model, ends, POINTS, batch=32))
    with pytest.raises(InputError, match="the config asks for 32 rows at a time"):
        train(config, buffer(loaded, batch=16))


def test_a_table_needs_the_same_tokens_everywhere() -> None:
    x = torch.zeros(10, 3)
    with pytest.raises(InputError, match="every hook point needs the same tokens"):
        ResidualTable({"layers.0": x, "layers.1": x[:5]}, batch=2)
    with pytest.raises(InputError, match="fewer than one batch of 11"):
        ResidualTable({"layers.0": x}, batch=11)
    with pytest.raises(InputError, match="no hook points"):
        ResidualTable({}, batch=1)
