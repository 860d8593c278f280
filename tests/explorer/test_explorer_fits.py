"""What the page takes from inside Gradio is listed in one place, and a Gradio without it is one sentence."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path

import gradio as gr
import pytest

from qwen_scope.errors import MismatchError
from qwen_scope.explorer.access import fits

EXPLORER = Path(fits.__file__).parent


@pytest.fixture
def page() -> Iterator[gr.Blocks]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the event loop that every page leaves to the garbage collector
        with gr.Blocks() as made:
            pass
        yield made.queue()
        del made
        gc.collect()


def test_the_installed_gradio_fits(page: gr.Blocks) -> None:
    fits.check_gradio(page)


@pytest.mark.parametrize("name", fits.INSIDE["page"])
def test_a_gradio_that_lacks_something_is_one_sentence(name: str, page: gr.Blocks) -> None:
    owner, _, last = name.rpartition(".")
    place = attrgetter(owner)(page) if owner else page

    class Without(type(place)):
        def __getattribute__(self, asked: str) -> object:
            if asked == last:
                raise AttributeError(asked)
            return super().__getattribute__(asked)

    place.__class__ = Without
    with pytest.raises(MismatchError) as error:
        fits.check_gradio(page)
    said = str(error.value)
    assert f"does not fit Gradio {gr.__version__}, which lacks {name} of page" in said
    assert re.search(r"pip install 'gradio[<>=,.0-9]+'", said)
    assert "\n" not in said


def test_every_private_name_that_is_used_is_listed() -> None:
    listed = {part for names in fits.INSIDE.values() for name in names for part in name.split(".")}
    for path in EXPLORER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        used = set(re.findall(r"\b(?:event|page|queue|queues|_page|_queue)\.(_\w+)", text))
        assert used <= listed, path.name
