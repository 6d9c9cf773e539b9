"""Where things lie that are made once per machine: converted models and the compiled noise."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$ZOFO_CACHE`, else `zofo` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("ZOFO_CACHE") or Path(base) / "zofo").expanduser()
