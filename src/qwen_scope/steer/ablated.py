"""A model without a direction: ablation as a change of weights, for runtimes that know nothing of steering."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import chain

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwen_scope.errors import FormatError, InputError, MismatchError
from qwen_scope.model import (
    HookPoint,
    Writer,
    capture,
    d_model,
    embedding_writer,
    n_layers,
    norms_parts,
    part_writers,
    text_config,
)

from .change import Change
from .control_vector import spoken
from .intervention import Intervention

PARTS = ("attn_out", "mlp_out")

# What may be left of the direction, as a share of the residual's length, in the tokens that are tried.
LEFT, ROUNDINGS, TRIED = 1e-4, 2.0, 64


def check_ablated(interventions: Sequence[Intervention]) -> None:
    """Refuse what weights can't express, as far as that shows without the model.

    Raises:
        InputError: the sentence names the first such intervention.
    """
    streams = {one.hook_point.stream for one in interventions}
    for one in interventions:
        if one.op != "ablate":
            why = "weights can only lose a direction; export a control vector, or steer with this toolkit"
        elif one.feature is not None:
            why = "that depends on the activations of its SAE; ablate a direction, such as the feature's decoder column"
        elif one.amount != 1:
            why = f"a direction is removed as a whole, not by a share of {one.amount:g}"
        elif not one.where.everywhere:
            why = f"weights are the same at all tokens, not only at {str(one.where)!r}; use where 'all'"
        elif one.hook_point.stream == "resid_post" and len(streams) > 1:
            why = "what is removed from a whole stream is removed from its parts too; leave attn_out and mlp_out away"
        else:
            continue
        raise InputError(f"an ablated checkpoint can't express the {spoken(one)}: {why}")


@torch.no_grad()
def ablated(model: PreTrainedModel, interventions: Sequence[Intervention]) -> PreTrainedModel:
    """The model with directions removed from what its weights write to the residual stream.

    With `U` an orthonormal basis of the directions, every matrix `W` and bias `b` whose product is added to the stream
    becomes `W - U^T U W` and `b - U^T U b`. Two kinds of recipes can be said that way:

    - directions ablated at `attn_out` and `mlp_out` of any layers: the same function, up to rounding;
    - the same directions ablated at the output of every layer: the embedding and every part of every block lose them.
      The stream then never holds them, while the recipe removes them where a block ends: there block 0 still reads
      them in the embedding, and each MLP in what the attention of its block wrote.

    The model itself stays as it is, and the result shares all other weights with it. An embedding that is also the LM
    head is untied: the head keeps its weight.

    Raises:
        InputError: an intervention that weights can't express, by name; weights that are quantised or offloaded; or a
            family that norms what its parts write before it is added (Gemma 2 and 3).
        NotFoundError: a layer that the model does not have, or a part whose writing weights are not known.
        MismatchError: a direction of another width than the stream.
        FormatError: afterwards the stream still holds the direction: this architecture has other weights that write.
    """
    check_ablated(interventions)
    bases = _bases(model, interventions)
    whole = next(iter(bases)).stream == "resid_post"
    writers: list[tuple[Writer, Tensor]] = []
    for point, basis in bases.items():
        places = [HookPoint(point.layer, part) for part in PARTS] if whole else [point]
        writers += [(one, basis) for place in places for one in part_writers(model, place)]
    if whole:
        writers.append((embedding_writer(model), bases[HookPoint(0)]))
    changed = _sharing(model)
    if whole:
        _untie(changed)
    for one, basis in writers:
        place, _, name = one.name.rpartition(".")
        weight = model.get_parameter(one.name)
        setattr(changed.get_submodule(place), name, nn.Parameter(_without(weight, basis, one.dim), requires_grad=False))
    _try(changed, bases)
    return changed


def _bases(model: nn.Module, interventions: Sequence[Intervention]) -> dict[HookPoint, Float[Tensor, "m d_model"]]:
    """By hook point, an orthonormal basis of what is removed there."""
    n, width = n_layers(model), d_model(model)
    at: dict[HookPoint, list[Intervention]] = {}
    for one in interventions:
        assert one.direction is not None
        if len(one.direction) != width:
            raise MismatchError(f"a direction of {len(one.direction)} numbers does not fit a residual of {width}")
        at.setdefault(one.hook_point, []).append(one)
    if any(point.stream == "resid_post" for point in at):
        kept = [layer for layer in range(n) if HookPoint(layer) not in at]
        same = {frozenset(one.direction for one in here) for here in at.values()}
        if kept or len(same) > 1:
            what = f"layers {', '.join(map(str, kept))} are left out" if kept else "the layers have different ones"
            raise InputError(
                f"an ablated checkpoint can't express the {spoken(interventions[0])}: weights lose a direction at the"
                f" outputs of all layers or of none, and {what}; ablate the same directions at layers 0 to {n - 1}, or"
                " at attn_out and mlp_out of single layers"
            )
        if any(norms_parts(model, layer) for layer in range(n)):
            raise InputError(
                f"an ablated checkpoint can't express the {spoken(interventions[0])}: {type(model).__name__} norms what"
                " attention and MLP write before it is added, which no weight can make up for; steer with this toolkit"
            )
    return {point: _basis(here) for point, here in sorted(at.items())}


def _basis(gone: Sequence[Intervention]) -> Float[Tensor, "m d_model"]:
    basis = Change.of(gone, None, torch.device("cpu"), torch.float32).basis
    assert basis is not None
    return basis


def _sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Modules and config of their own, on the same weights and buffers."""
    return deepcopy(model, {id(one): one for one in chain(model.parameters(), model.buffers())})


def _untie(model: PreTrainedModel) -> None:
    """Let the LM head keep its weight when the embedding gets another, in memory and in the files to come."""
    for config in {id(one): one for one in (model.config, text_config(model))}.values():
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _without(weight: Tensor, basis: Tensor, dim: int) -> Tensor:
    """The weight with what it writes along the basis taken away, over dimension `dim`."""
    rows = weight.movedim(dim, -1).to(torch.promote_types(weight.dtype, torch.float32))
    u = basis.to(rows)
    return (rows - (rows @ u.T) @ u).to(weight.dtype).movedim(-1, dim).contiguous()


def _try(changed: PreTrainedModel, bases: dict[HookPoint, Tensor]) -> None:
    """Refuse a model in which something else writes along a direction that should be gone."""
    vocabulary = text_config(changed).vocab_size
    ids = torch.linspace(0, vocabulary - 1, min(TRIED, vocabulary)).long()[None]
    most = max(LEFT, ROUNDINGS * torch.finfo(changed.dtype).eps)
    for point, h in capture(changed, ids, bases).items():
        h = h[0].float()
        left = torch.linalg.vector_norm(h @ bases[point].to(h.device).T, dim=-1)
        length = torch.linalg.vector_norm(h, dim=-1)
        if bool((left > most * length).any()):
            raise FormatError(
                f"after the change the stream at {point} still holds {float((left / length).nan_to_num().max()):.2g} of"
                f" its length along the direction: {type(changed).__name__} has weights that write to it under names"
                " that are not known here"
            )
