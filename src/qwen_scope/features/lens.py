"""The Jacobian lens: what a direction at a layer disposes the model to say, through all layers above and later tokens.

`J_l` is the mean Jacobian from the stream of layer l to that of the last block (arXiv 2607.15495): over prompts and
source tokens, summed over the source's own and all later target tokens. `unembed(norm(J_l d))` reads a direction.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import FormatError, InputError, NotFoundError, check_count, foreign
from qwen_scope.files import write_whole
from qwen_scope.model import PASS_TOKENS as BATCH_TOKENS
from qwen_scope.model import HookPoint, changing, final_norm, input_device, n_layers, reading
from qwen_scope.report import Progress
from qwen_scope.scope import Scope
from qwen_scope.text import token_text

from .effects import TokenEffect, vocabulary
from .lens_options import LensOptions

CLEARLY = 0.95
"""Of random directions, how many have to stand out less than a feature whose reading becomes words of a label."""


@dataclass(frozen=True, eq=False)
class Lens:
    """Mean Jacobians by layer.

    Attributes:
        jacobians: by layer, `(d_model, d_model)`, from that layer's stream to the last one.
        n_prompts: how many prompts they are the mean of; 0 where a file does not say.
    """

    jacobians: Mapping[int, Float[Tensor, "d_model d_model"]]
    n_prompts: int

    @property
    def layers(self) -> list[int]:
        """The layers that have one."""
        return sorted(self.jacobians)

    def check(self, scope: Scope) -> None:
        """Refuse a scope of another width; raises InputError."""
        size = next(iter(self.jacobians.values())).shape[0]
        if size != scope.d_model:
            raise InputError(f"the lens is for {size} dimensions, {scope.name} has {scope.d_model}")

    def transport(self, x: Float[Tensor, "*rows d_model"], layer: int) -> Float[Tensor, "*rows d_model"]:
        """`J_l x`, in fp32.

        Raises:
            NotFoundError: the lens has no such layer.
        """
        if layer not in self.jacobians:
            raise NotFoundError(f"the lens has no layer {layer}; it has layers {', '.join(map(str, self.layers))}")
        return x.float() @ self.jacobians[layer].to(x.device).float().T


def load_lens(path: str | os.PathLike[str]) -> Lens:
    """Read a lens as it is published: `{"J": {layer: (d, d)}}`, or the same under `parameters.jacobians`.

    Raises:
        NotFoundError: no such file.
        FormatError: it holds no square matrices of one size by layer, or something other than tensors and numbers.
    """
    source = Path(path)
    if not source.is_file():
        raise NotFoundError(f"there is no lens {str(source)!r}; qwen-scope lens fit makes one")
    with foreign(f"{source.name} can't be read as a lens", FormatError):
        data = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    found: Any = data.get("J") if isinstance(data, dict) else None
    if found is None and isinstance(data, dict) and isinstance(data.get("parameters"), dict):
        found = data["parameters"].get("jacobians")
    if not isinstance(found, dict) or not found:
        raise FormatError(f"{source.name} is no lens: it holds no matrices by layer under 'J'")
    sizes = {tuple(one.shape) if isinstance(one, Tensor) else None for one in found.values()}
    square = len(sizes) == 1 and all(size and len(size) == 2 and size[0] == size[1] for size in sizes)
    if not square or not all(_is_layer(layer) for layer in found):
        raise FormatError(f"{source.name} is no lens: 'J' has to hold one square matrix of one size for each layer")
    if not all(bool(one.isfinite().all()) for one in found.values()):
        raise FormatError(f"{source.name} is no lens: a matrix holds NaN or infinity")
    n_prompts = data.get("n_prompts", 0)
    return Lens({int(layer): one for layer, one in found.items()}, n_prompts if isinstance(n_prompts, int) else 0)


def save_lens(lens: Lens, path: str | os.PathLike[str]) -> None:
    """Write a lens as it is published, in fp16."""
    data = {"J": {layer: one.to(torch.float16) for layer, one in lens.jacobians.items()}, "n_prompts": lens.n_prompts}
    size = next(iter(lens.jacobians.values())).shape[0]
    with write_whole(path) as part:
        torch.save({**data, "source_layers": lens.layers, "d_model": size}, part)


def fit_lens(
    scope: Scope,
    prompts: Iterable[Sequence[int]],
    options: LensOptions | None = None,
    *,
    state: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Lens:
    """Average the Jacobians of prompts.

    Every prompt takes `d_model` backward passes, as many at once as `BATCH_TOKENS` allow. Source and target tokens are
    those behind the first `skip`, without those that do not count by their id.

    Args:
        prompts: token ids, in an order that is the same at every call; those too short are passed over.
        state: a file that keeps what is done, after every prompt; work goes on from there if it exists.

    Raises:
        InputError: no prompt is long enough, or the state is of another model, other prompts or options.
        NotFoundError: a layer that does not exist or is the last.
    """
    options = options or LensOptions()
    layers = _layers(scope, options)
    work = _Fit(scope, layers, options)
    known = Path(state) if state is not None else None
    if known is not None and known.is_file():
        work.resume(known)
    before = work.done
    digest = hashlib.sha256()
    taken = 0
    for ids in prompts:
        ids = list(ids[: options.length])
        if len(ids) < options.skip + 2:
            continue
        digest.update(repr(ids).encode())
        taken += 1
        if taken == before and digest.hexdigest() != work.seen:
            raise InputError(f"{known} was made of other prompts; name another file or delete it")
        if taken > before:
            work.add(ids, digest.hexdigest())
            if known is not None:
                work.save(known)
            if progress is not None:
                progress("lens", min(1.0, taken / options.prompts), f"{taken} prompts")
        if taken >= options.prompts:
            break
    if not work.done:
        raise InputError(f"no prompt has the {options.skip + 2} tokens that it takes behind the first {options.skip}")
    return work.lens()


class _Fit:
    """Sums of Jacobians so far."""

    def __init__(self, scope: Scope, layers: Sequence[int], options: LensOptions) -> None:
        self.scope, self.layers, self.options = scope, list(layers), options
        self.sums = {layer: torch.zeros(scope.d_model, scope.d_model) for layer in layers}
        self.done, self.seen = 0, ""
        self.made_of = {
            "model": scope.name, "d_model": scope.d_model, "layers": self.layers, "skip": options.skip,
            "length": options.length,
        }  # fmt: skip

    def add(self, ids: list[int], seen: str) -> None:
        valid = self._valid(ids)
        if bool(valid.any()):
            rows = max(1, BATCH_TOKENS // len(ids))
            for start in range(0, self.scope.d_model, rows):
                self._rows(ids, valid, range(start, min(self.scope.d_model, start + rows)))
        self.done, self.seen = self.done + 1, seen

    def _valid(self, ids: list[int]) -> Tensor:
        counts = self.scope.counted[self.scope.layers[0]].at(torch.tensor([ids]))[0]
        counts[: self.options.skip] = False
        return counts

    def _rows(self, ids: list[int], valid: Tensor, dimensions: range) -> None:
        """Some rows of every Jacobian, from one forward pass of copies of the prompt."""
        model, kept = self.scope.model, {}
        last = HookPoint(n_layers(model) - 1)
        lowest = HookPoint(min(self.layers))
        points = [HookPoint(layer) for layer in self.layers if layer != lowest.layer]
        tokens = torch.tensor(ids, device=input_device(model)).expand(len(dimensions), -1)

        def begin(h: Tensor, point: HookPoint) -> Tensor:
            kept[point] = h.detach().requires_grad_()
            return kept[point]

        readers = reading(model, [*points, last], kept.__setitem__)
        with torch.enable_grad(), changing(model, {lowest: begin}), readers:
            model(tokens, use_cache=False)
        where = valid.to(kept[last].device)
        at = torch.tensor(list(dimensions), device=where.device)
        wanted = kept[last][:, where].gather(-1, at[:, None, None].expand(-1, int(where.sum()), 1)).sum()
        if not wanted.requires_grad:
            raise InputError("the model gives no gradient, which a lens is made of: its kernels detach")
        with foreign("the model gives no gradient, which a lens is made of", InputError):
            found = torch.autograd.grad(wanted, [kept[HookPoint(layer)] for layer in self.layers])
        for layer, slopes in zip(self.layers, found, strict=True):
            self.sums[layer][dimensions.start : dimensions.stop] += slopes[:, where].float().mean(1).cpu()

    def lens(self) -> Lens:
        return Lens({layer: total / self.done for layer, total in self.sums.items()}, self.done)

    def save(self, path: Path) -> None:
        with write_whole(path) as part:
            torch.save({"sums": self.sums, "done": self.done, "seen": self.seen, "made_of": self.made_of}, part)

    def resume(self, path: Path) -> None:
        with foreign(f"{path.name} can't be read as the state of a lens", FormatError):
            data = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(data, dict) or {"sums", "done", "seen", "made_of"} - data.keys():
            raise FormatError(f"{path.name} is no state of a lens")
        if data["made_of"] != self.made_of:
            raise InputError(f"{path} is of another model or other options; name another file or delete it")
        self.sums, self.done, self.seen = data["sums"], int(data["done"]), str(data["seen"])


@dataclass(frozen=True)
class LensReading:
    """What a feature disposes the model to say.

    Attributes:
        promoted, demoted: tokens by their effect, strongest first, as in `token_effects`.
        peak: how many standard deviations over the vocabulary the strongest token lies above the mean.
        random_peaks: the same of directions drawn at random with the feature's length: the control.
        beaten: the share of those with a lower peak.
    """

    promoted: tuple[TokenEffect, ...]
    demoted: tuple[TokenEffect, ...]
    peak: float
    random_peaks: tuple[float, ...]
    beaten: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def lens_effects(
    scope: Scope, lens: Lens, layer: int, feature: int, n: int = 10, *, randoms: int = 100, seed: int = 0
) -> LensReading:
    """Read a feature's direction through the lens: `unembed(norm(J_l W_dec[:, i]))` less its mean over the vocabulary.

    Raises:
        InputError: a lens of another model, or no such feature.
        NotFoundError: the scope or the lens has no such layer.
    """
    check_count("n", n)
    check_count("randoms", randoms)
    sae = scope.saes[scope.check_layers([layer])[0]]
    check_count("a feature", feature, 0, sae.d_sae - 1)
    lens.check(scope)
    size = scope.d_model
    own = sae.W_dec[:, feature].float().cpu()
    drawn = torch.randn(randoms, size, generator=torch.Generator().manual_seed(seed))
    directions = torch.cat([own[None], torch.nn.functional.normalize(drawn, dim=-1) * own.norm()])
    moved = lens.transport(directions, layer)
    # a common length, so that the norm's epsilon weighs on all alike
    moved = torch.nn.functional.normalize(moved, dim=-1) * size**0.5
    norm, words = final_norm(scope.model), vocabulary(scope)
    weight = next(norm.parameters())
    with torch.no_grad():
        logits = norm(moved.to(weight.device, weight.dtype)).float() @ words.T
    effects = logits - logits.mean(-1, keepdim=True)
    peaks = (effects.max(-1).values / effects.std(-1)).cpu()
    ranked = effects[0].argsort(descending=True, stable=True)

    def told(ids: Tensor) -> tuple[TokenEffect, ...]:
        return tuple(TokenEffect(i, token_text(scope.tokenizer, i), float(effects[0, i])) for i in ids.tolist())

    beaten = float((peaks[1:] < peaks[0]).double().mean())
    return LensReading(told(ranked[:n]), told(ranked.flip(0)[:n]), float(peaks[0]), tuple(peaks[1:].tolist()), beaten)


def words_by_lens(scope: Scope, lens: Lens, n: int = 3) -> Callable[[int, int], tuple[str, ...]]:
    """By layer and feature the `n` tokens that the lens disposes the model to say; none where it has no such layer, or
    reads the feature no clearer than it reads random directions.

    Raises:
        InputError: a lens of another model.
    """
    lens.check(scope)

    def words(layer: int, feature: int) -> tuple[str, ...]:
        if layer not in lens.layers:
            return ()
        reading = lens_effects(scope, lens, layer, feature, n)
        return tuple(one.text for one in reading.promoted) if reading.beaten >= CLEARLY else ()

    return words


def _layers(scope: Scope, options: LensOptions) -> list[int]:
    last = scope.n_layers - 1
    wanted = sorted(set(range(last) if options.layers is None else options.layers))
    if not wanted or not all(0 <= layer < last for layer in wanted):
        raise NotFoundError(f"a lens leads to the last layer, {last}, from layers 0 to {last - 1}; name some of those")
    return wanted


def _is_layer(layer: Any) -> bool:
    return (isinstance(layer, int) and layer >= 0) or (isinstance(layer, str) and layer.isdigit())
