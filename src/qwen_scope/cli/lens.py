"""`qwen-scope lens`: the Jacobian lens, which reads what a direction disposes a model to say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen_scope.features import LensOptions
from qwen_scope.scope import ScopeOptions
from qwen_scope.text import CorpusOptions

from . import options, output
from .commands import App
from .groups import OPTIONS, PARAGRAPHS, Read, grouped

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.text import Corpus

app = App(
    help="The Jacobian lens: what a feature disposes a model to say, later layers included.", no_args_is_help=True
)

SCOPE, LENS = ScopeOptions(), LensOptions()

OPTIONS[LensOptions] = {
    "prompts": Annotated[int, typer.Option("--prompts", help="How many documents are averaged.", min=1)],
    "length": Annotated[int, typer.Option("--length", help="Tokens of each at most.", min=2)],
    "skip": Annotated[int, typer.Option("--skip", help="Tokens at the beginning of each that are left out.", min=0)],
    "layers": Annotated[
        str | None,
        typer.Option("--layers", "--layer", help="Layers, such as 3 or 0,2-5. Default: all but the last."),
        Read(options.layers_tuple),
    ],
}


@app.command()
@grouped
def fit(
    source: options.Documents,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, such as lens.pt.")],
    asked: ScopeOptions = SCOPE,
    reading: CorpusOptions = PARAGRAPHS,
    how: LensOptions = LENS,
    as_json: options.Json = False,
) -> None:
    """Average the Jacobian from each layer to the last over a corpus, in the file format that is published.

    Stopped in whatever way, the same command goes on where it was: what is done stands beside, in OUT.state. Read a
    feature through it with: qwen-scope show --feature LAYER/FEATURE --lens OUT
    """
    from qwen_scope.features import fit_lens, save_lens
    from qwen_scope.files import check_output

    check_output(out, *options.files(source), *options.folders_of(asked), endings=(".pt",))
    corpus = options.read(source, reading)
    scope = options.open_asked(asked)
    state = out.with_name(f"{out.name}.state")
    out.parent.mkdir(parents=True, exist_ok=True)
    with output.progress() as bar:
        lens = fit_lens(scope, prompts(scope, corpus, reading), how, state=state, progress=bar)
    save_lens(lens, out)
    state.unlink(missing_ok=True)
    if as_json:
        output.print_json({"lens": str(out), "layers": lens.layers, "prompts": lens.n_prompts})
    else:
        layers = ", ".join(map(str, lens.layers))
        output.console().print(f"{out}: layers {layers}, averaged over {lens.n_prompts} prompts.", soft_wrap=True)


def prompts(scope: Scope, corpus: Corpus, reading: CorpusOptions) -> Iterator[list[int]]:
    """The tokens of every document."""
    for document in corpus:
        found = scope.tokenize([document.text], chat=reading.chat, truncate=True)
        yield found.input_ids[0].tolist()
