"""`python -m fxresu` is the `fxresu` command."""

import sys
from pathlib import Path

# `python -m` puts the working directory first. In a clone its folder `kernels` would then be taken for the package of
# that name which transformers looks for.
_CLONE = Path(__file__).resolve().parents[1]
sys.path[:] = [p for p in sys.path if Path(p).resolve() != _CLONE]

from fxresu.cli import main  # noqa: E402

sys.exit(main())
