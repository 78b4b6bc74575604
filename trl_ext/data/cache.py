"""Where the package keeps what it has downloaded or made once."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder: `$TRL_EXT_CACHE`, else trl_ext in the XDG cache."""
    xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TRL_EXT_CACHE") or Path(xdg) / "trl_ext").expanduser()
