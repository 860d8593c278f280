"""What exports for other tools are told; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_scope.errors import InputError

if TYPE_CHECKING:
    from .neuronpedia import Creator


@dataclass(frozen=True)
class NeuronpediaOptions:
    """How a store is written for Neuronpedia; see `export_neuronpedia` and `Creator`.

    Attributes:
        features: which of one layer, named as in `2/3,2/40-50`; None for all that fire.
        model_id: its name of the model.
        set_name: the source set.
        method, explainer: a registered way and a registered model of explanations; None takes the usual ones.
        creator_id, creator_name, owner: for the bulk files; all or none.
        model_layers, model_neurons: sizes of the model, for the bulk files; None as the model says.
        no_model: leave out the tokens that a feature promotes, which take the model.
    """

    features: str | None = None
    model_id: str | None = None
    set_name: str = "qwen-scope"
    method: str | None = None
    explainer: str | None = None
    creator_id: str | None = None
    creator_name: str | None = None
    owner: str | None = None
    model_layers: int | None = None
    model_neurons: int | None = None
    no_model: bool = False

    @property
    def creator(self) -> Creator | None:
        """Who a bulk import belongs to; None where nothing was said.

        Raises:
            InputError: some of it was said, but not all that the files need.
        """
        from .neuronpedia import Creator

        who = (self.creator_id, self.creator_name, self.owner)
        if all(one is None for one in (*who, self.model_layers, self.model_neurons)):
            return None
        if self.creator_id is None or self.creator_name is None or self.owner is None:
            raise InputError("Neuronpedia's bulk files need all of creator_id=, creator_name= and owner=")
        return Creator(self.creator_id, self.creator_name, self.owner, self.model_layers, self.model_neurons)


@dataclass(frozen=True)
class DelphiOptions:
    """How a store is written for delphi; see `export_delphi`.

    Attributes:
        context: tokens of a row.
        splits: files per layer.
        module: the name of a layer's module, `{}` for its number.
        model_name: the model that delphi is to load; None for the store's.
    """

    context: int = 256
    splits: int = 5
    module: str = "layers.{}"
    model_name: str | None = None
