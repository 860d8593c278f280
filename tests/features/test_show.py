"""One feature on a page: what it says is true, and whatever the corpus holds is shown inertly. And the exports."""

from __future__ import annotations

import gzip
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import lab_store
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lab_store import LAYER, OTHER
from safetensors.numpy import load_file

from qwen_scope import FeatureStore
from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError, NotFoundError
from qwen_scope.features import (
    Creator,
    TokenJudge,
    cofiring,
    elsewhere,
    export_delphi,
    export_neuronpedia,
    export_statistics,
    feature_html,
    feature_page,
    label_features,
    similar,
    token_effects,
    token_ids,
    top_logits,
)
from qwen_scope.model import LoadedModel, final_norm, unembedding
from qwen_scope.report import html_tokens, shaded
from qwen_scope.scope import ExtractOptions, extract
from qwen_scope.text import Corpus

HOSTILE = [
    "<script>alert(1)</script> <img src=x onerror=alert(2)> {{7*7}} ${x} `id`",
    "\u202eright to left\u202c \u2066isolate\u2069 \x1b[31mred\x1b[0m \x07 bell \x00 nul \u200b zero",
    "]]></style></title><!-- comment --> &amp; \"quote\" 'single'",
    "bad \udcff surrogate",
]


def busiest(store: FeatureStore) -> int:
    return int(np.argmax(store.stats(LAYER)["tokens"].to_numpy()))


def test_promoted_tokens_are_those_the_direction_gives(store: FeatureStore) -> None:
    scope, feature = lab_store.scope(), busiest(store)
    promoted, demoted = token_effects(scope, LAYER, feature, 5)
    with torch.no_grad():
        column = scope.saes[LAYER].W_dec[:, feature].float() * 100
        logits = unembedding(scope.model).float() @ final_norm(scope.model)(column)
    logits = (logits - logits.mean()).numpy()
    for some, sign in ((promoted, -1), (demoted, 1)):
        best = np.argsort(sign * logits, kind="stable")[:5]
        assert [one.token for one in some] == best.tolist()
        np.testing.assert_allclose([one.effect for one in some], logits[best], rtol=1e-3)


def test_features_that_promote_a_token_are_found_among_all(store: FeatureStore) -> None:
    scope = lab_store.scope()
    token = token_ids(scope, ["the"])[0]
    with torch.no_grad():
        columns = scope.saes[LAYER].W_dec.T.float() * 100
        logits = final_norm(scope.model)(columns) @ unembedding(scope.model).float().T
    z = ((logits - logits.mean(-1, keepdim=True)) / logits.std(-1, unbiased=False, keepdim=True))[:, token].numpy()
    found = top_logits(scope, [token], [LAYER], 4)
    assert [one.feature for one in found] == np.argsort(-z, kind="stable")[:4].tolist()
    np.testing.assert_allclose([one.score for one in found], np.sort(z)[::-1][:4], rtol=1e-3)
    with pytest.raises(InputError, match="ids"):
        top_logits(scope, [10**7], [LAYER])
    with pytest.raises(InputError, match="tokens to this model"):
        token_ids(scope, ["incomprehensibilities"])


@pytest.mark.slow
def test_neighbours_by_direction_and_by_firing(store: FeatureStore) -> None:
    scope, feature = lab_store.scope(), busiest(store)
    W = torch.nn.functional.normalize(scope.saes[LAYER].W_dec.float(), dim=0)
    cosine = (W.T @ W[:, feature]).numpy()
    near = similar(scope, LAYER, feature, 3)
    order = [f for f in np.argsort(-cosine, kind="stable").tolist() if f != feature]
    assert [one.feature for one in near] == order[:3]
    assert near[0].cosine == pytest.approx(cosine[order[0]], abs=1e-5)
    rows = store.sql("SELECT document, position, feature FROM activations WHERE layer = ?", [OTHER]).to_pylist()
    mine = store.sql(
        "SELECT document, position FROM features WHERE layer = ? AND feature = ?", [LAYER, feature]
    ).to_pylist()
    here = {(row["document"], row["position"]) for row in mine}
    places: dict[int, set] = {}
    for row in rows:
        places.setdefault(row["feature"], set()).add((row["document"], row["position"]))
    best = max(places, key=lambda f: (len(places[f] & here) / len(places[f] | here), -f))
    assert cofiring(store, LAYER, feature, 1, other_layer=OTHER)[0].feature == best
    twin = elsewhere(LAYER, feature, [OTHER, LAYER], scope=scope, store=store)
    assert [(one.layer, one.feature) for one in twin] == [(OTHER, best)]
    assert twin[0].cosine is not None


