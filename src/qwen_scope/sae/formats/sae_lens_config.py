"""What sae_lens is told of an SAE, in a file or in memory. It knows an SAE by its attributes alone."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor

from qwen_scope.errors import foreign, need

from . import hooks

VERSION = "6.0.0"  # the first whose configs have the keys written here


def described(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config's `metadata`, where version 6 keeps the names of model and hook."""
    said = config.get("metadata")
    return said if isinstance(said, dict) else {}


def sae_lens_tensors(sae: Any) -> dict[str, Tensor]:
    """Its tensors by the names and in the orientation of sae_lens."""
    matrices = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec.T, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    return matrices | sae.own_tensors()


def sae_lens_config(sae: Any, layer: int) -> dict[str, Any]:
    """Its config; every key that has a surprising default is written out."""
    hook, said = hooks.of_sae(sae.hook_point, layer), described(sae.meta.get("sae_lens") or {})
    twin = said.get("hf_hook_name")
    return {
        "architecture": sae.architecture,
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        **({"k": sae.k, "rescale_acts_by_decoder_norm": False} if sae.k else {}),
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_training_version": None,
            "hook_head_index": None,
            "prepend_bos": False,
            "context_size": None,
            "dataset_path": None,
            "model_from_pretrained_kwargs": {},
            "training_architecture": sae.architecture,
            **said,
            "sae_lens_version": VERSION,
            "model_name": sae.meta.get("model"),
            "hook_name": f"blocks.{layer}.hook_{hook.stream}",
            # The spelling that came with the SAE names the module of its own model.
            "hf_hook_name": twin if hooks.about(twin) == hook else f"model.{hooks.module_name(hook)}",
        },
    }


def sae_lens_object(sae: Any) -> Any:
    """A copy in memory as an SAE of sae_lens, in fp32 on the same device.

    Raises:
        NotFoundError: sae_lens is not installed.   FormatError: this version of it does not take the SAE.
    """
    need("to_sae_lens()", "sae_lens")
    theirs: Any = import_module("sae_lens")
    config = sae_lens_config(sae, sae.identity.layer or 0)
    config |= {"device": str(sae.W_enc.device), "dtype": "float32"}
    tensors = {name: tensor.float().clone().contiguous() for name, tensor in sae_lens_tensors(sae).items()}
    with foreign("this version of sae_lens does not take the SAE; save_sae writes a folder for it"):
        made = theirs.SAE.from_dict(config)
        made.process_state_dict_for_loading(tensors)
        made.load_state_dict(tensors)
    return made
