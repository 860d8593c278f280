"""TRL's `SFTTrainer` with one more term in its loss."""

from __future__ import annotations

import copy
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from qwen_scope.errors import InputError, NotFoundError, nearest
from qwen_scope.model import HookPoint, reading
from qwen_scope.text import tell_unused
from qwen_scope.train import DivergedError

from .checkpoints import WholeCheckpoints
from .loss import IGNORED, NO_GROUP, ExtraLoss

TOO_LONG = "whose prompt fills max_length"
"""Why a sample is left out that has no token to learn."""


class FeatureSFTTrainer(WholeCheckpoints, SFTTrainer):
    """`SFTTrainer` with an `extra` term: `L = L_CE + weight * term`. Everything else is TRL's.

    Data is what `SFTTrainer` takes, with a column that names each sample's group (None for a sample the term leaves
    out). Data that is already tokenised, or packed with `skip_prepare_dataset`, carries a column `groups` instead: per
    token the index into `extra.groups`, or -1.

    In the scale `mean` the term is normalised over the whole optimiser step, over micro-batches and processes, like
    TRL's own loss: so it does not depend on how a step is cut into micro-batches. In the scale `published` it is that
    of SASFT's code (`SCALES`). What is logged is the whole term of a step, of all processes. Evaluation reports the
    cross-entropy alone.

    Args:
        extra: the term, or None for plain fine-tuning.
        group_column: the column that names a sample's group.

    Attributes:
        dropped: per dataset how many samples were left out, as their prompts leave no room for a response.

    Raises:
        InputError: a dataset without that column or without a sample that can be used, or a residual that no gradient
            reaches.
        NotFoundError: a group that the term does not know.
        DivergedError: a loss that is not finite.
    """

    def __init__(self, *args: Any, extra: ExtraLoss | None = None, group_column: str = "group", **kwargs: Any) -> None:
        self.extra, self.group_column = extra, group_column
        self._step_tokens: int | None = None
        self.dropped: dict[str, int] = {}
        super().__init__(*args, **kwargs)
        if extra is None:
            return
        inner = self.data_collator
        if not isinstance(inner, DataCollatorForLanguageModeling):
            raise InputError(f"feature losses are for text; the collator {type(inner).__name__} carries no groups")
        self.data_collator = GroupCollator(**{f.name: getattr(inner, f.name) for f in fields(inner)})

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        if self.extra is None:
            ready = super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
            return ready if packing else self._told(dataset, ready, args.max_length, dataset_name)
        if not isinstance(dataset, Dataset):
            raise InputError("a feature loss needs a datasets.Dataset; a stream has no groups to check beforehand")
        if "groups" not in dataset.column_names:
            dataset = dataset.add_column("group_id", self._numbers(dataset, dataset_name))
        # TRL's packing would drop the groups; it is done here instead, when every token has its own.
        loose = copy.copy(args)
        loose.max_length = None if packing else args.max_length
        ready: Any = super()._prepare_dataset(dataset, processing_class, loose, False, formatting_func, dataset_name)
        self._told(dataset, ready, args.max_length, dataset_name)
        if "groups" not in ready.column_names:
            ready = ready.map(lambda row: {"groups": [row["group_id"]] * len(row["input_ids"])})
        ready = ready.select_columns(["input_ids", "labels", "groups"])
        return pack_dataset(ready, args.max_length, args.packing_strategy) if packing else ready

    def _told(self, dataset: Any, ready: Any, max_length: int | None, name: str) -> Any:
        """The prepared data; TRL leaves samples out whose prompt leaves no token of the response, without a word."""
        if isinstance(dataset, Dataset) and isinstance(ready, Dataset) and len(ready) < len(dataset):
            self.dropped[name] = len(dataset) - len(ready)
            if not len(ready):
                raise InputError(
                    f"none of the {len(dataset)} samples of the {name} data can be used: their prompts fill"
                    f" max_length, {max_length} tokens; raise it (--max-length)"
                )
            tell_unused({f"{TOO_LONG} ({max_length} tokens)": self.dropped[name]}, len(dataset), f"the {name} data")
        return ready

    def _numbers(self, dataset: Dataset, name: str) -> list[int]:
        """The group of every sample as an index."""
        assert self.extra is not None
        if self.group_column not in dataset.column_names:
            has = ", ".join(dataset.column_names)
            raise InputError(f"the {name} dataset has no column {self.group_column!r} to name groups; it has {has}")
        known = {group: i for i, group in enumerate(self.extra.groups)} | {None: NO_GROUP}
        for group in dict.fromkeys(dataset[self.group_column]):
            if group not in known:
                close = nearest(str(group), self.extra.groups)
                raise NotFoundError(f"the {name} dataset has a group {group!r} that the alpha table lacks; {close}")
        return [known[group] for group in dataset[self.group_column]]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        if self.extra is not None and "groups" not in columns:
            self._signature_columns = [*columns, "groups"]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step; the response tokens in all of them, of every process, are counted here."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.extra is not None and samples:
            here = torch.stack([(batch["labels"] != IGNORED).sum() for batch in samples]).sum().to(device)
            gathered: Any = self.accelerator.gather(here)
            self._step_tokens = int(gathered.sum())
        return samples, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss, and while training `weight * extra` on top."""
        groups = inputs.pop("groups", None)
        bare: Any = self.model
        if self.extra is None or not bare.training:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._check_finite(found[0] if return_outputs else found)
            return found
        labels = inputs["labels"]
        residuals: dict[HookPoint, Tensor] = {}
        with reading(bare, self.extra.points, residuals.__setitem__):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        for point, h in residuals.items():
            if not h.requires_grad:
                raise InputError(
                    f"no gradient reaches the residual at {point}: the term changes nothing unless weights at or before"
                    " this layer are trained"
                )
        term = self._term(bare, residuals, labels, groups)
        # The logger averages over micro-batches; their shares add up to the term of the step.
        parts = self.current_gradient_accumulation_steps
        everywhere: Any = self.accelerator.gather(term.detach().reshape(1))
        self._metrics["train"][self.extra.name].append(float(everywhere.mean()) * parts)
        loss = (found[0] if return_outputs else found) + self.extra.weight * term
        self._check_finite(loss)
        return (loss, found[1]) if return_outputs else loss

    def _term(self, bare: Any, residuals: dict[HookPoint, Tensor], labels: Tensor, groups: Tensor) -> Tensor:
        """This process' share of the term, so that the mean over processes, which DDP takes, is the whole."""
        assert self.extra is not None
        here = int((labels != IGNORED).sum())
        if self.extra.scale == "published":
            return self.extra(bare, residuals, labels, groups, here)
        n_tokens = here if self._step_tokens is None else self._step_tokens
        return self.extra(bare, residuals, labels, groups, n_tokens) * self.accelerator.num_processes

    def _check_finite(self, loss: Tensor) -> None:
        if not bool(loss.detach().isfinite().all()):
            raise DivergedError(
                f"the loss is not a finite number at step {self.state.global_step}: lower the learning rate or the"
                " weight of the extra term, and go on from the last checkpoint"
            )


class GroupCollator(DataCollatorForLanguageModeling):
    """TRL's collator, which carries the column `groups` along."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The batch, with `groups` shaped like `input_ids`; padding has no group."""
        batch = super().torch_call(examples)
        rows = [torch.tensor(example["groups"], dtype=torch.long) for example in examples]
        rows = [torch.cat(rows)] if self.padding_free else rows
        groups = torch.full(batch["input_ids"].shape, NO_GROUP)
        for i, row in enumerate(rows):
            groups[i, : len(row)] = row
        return {**batch, "groups": groups}
