"""`python -m qwen_scope.cli`, which is what `torchrun -m` starts."""

import sys

from qwen_scope.cli import main

sys.exit(main())
