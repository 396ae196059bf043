"""The folder where tubelet keeps for a user what can be made again."""

from __future__ import annotations

from pathlib import Path


def user_cache() -> Path:
    """Raises RuntimeError for a user without a home."""
    return Path.home() / ".cache" / "tubelet"
