"""How a file was made, as text for its comment field: enough to make it again.

Flows in: a command and its options, completed by all defaults. Flows out: JSON text, and back. Knows nothing of files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

KEY = "tubelet"  # of the JSON object: tells a recipe from any other comment


@dataclass(frozen=True)
class Recipe:
    version: str  # of tubelet
    bundle: str  # its key
    command: str  # of the command line
    options: Mapping[str, Any]  # JSON values; what was derived from defaults and media is decided

    @classmethod
    def of(cls, bundle: str, command: str, options: Mapping[str, Any]) -> Recipe:
        return cls(version("tubelet"), bundle, command, options)

    @property
    def prompt(self) -> str | None:
        prompt = self.options.get("prompt")
        return prompt if isinstance(prompt, str) else None

    def text(self) -> str:
        return json.dumps(
            {KEY: self.version, **{k: v for k, v in vars(self).items() if k != "version"}}, sort_keys=True
        )

    @classmethod
    def parse(cls, text: str | None) -> Recipe | None:
        """What `text` says, or None for no comment and for one of another origin."""
        try:
            value = json.loads(text or "")
            recipe = cls(value.pop(KEY), **value)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return None
        fields = (recipe.version, recipe.bundle, recipe.command)
        return recipe if all(isinstance(f, str) for f in fields) and isinstance(recipe.options, dict) else None
