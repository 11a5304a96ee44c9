"""Where lorapro keeps files between runs."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$LORAPRO_CACHE``, else ``~/.cache/lorapro``."""
    configured = os.environ.get("LORAPRO_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "lorapro"
