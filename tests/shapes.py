"""The checker of signatures: beartype, with a whole number accepted where a float is asked for, as Python does.

A mode of the chat template may be any string: tests give wrong ones, to see the sentence that a user gets.
"""

from typing import Literal

from beartype import BeartypeConf, FrozenDict, beartype

MODES = FrozenDict({Literal["default", "thinking", "non_thinking"]: str})

check = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=MODES))