def test_a_page_holds_what_is_known(store: FeatureStore) -> None:
    feature = busiest(store)
    page = feature_page(LAYER, feature, store=store, scope=lab_store.scope(), n=3, contexts=4)
    assert page.summary == store.feature(LAYER, feature)
    assert len({context.document for context in page.strongest}) == len(page.strongest) == 4
    best: dict[int, float] = {}
    for value, document in zip(
        store.values(LAYER, feature).tolist(),
        store.sql(
            "SELECT document FROM features WHERE layer = ? AND feature = ? ORDER BY value DESC, document, position",
            [LAYER, feature],
        )["document"].to_pylist(),
        strict=True,
    ):
        best.setdefault(document, value)
    assert [c.value for c in page.strongest] == sorted(best.values(), reverse=True)[:4]
    assert (len(page.promoted), len(page.similar), len(page.cofiring)) == (3, 3, 3)
    again = json.loads(json.dumps(page.to_json()))
    assert again["summary"]["tokens"] == page.summary.tokens
    only_model = feature_page(LAYER, feature, scope=lab_store.scope(), n=3)
    assert (only_model.summary, only_model.promoted) == (None, page.promoted)
    assert "Promotes" in feature_html(only_model)
    with pytest.raises(InputError):
        feature_page(LAYER, feature)
    with pytest.raises(NotFoundError):
        feature_page(LAYER, 10**6, scope=lab_store.scope())
    with pytest.raises(NotFoundError):
        feature_page(LAYER, 10**6, store=store)


