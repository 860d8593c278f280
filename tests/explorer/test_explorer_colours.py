"""The page's colours, as people with the three kinds of colour blindness see them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from qwen_scope.explorer.look.theme import COLOURS

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SEEN = {
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
    "none": np.eye(3).tolist(),
}
# sRGB to XYZ (IEC 61966-2-1), D65.
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
LIGHT, DARK = 0, 1


def linear(name: str, scheme: int) -> np.ndarray:
    """A colour of the theme as linear RGB."""
    shown = np.array([int(COLOURS[name][scheme][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(shown <= 0.04045, shown / 12.92, ((shown + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of linear RGB."""
    t = XYZ @ np.clip(rgb, 0, 1) / (XYZ @ np.ones(3))
    x, y, z = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def apart(one: str, other: str, scheme: int, kind: str) -> float:
    """How far two colours of the theme are apart (CIE 1976) in the eyes of that kind; 2.3 can just be told apart."""
    first, second = (lab(np.array(SEEN[kind]) @ linear(name, scheme)) for name in (one, other))
    return float(np.linalg.norm(first - second))


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_what_colour_tells_apart_everybody_can(kind: str, scheme: int) -> None:
    meanings = ("heat", "prob", "changed", "sunken")
    for one, other in (("side-a", "side-b"), ("accent", "quiet"), *combinations(meanings, 2)):
        assert apart(one, other, scheme, kind) > 15, (one, other)


def test_the_measure_can_fail() -> None:
    """Red and green, which this theme does not use, come near each other for two of the kinds."""
    red, green = np.array([0.35, 0.02, 0.02]), np.array([0.06, 0.14, 0.02])
    near = [float(np.linalg.norm(lab(m @ red) - lab(m @ green))) for m in map(np.array, SEEN.values())]
    assert min(near[:2]) < 0.5 * near[3]


@pytest.mark.parametrize("kind", SEEN)
@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_strength_is_lightness(kind: str, scheme: int) -> None:
    """A stronger shade is darker than a weaker one in the light theme and lighter in the dark one."""
    seen = np.array(SEEN[kind])
    for meaning in ("heat", "prob", "changed"):
        weak, strong = (lab(seen @ linear(name, scheme))[0] for name in ("sunken", meaning))
        assert abs(strong - weak) > 15
        assert (strong < weak) == (scheme == LIGHT)


@pytest.mark.parametrize("scheme", [LIGHT, DARK])
def test_text_can_be_read(scheme: int) -> None:
    """WCAG 2: text has a contrast of 4.5 with what it stands on."""
    pairs = [("ink", "paper"), ("ink", "surface"), ("ink", "sunken"), ("quiet", "paper"), ("quiet", "surface")]
    pairs += [("on-accent", "accent"), ("wrong", "surface"), ("accent", "surface"), ("quiet", "sunken")]
    pairs += [("surface", side) for side in ("side-a", "side-b")]
    pairs += [("ink", shade) for shade in ("heat", "prob", "changed")]
    for text, ground in pairs:
        bright = sorted(float(XYZ[1] @ linear(name, scheme)) for name in (text, ground))
        assert (bright[1] + 0.05) / (bright[0] + 0.05) >= 4.5, (text, ground)
