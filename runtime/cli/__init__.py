"""The command line: `tubelet generate | extend | loop | connect | edit | inpaint | blend | variation | caption | ...`.

The only package that reads flags and environment variables, prints, and turns errors into exit codes: 2 for what the
user can mend, 128 + n for signal n. Commands that need torch load `tubelet.export` when they are typed.
"""

from . import build, bundles, caption, fleet, generate, profiles, quantize, tasks  # noqa: F401 they register their commands
from .app import main

__all__ = ["main"]
