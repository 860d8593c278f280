"""What every sparse autoencoder of this package can do, and how it is told apart from others."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.errors import InputError, MismatchError

from .acts import FeatureActs
from .formats.sae_lens_config import sae_lens_object

SAMPLED_BLOCKS, BLOCK = 4, 32
# Weights are checked in pieces of this many numbers.
FINITE_NUMBERS = 2**22


@dataclass(frozen=True)
class Identity:
    """Which SAE this is: its group (one released set), its layer, and a fingerprint of its original weights.

    Conversion keeps all three, so a bf16 copy of an SAE is still the same SAE.
    """

    group: str
    layer: int | None
    fingerprint: str

    def __str__(self) -> str:
        return f"{self.group} layer {'?' if self.layer is None else self.layer} ({self.fingerprint[:12]})"


UNNAMED = Identity("unnamed", None, "")


class SAE(ABC):
    """A sparse autoencoder on one hook point: encoder, decoder, and where it belongs.

    An interface: the concrete classes (`TopK`, `JumpReLU`) are frozen dataclasses that hold the tensors below.
    Arithmetic is fp32 whatever type the matrices are stored in, so a type only chooses memory. Biases and thresholds
    are always kept in fp32: they are small, and rounding them would move every activation.

    A concrete class says as class attributes how files keep it:
        architecture: the name under which files know it, such as `topk`.
        own: the names of its tensors beside the four below, each a vector `(d_sae,)` and a field of the class.
        fixed_k: whether every token has the same number of active features, given to the class as `k`.

    Attributes:
        W_enc: `(d_sae, d_model)`.   W_dec: `(d_model, d_sae)`.   b_enc: `(d_sae,)`.   b_dec: `(d_model,)`.
        k: the number of features active per token, or None where it varies.
        hook_point: where the residual is read, such as `layers.12.resid_post`, or None if the files don't say.
        identity: group, layer and fingerprint.
        meta: everything else the files say, as plain data.
    """

    architecture: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()
    fixed_k: ClassVar[bool] = False

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    k: int | None
    hook_point: str | None
    identity: Identity
    meta: Mapping[str, Any]
    _finite: set[str]

    def check_finite(self, name: str) -> None:
        """Refuse weights that hold NaN or infinity; looked through once for each object, at their first use.

        Opening a file stays cheap that way: its matrices are memory-mapped and have not been read.

        Raises:
            InputError: the tensor called `name`, such as `W_dec`, is not finite.
        """
        if name not in self._finite:
            check_finite_weights(name, getattr(self, name))
            self._finite.add(name)

    @abstractmethod
    def pre_acts(
        self, x: Float[Tensor, "*rows d_model"], features: Sequence[int] | Tensor | None = None
    ) -> Float[Tensor, "*rows n"]:
        """Pre-activations `x @ W_enc.T + b_enc` in fp32, of all features or of those named. Differentiable in `x`."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "*rows d_model"]) -> FeatureActs:
        """The active features of each residual. No gradient flows; `pre_acts` is the differentiable way in.

        Raises:
            MismatchError: `x` is not `d_model` wide.
            InputError: a residual, `W_enc` or a pre-activation that decides the answer is not finite.
        """

    @abstractmethod
    def decode(self, acts: FeatureActs) -> Float[Tensor, "*rows d_model"]:
        """The reconstruction `W_dec a + b_dec` in fp32.

        Raises:
            MismatchError: `acts` come from a dictionary of another width.
            InputError: `W_dec` is not finite.
        """

    @abstractmethod
    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE (same identity) on another device or with its matrices stored in another type."""

    def by_feature(self) -> SAE:
        """The same SAE with its decoder feature by feature in memory, once turned over: equal answers.

        The gradient of `decode` in the activations, and decoding of few rows, read a feature's column in one piece
        there instead of turning the decoder over at every call. As many bytes as before; files keep their layout.
        """
        return replace(cast(Any, self), W_dec=self.W_dec.T.contiguous().T)

    @classmethod
    def problem(cls, tensors: Mapping[str, Tensor]) -> str | None:
        """What is wrong with the values of tensors `own` that came from a file, as a clause; None if nothing is."""
        return None

    def to_sae_lens(self) -> Any:
        """A copy as an SAE of sae_lens, in memory, in fp32: for what other tools do with one of those.

        `encode` there gives the same features as a dense row; an SAE without a layer is called layer 0.

        Raises:
            NotFoundError: sae_lens is not installed.   FormatError: this version of it does not take the SAE.
        """
        return sae_lens_object(self)

    def own_tensors(self) -> dict[str, Tensor]:
        """The tensors of this architecture beside the four that every SAE has."""
        return {name: getattr(self, name) for name in self.own}

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """The width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """The type the matrices are stored in."""
        return self.W_enc.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, and of what was made of them so that encoding is fast."""
        tensors = (self.W_enc, self.W_dec, self.b_enc, self.b_dec, *self.own_tensors().values())
        return sum(t.numel() * t.element_size() for t in tensors) + self.cached_bytes

    @property
    def cached_bytes(self) -> int:
        """Bytes that are kept beside the weights."""
        return 0

    def __str__(self) -> str:
        kind = f"{self.architecture}, k={self.k}" if self.k else self.architecture
        rounded = self.meta.get("rounded", {}).get(self.hook_point or "")
        said = f", rounded to 8 bits from {rounded[:12]}" if isinstance(rounded, str) else ""
        return f"{self.identity}: {kind}, {self.d_sae} features of {self.d_model} dimensions, {self.dtype}{said}"


def check_weights(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
    """Raise MismatchError unless the four tensors have the shapes of one SAE, on one device."""
    shapes = {"W_enc": tuple(W_enc.shape), "W_dec": tuple(W_dec.shape)}
    shapes |= {"b_enc": tuple(b_enc.shape), "b_dec": tuple(b_dec.shape)}
    if len(shapes["b_enc"]) != 1 or len(shapes["b_dec"]) != 1:
        raise MismatchError(f"biases must be vectors, got b_enc {shapes['b_enc']} and b_dec {shapes['b_dec']}")
    d_sae, d_model = len(b_enc), len(b_dec)
    if shapes["W_enc"] != (d_sae, d_model) or shapes["W_dec"] != (d_model, d_sae):
        transposed = shapes["W_enc"] == (d_model, d_sae) and shapes["W_dec"] == (d_sae, d_model) and d_sae != d_model
        hint = "; both matrices look transposed" if transposed else ""
        raise MismatchError(
            f"with b_enc {shapes['b_enc']} and b_dec {shapes['b_dec']}, W_enc must be {(d_sae, d_model)} and W_dec "
            f"{(d_model, d_sae)}, got {shapes['W_enc']} and {shapes['W_dec']}{hint}"
        )


def check_residual(x: Tensor, d_model: int) -> None:
    """Raise MismatchError unless the last dimension of `x` is `d_model`."""
    if x.ndim == 0 or x.shape[-1] != d_model:
        raise MismatchError(f"the SAE reads residuals of {d_model} dimensions, got a tensor of shape {tuple(x.shape)}")


def check_finite(acts: FeatureActs, x: Tensor, sae: SAE) -> FeatureActs:
    """Return `acts` of the residuals `x`, or raise InputError if one of either is NaN or infinite.

    NaN sorts first, so none can hide among the activations; a residual of minus infinity could hide behind ReLU.
    """
    rows = x.reshape(-1, x.shape[-1])
    bad = ~(acts.values.isfinite().all(-1).flatten() & rows.isfinite().all(-1).to(acts.values.device))
    if not bad.any():
        return acts
    row = int(bad.nonzero()[0])
    at = f" at {sae.hook_point}" if sae.hook_point else ""
    why = "they overflow fp32"
    if not rows[row].isfinite().all():
        why = (
            "the residual holds NaN or infinity, so the model overflows or its weights are damaged; load the model"
            " with dtype bfloat16 or float32"
        )
    raise InputError(f"row {row} has pre-activations that are not finite{at}: {why}")


def check_finite_weights(name: str, tensor: Tensor) -> None:
    """Raise InputError if a tensor of weights holds NaN or infinity; one read of it, and no copy.

    A sum is finite wherever all its terms are and it does not overflow, so only odd sums are looked into.
    """
    if tensor.device.type == "meta":
        return
    stored = tensor.detach()
    turned = stored.ndim == 2 and not stored.is_contiguous() and stored.T.is_contiguous()
    pieces = (stored.T if turned else stored).split(max(1, FINITE_NUMBERS // max(1, stored[0].numel())))
    if all(bool(piece.sum(dtype=torch.float32).isfinite()) or bool(piece.isfinite().all()) for piece in pieces):
        return
    where = (~stored.isfinite()).nonzero()[0].tolist()
    hint = "; numbers above 65504 do not fit float16" if tensor.dtype == torch.float16 else ""
    raise InputError(f"the SAE's {name} is not finite: it holds NaN or infinity, first at {where}{hint}")


def check_features(features: Sequence[int] | Tensor, d_sae: int, device: torch.device) -> Tensor:
    """The features as a long tensor; raises InputError if one is outside `[0, d_sae)`."""
    wanted = torch.as_tensor(features, dtype=torch.long, device=device)
    bad = wanted[(wanted < 0) | (wanted >= d_sae)]
    if bad.numel():
        raise InputError(f"feature {int(bad.flatten()[0])} does not exist: this SAE has features 0 to {d_sae - 1}")
    return wanted


def fingerprint(W_enc: Tensor, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, **own: Tensor) -> str:
    """SHA-256 over the shapes, square blocks along the diagonal of both matrices, and all vectors, as fp32.

    The tensors of an architecture's own, such as `threshold`, follow in the order of their names.

    A function of the values alone, whichever way a matrix lies in memory. The blocks keep the opening of a
    memory-mapped file cheap in either orientation; two trainings never agree on them.
    """
    digest = hashlib.sha256(repr([tuple(t.shape) for t in (W_enc, W_dec)]).encode())
    blocks = [block for matrix in (W_enc, W_dec) for block in diagonal_blocks(matrix)]
    for values in (*blocks, b_enc, b_dec, *(own[name] for name in sorted(own))):
        digest.update(values.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def diagonal_blocks(matrix: Tensor) -> Iterator[Tensor]:
    """`SAMPLED_BLOCKS` blocks of at most `BLOCK x BLOCK` entries, evenly spaced from the first corner to the last."""
    for i in range(SAMPLED_BLOCKS):
        top, left = ((n - min(n, BLOCK)) * i // (SAMPLED_BLOCKS - 1) for n in matrix.shape)
        yield matrix[top : top + BLOCK, left : left + BLOCK]
