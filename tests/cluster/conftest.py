"""Tests of stores that workers write compare them as those of stores do."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "store"))
