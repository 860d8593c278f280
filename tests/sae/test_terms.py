"""Qwen's terms stand beside its weights wherever they go, and are said once; nothing is said of others' SAEs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qwen_scope import catalog, load_sae, save_sae
from qwen_scope.cli import whose
from qwen_scope.cli.entry import told_notes
from qwen_scope.sae import LAYOUTS, Identity, terms_of

GROUP = "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"


def test_of_the_catalog_qwen_s_groups_have_terms() -> None:
    for group in (*catalog.groups(), *catalog.community()):
        assert (terms_of(group.name) is not None) is (group.by == "Qwen" and group.folder is None), group.name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_export_says_them_and_is_read_as_before(layout: str, tmp_path: Path) -> None:
    lab = load_sae("lab", layer=4)
    theirs = replace(lab, identity=Identity(GROUP, 4, lab.identity.fingerprint))
    save_sae(theirs, tmp_path / "q", layout=layout)
    (said,) = (tmp_path / "q").rglob("USAGE.txt")
    assert "safety" in said.read_text()
    assert load_sae(tmp_path / "q").identity == theirs.identity
    save_sae(lab, tmp_path / "lab", layout=layout)
    assert not list((tmp_path / "lab").rglob("USAGE.txt"))


def test_they_are_said_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("qwen_scope.sae.terms._TOLD", set())
    lab = load_sae("lab", layer=4)
    save_sae(replace(lab, identity=Identity(GROUP, 4, lab.identity.fingerprint)), tmp_path / "q")
    with told_notes():
        load_sae(tmp_path / "q")
        tell(capsys)


def tell(capsys: pytest.CaptureFixture[str]) -> None:
    """Once, whatever was loaded and named since."""
    for source in (GROUP, f"Qwen/{GROUP}", f"/data/{GROUP}/", "SAE-Res-Lab-W2K-L0_40"):
        whose.say_terms(source)
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert "safety behaviour" in err
