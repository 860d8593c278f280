"""The real text is the one that was chosen, and carries its licence."""

from __future__ import annotations

import hashlib
from importlib import resources

from qwen_scope import lab
from qwen_scope.lab.real import blocks

REAL = resources.files("qwen_scope.lab") / "real"


def test_the_bytes_are_the_recorded_ones():
    sums = dict(reversed(line.split("  ")) for line in (REAL / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {"code.txt", "prose.txt", "LICENSE-PSF.txt"}
    for name, expected in sums.items():
        assert hashlib.sha256((REAL / name).read_bytes()).hexdigest() == expected


def test_the_licence_and_the_changes_are_stated():
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in (REAL / "LICENSE-PSF.txt").read_text()
    assert "Changes against the originals" in (REAL / "README.md").read_text()


def test_blocks_make_up_the_text():
    for kind, least in (("code", 380_000), ("prose", 140_000)):
        text = (REAL / f"{kind}.txt").read_text(encoding="utf-8")
        assert "".join(blocks(kind)) == text
        assert len(text) > least
        for document in lab.documents(n=20, kinds=[kind]):
            assert document.text in text
