"""The explorer under the flags of the official demo; `qwen-scope explore` has more.

python app.py --model Qwen/Qwen3-8B --sae-path Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50
"""

from __future__ import annotations

import argparse
import sys

from qwen_scope.errors import MismatchError, QwenScopeError


def main(argv: list[str] | None = None) -> int:
    """Serve the page; 2 with one sentence where the flags and the weights contradict each other."""
    given = parser().parse_args(argv)
    try:
        state = opened(given)
        state.warm()
        from qwen_scope.explorer import launch

        page, url = launch(state, port=given.server_port, block=False)
    except QwenScopeError as error:
        sys.stderr.write(f"app.py: {error}\n")
        return 2
    sys.stdout.write(f"The explorer is at {url} (stop it with Ctrl-C)\n")
    page.block_thread()
    return 0


def parser() -> argparse.ArgumentParser:
    """The official demo's flags. Shapes are read from the weights; a flag that says otherwise is an error."""
    made = argparse.ArgumentParser(description="The explorer, under the flags of the official demo.")
    made.add_argument("--model", default="lab", help="Hub id or folder of the language model (default: the lab)")
    made.add_argument("--model-name-sae-trained-from", help="shown in the header")
    made.add_argument("--model-name-analyzing-now", help="shown in the header")
    made.add_argument("--sae-path", help="folder or Hub id of the SAEs (default: those of the model)")
    made.add_argument("--top-k", type=int, help="features active per token, which the weights also say")
    made.add_argument("--num-layers", type=int, help="layers with an SAE, which the weights also say")
    made.add_argument("--sae-width", type=int, help="features of an SAE, which the weights also say")
    made.add_argument("--d-model", type=int, help="dimensions of the residual stream, which the weights also say")
    made.add_argument("--sae-cache-max", type=int, default=8, help="memory for SAEs, in SAEs of this size (default: 8)")
    made.add_argument("--server-port", type=int, default=7860, help="default: 7860")
    return made


def opened(given: argparse.Namespace):
    """The state for these flags.

    Raises:
        MismatchError: a flag contradicts the weights.
    """
    from transformers.utils import logging

    from qwen_scope.explorer import AppState
    from qwen_scope.scope import load_scope

    logging.disable_progress_bar()
    scope = load_scope(given.model, given.sae_path, k=given.top_k)
    sae = scope.saes[scope.layers[0]]
    for flag, said, found in (
        ("--d-model", given.d_model, scope.d_model),
        ("--sae-width", given.sae_width, sae.d_sae),
        ("--num-layers", given.num_layers, len(scope.layers)),
        ("--top-k", given.top_k, sae.k),
    ):
        if said is not None and said != found:
            raise MismatchError(f"{flag} says {said}, the weights say {found}; leave it out, or name other weights")
    if given.sae_cache_max < 1:
        raise MismatchError(f"--sae-cache-max is at least 1, not {given.sae_cache_max}")
    scope.saes.cache_bytes = given.sae_cache_max * sae.nbytes
    return AppState(scope, model_name=given.model_name_analyzing_now, trained_from=given.model_name_sae_trained_from)


if __name__ == "__main__":
    sys.exit(main())