class Elements(HTMLParser):
    """What an HTML parser makes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_hostile_documents_are_shown_inertly(tmp_path: Path, capsys) -> None:
    """HTML, scripts, control and direction characters, half a surrogate, invalid UTF-8, a long line."""
    source = tmp_path / "bad.txt"
    texts = [text.encode("utf-8", "surrogateescape") for text in HOSTILE]
    source.write_bytes(b"\n".join([*texts, b"\xff\xfe\xfa", b"a <b>long</b> line " * 5000, b"ok then"]))
    scope = lab_store.scope()
    options = ExtractOptions(max_tokens=64)
    saes = {LAYER: scope.saes[LAYER]}
    loaded = LoadedModel(scope.model, scope.tokenizer, "<i>model</i>")
    with extract(Corpus(source, unit="line"), loaded, saes, tmp_path / "store", options) as store:
        assert sum(store.manifest.unreadable.values()) == 2
        pages = []
        for document in range(store.manifest.documents):
            feature = store.document_features(document, LAYER, 1)["feature"][0].as_py()
            pages.append(feature_page(LAYER, feature, store=store, scope=scope, n=3, contexts=20))
        label_features(store, [(LAYER, pages[0].feature)], TokenJudge())
    for page in pages:
        html = feature_html(page)
        html.encode("utf-8")
        seen = Elements()
        seen.feed(html)
        allowed = "html head meta title style body h1 h2 p div span table tr th td svg rect"
        assert seen.names <= set(allowed.split())
        assert not [name for name, _ in seen.attributes if name.startswith("on") or name in ("src", "href", "style")]
        assert "default-src 'none'" in html.replace("&#x27;", "'")
        raw = [c for c in html + seen.text if c in "\u202e\u202c\u2066\u2069\u200b" or (ord(c) < 32 and c != "\n")]
        assert not raw
    assert any("<" in "".join(c.tokens) for page in pages for c in page.strongest)
    capsys.readouterr()
    for page in pages[:3]:
        words = ["show", str(tmp_path / "store"), "-f", str(page.feature), "--no-model", "-n", "20"]
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "\u202e" not in shown
        assert not re.search(r"\x1b\[31m|\x07|\x00", shown)


def test_a_token_of_ten_megabytes_is_cut() -> None:
    token = "<b>\u202e" + "x" * 10 * 2**20
    html, line = html_tokens([token, "y"], [1.0, 0.0], 1.0), shaded([token, "y"], [1.0, 0.0])
    assert max(len(html), len(line.plain)) < 1000
    assert "more)" in html
    assert "\u202e" not in html + line.plain
    assert "<b>" not in html


@pytest.mark.slow
def test_the_command_writes_terminal_json_and_html(folder: Path, tmp_path: Path, capsys, store: FeatureStore) -> None:
    words = ["show", str(folder), "--layer", str(LAYER), "-f", str(busiest(store)), "-n", "2"]
    assert main(words) == 0
    assert "Promotes" in capsys.readouterr().out
    assert main([*words, "--json", "--html", str(tmp_path / "page.html")]) == 0
    assert json.loads(capsys.readouterr().out)["feature"] == busiest(store)
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert main(["show", "--layer", "5", "-f", "3", "-n", "2"]) == 0
    capsys.readouterr()
    for bad, said in (
        ([], "--feature"),
        (["-f", "3"], "--layer"),
        (["-f", "3", "--no-model"], "its folder"),
        ([str(tmp_path / "none"), "-f", "3"], "no store"),
        ([str(folder), "-f", "3"], "--layer"),
        ([str(folder), "--layer", "5", "-f", "99999"], "0 to"),
        ([*words[1:], "--html", str(tmp_path / "page.html" / "below.html")], "can't write"),
        ([*words[1:], "--html", str(folder / "page.html")], "which is read"),
        ([*words[1:], "--html", str(tmp_path)], "is a folder"),
    ):
        assert main(["show", *bad]) == 2
        assert said in capsys.readouterr().err


def test_another_sae_is_refused(tmp_path: Path, store: FeatureStore) -> None:
    with pytest.raises(MismatchError):
        store.require(LAYER, lab_store.scope().saes[OTHER])


def test_the_table_of_statistics(store: FeatureStore, tmp_path: Path) -> None:
    assert export_statistics(store, tmp_path / "s.parquet") == sum(store.layer(layer).d_sae for layer in store.layers)
    table = pq.read_table(tmp_path / "s.parquet")
    here = table.filter(np.array(table["layer"]) == LAYER)
    assert here["frequency"].to_pylist() == store.stats(LAYER)["frequency"].to_pylist()
    export_statistics(store, tmp_path / "s.csv", [OTHER])
    assert len((tmp_path / "s.csv").read_text().splitlines()) == store.layer(OTHER).d_sae + 1
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        export_statistics(store, tmp_path / "s.xls")
    with pytest.raises(InputError, match="can't write"):
        export_statistics(store, tmp_path / "s.csv" / "t.csv")
    export_statistics(store, tmp_path / "new" / "s.csv", [OTHER])
    assert (tmp_path / "new" / "s.csv").read_bytes() == (tmp_path / "s.csv").read_bytes()


@pytest.mark.slow
def test_neuronpedia_gets_what_it_takes(tmp_path: Path) -> None:
    with FeatureStore(lab_store.copied(tmp_path)) as store:
        # Fires in about half of the documents, so that there are contexts of both kinds.
        half = int(np.argmin(np.abs(store.stats(LAYER)["documents"].to_numpy() - store.manifest.documents // 2)))
        label_features(store, [(LAYER, half)], TokenJudge())
        silent = np.flatnonzero(store.stats(LAYER)["tokens"].to_numpy() == 0)[:1].tolist()
        chosen = [half, *silent, *[f for f in range(140) if store.feature(LAYER, f).tokens]]
        chosen = list(dict.fromkeys(chosen))
        wanted = [f for f in chosen if f not in silent]
        by = Creator("user1", "us", "Qwen", layers=6, neurons=256)
        n = export_neuronpedia(
            store, LAYER, tmp_path / "np", model_id="lab", set_name="ours", creator=by, features=chosen, contexts=5
        )
        assert n == len(wanted)
        bodies = [json.loads(path.read_text()) for path in sorted((tmp_path / "np" / "upload").iterdir())]
        rows = [row for body in bodies for row in body["features"]]
        assert all(len(body["features"]) <= 128 and body["source"] == f"{LAYER}-ours" for body in bodies)
        assert {row["index"] for row in rows} == set(wanted)
        for row in rows:
            assert row["activations"]
            for one in row["activations"]:
                assert 1 <= len(one["tokens"]) == len(one["values"]) <= 1024
                assert one["quantileMin"] <= max(one["values"])
        first = next(row for row in rows if row["index"] == half)
        assert first["density"] == pytest.approx(store.feature(LAYER, half).frequency)
        assert first["explanations"][0]["methodName"] == "oai_token-act-pair"
        (scored,) = [json.loads(line) for line in (tmp_path / "np" / "labels.jsonl").read_text().splitlines()]
        assert scored["index"] == str(half)
        assert 0 <= scored["detection"]["estimate"] <= 1
        bulk = [
            json.loads(line)
            for path in sorted((tmp_path / "np" / "features").iterdir())
            for line in gzip.decompress(path.read_bytes()).splitlines()
        ]
        assert all(len(r["freq_hist_data_bar_values"]) == len(r["freq_hist_data_bar_heights"]) for r in bulk)
        for name in ("release", "model", "sourceset", "source"):
            json.loads((tmp_path / "np" / f"{name}.jsonl").read_text())
        with pytest.raises(InputError, match="is not empty"):
            export_neuronpedia(store, LAYER, tmp_path / "np", model_id="lab", set_name="ours")


@pytest.mark.slow
def test_delphi_gets_its_layout(store: FeatureStore, tmp_path: Path) -> None:
    """The layout as its reader takes it; tests/peers/run.sh delphi asks the reader itself."""
    n = export_delphi(store, tmp_path / "latents", layers=[LAYER], context=32, splits=3)
    width, rows = store.layer(LAYER).d_sae, store.manifest.tokens // 32
    where = tmp_path / "latents" / f"layers.{LAYER}"
    spans = sorted(tuple(map(int, path.stem.split("_"))) for path in where.glob("*.safetensors"))
    assert (spans[0][0], spans[-1][1]) == (0, width - 1)
    assert all(a[1] + 1 == b[0] for a, b in pairwise(spans))
    dense, total = np.zeros((rows * 32, width), np.float16), 0
    for start, end in spans:
        data = load_file(where / f"{start}_{end}.safetensors")
        row, position, feature = data["locations"].astype(np.int64).T
        dense[row * 32 + position, feature + start] = data["activations"]
        total += len(row)
        assert data["tokens"].shape == (rows, 32)
        assert data["locations"].dtype == np.uint16
    expected = np.zeros((store.manifest.tokens, width), np.float16)
    first = store.sql("SELECT first_token FROM documents ORDER BY document")["first_token"].to_numpy()
    for one in store.sql("SELECT * FROM activations WHERE layer = ?", [LAYER]).to_pylist():
        expected[first[one["document"]] + one["position"], one["feature"]] = one["value"]
    np.testing.assert_array_equal(dense, expected[: rows * 32])
    assert total == n
    assert json.loads((where / "config.json").read_text())["cache_ctx_len"] == 32
    assert json.loads((where / "config.json").read_text())["model_name"] == store.manifest.model
    export_delphi(store, tmp_path / "named", layers=[LAYER], context=32, splits=1, model_name="Qwen/Qwen3-1.7B")
    named = json.loads((tmp_path / "named" / f"layers.{LAYER}" / "config.json").read_text())
    assert named["model_name"] == "Qwen/Qwen3-1.7B"
    with pytest.raises(InputError, match="no row"):
        export_delphi(store, tmp_path / "other", context=10**7)


@pytest.mark.slow
def test_the_export_command(folder: Path, tmp_path: Path, capsys) -> None:
    base = ["export", str(folder), "--to"]
    assert main([*base, "statistics", "-o", str(tmp_path / "s.csv")]) == 0
    assert main([*base, "delphi", "-o", str(tmp_path / "d"), "--context", "64", "--model-name", "org/m", "--json"]) == 0
    assert '"model_name": "org/m"' in next((tmp_path / "d").glob("*/config.json")).read_text()
    named = ["--model-id", "lab", "--features", f"{LAYER}/0-5"]
    assert main([*base, "neuronpedia", "-o", str(tmp_path / "n"), *named]) == 0
    capsys.readouterr()
    for bad, said in (
        (["parquet", "-o", "x"], "--to is one of"),
        (["neuronpedia", "-o", str(tmp_path / "m")], "--model-id"),
        (["delphi", "-o", str(tmp_path / "d")], "is not empty"),
    ):
        assert main([*base, *bad]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [["--sae", "mine"], ["--model", "lab"], ["--k", "3"]])
def test_a_model_is_not_named_beside_no_model(folder: Path, capsys, ignored: list[str]) -> None:
    assert main(["show", str(folder), "--layer", str(LAYER), "-f", "3", "--no-model", *ignored]) == 2
    assert f"so {ignored[0]} would change nothing" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("always::qwen_scope.errors.QwenScopeWarning")
@pytest.mark.parametrize("asked", [["--label", "words"], ["--positive", "language=de"], ["--groups", "language"]])
def test_find_in_a_store_says_that_it_was_made_with_another_model(folder: Path, capsys, asked: list[str]) -> None:
    """These look in the store alone; a model beside it changes nothing, which is said where it is another."""
    assert main(["find", str(folder), *asked, "-n", "1", "--model", "google/gemma-2-2b"]) == 0
    said = capsys.readouterr().err
    assert "the store was made with lab, and the model is google/gemma-2-2b" in said
    assert main(["find", str(folder), *asked, "-n", "1", "--model", "lab"]) == 0
    assert "was made with" not in capsys.readouterr().err
