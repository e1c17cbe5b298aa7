"""Makes the helpers in `tests/support` importable, and the fixtures that open pages known."""

import sys
from pathlib import Path

_SUPPORT = str(Path(__file__).parents[1] / "support")
if _SUPPORT not in sys.path:
    sys.path.insert(0, _SUPPORT)

from fxresu_browser import browser, open_page  # noqa: E402, F401
