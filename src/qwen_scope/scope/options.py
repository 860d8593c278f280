"""`ScopeOptions`: which language model and SAEs to open; light enough for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_scope.text import Counted

    from .scope import Scope


@dataclass(frozen=True)
class ScopeOptions:
    """Which language model and SAEs to open, and how; `load_scope` tells more of each.

    Attributes:
        model: `lab` for the bundled one, a Hub id, a folder (also of a PEFT adapter), or a GGUF.
        sae: a group of SAEs; None where the catalog knows exactly one for the model.
        device: where the model runs; None: CUDA, else MPS, else the CPU.
        dtype: of the model's weights.
        k: only for SAEs whose files do not say it.
        adapter: a folder with a PEFT adapter to be merged into the model.
        counted: which tokens count; None: as the SAEs' files say, else measured.
    """

    model: str = "lab"
    sae: str | None = None
    device: str | None = None
    dtype: str = "auto"
    k: int | None = None
    adapter: str | None = None
    counted: Counted | None = None

    def open(self) -> Scope:
        """The scope; raises as `load_scope`."""
        from .opening import load_scope

        return load_scope(
            self.model,
            self.sae,
            device=self.device,
            dtype=self.dtype,
            k=self.k,
            adapter=self.adapter,
            counted=self.counted,
        )
