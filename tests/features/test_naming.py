"""What features are called: by labels beside the SAEs, by those of a file, and shown beside numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qwen_scope import FeatureStore, load_scope
from qwen_scope.cli import main
from qwen_scope.errors import InputError, MismatchError
from qwen_scope.features import Label, LabelOptions, Notes, feature_page, labels_from, labels_of, make_label, names_of
from qwen_scope.features.naming import beside
from qwen_scope.features.wording import _parsed
from qwen_scope.foundry import NamingConfig, name_features
from qwen_scope.sae import catalog
from qwen_scope.stats import Interval

SURE, CHANCE = Interval(0.9, 0.8, 1.0, 20), Interval(0.5, 0.4, 0.6, 20)


def written(path: Path, *entries: tuple[int, int, str, Label]) -> Path:
    lines = [make_label(layer, feature, fingerprint, label).to_line() for layer, feature, fingerprint, label in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The lab's SAEs in a folder of their own."""
    group = catalog.find("lab")
    assert group.folder is not None
    return Path(shutil.copytree(group.folder, tmp_path / group.name, ignore=shutil.ignore_patterns("labels.jsonl")))


def test_labels_beside_the_saes_name_features_everywhere(folder: Path, tmp_path: Path, capsys) -> None:
    scope = load_scope("lab", sae=str(folder), device="cpu")
    assert names_of(scope)(4, 3) == "", "no file, no names"
    seen = scope.features(["Guten Morgen"], [4]).of(0, 4)
    feature = int(seen.indices[-1, 0])
    fingerprint = scope.saes[4].identity.fingerprint
    label = Label("German text", SURE, SURE, "summary", "rules")
    written(
        folder / "labels.jsonl",
        (4, feature, fingerprint, label),
        (4, 3, fingerprint, Label("x", CHANCE, CHANCE, "summary", "rules")),
    )
    assert labels_of(scope)(4, feature) == label
    assert labels_of(scope)(2, feature) is None, "another layer is another SAE"
    assert names_of(scope)(4, feature) == "German text (0.90)"
    assert names_of(scope)(4, 3) == "[at chance] x (0.50)"
    sae = ["--sae", str(folder)]
    assert main(["features", "Guten Morgen", "--layers", "4", *sae]) == 0
    assert "German text (0.90)" in capsys.readouterr().out
    assert main(["compare", "Guten Morgen, wo ist der Bahnhof?", "the", "--layers", "4", "--top", "2000", *sae]) == 0
    assert "German text (0.90)" in capsys.readouterr().out
    assert main(["why", "Guten Morgen, wo ist", "--layers", "4", "--exact", "0", "--json", *sae]) == 0
    assert '"clerp": "' in capsys.readouterr().out


def test_the_page_of_a_feature_has_the_label_that_lies_beside_the_saes(folder: Path, tmp_path: Path, capsys) -> None:
    scope = load_scope("lab", sae=str(folder), device="cpu")
    assert feature_page(2, 7, scope=scope).label is None, "no file, no label"
    fingerprint = scope.saes[2].identity.fingerprint
    label, better = (Label(text, SURE, SURE, "summary", "rules") for text in ("beside the SAEs", "of the store"))
    written(folder / "labels.jsonl", (2, 7, fingerprint, label))
    assert feature_page(2, 7, scope=scope).label == label
    assert labels_of(load_scope("lab", sae=str(folder / "layer2.sae.pt"), device="cpu"))(2, 7) == label, "of one file"
    store = tmp_path / "store"
    assert main(["extract", "lab", "-o", str(store), "--layers", "2", "--sample", "20", "--sae", str(folder)]) == 0
    with FeatureStore(store) as opened:
        assert feature_page(2, 7, store=opened, scope=scope).label == label
        assert feature_page(2, 7, store=opened).label == label
        assert feature_page(2, 8, store=opened).label is None
        Notes(opened).add(make_label(2, 7, fingerprint, better))
        assert feature_page(2, 7, store=opened).label == feature_page(2, 7, store=opened, scope=scope).label == better
    capsys.readouterr()
    assert main(["show", "--feature", "2/7", "--sae", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "feature 7: beside the SAEs (0.90)" in printed
    assert "detection 0.9" in printed
    assert main(["card", str(store), "2/7", "--json"]) == 0
    assert '"of the store"' in capsys.readouterr().out


def test_a_file_about_other_saes_is_refused(folder: Path, tmp_path: Path) -> None:
    scope = load_scope("lab", sae=str(folder), device="cpu")
    other = written(tmp_path / "other.jsonl", (4, 3, "0" * 64, Label("x", SURE, SURE, "summary", "rules")))
    with pytest.raises(MismatchError, match="no label in"):
        names_of(scope, other)
    shutil.copy(other, folder / "labels.jsonl")
    assert names_of(scope)(4, 3) == "", "labels that came with a folder and fit nothing name nothing"


def test_the_lab_ships_names_that_beat_those_of_other_features() -> None:
    scope = load_scope("lab", device="cpu")
    file = beside(scope.saes.source)
    assert file is not None
    known = labels_from(file)
    assert len(known) >= 300
    fingerprints = {scope.saes[layer].identity.fingerprint for layer in scope.layers}
    for (fingerprint, feature), label in known.items():
        assert fingerprint in fingerprints
        assert 0 <= feature < scope.saes[0].d_sae
        assert label.random is not None
        assert label.detection.low > label.random.high, label.text
        assert _parsed(label.text) is not None, "what a name says can be checked"


@pytest.mark.slow
def test_the_lab_names_its_features_by_the_labeller_of_any_model(tmp_path: Path) -> None:
    scope = load_scope("lab", device="cpu")
    small = NamingConfig(n_documents=80, features=14, fires_in=16, others=3, label=LabelOptions(examples=8, tests=6))
    out = tmp_path / "labels.jsonl"
    found = name_features(scope, out, small)
    known = labels_from(out) if out.exists() else {}
    assert sum(found.values()) == len(known) > 0
    assert all(not one.at_chance and one.random is not None for one in known.values())
    with pytest.raises(InputError, match="it exists"):
        name_features(scope, out, small)
