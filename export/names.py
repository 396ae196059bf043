"""What published files call our parameters, as tables: one row a layer, a column a layout.

Flows out: for a part of the model, our name -> theirs, and what else its files may hold. "{i}" is a block's number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum


class Layout(IntEnum):
    """The column of a row."""

    DIFFUSERS = 1
    ORIGINAL = 2


Row = tuple[str, str, str]  # ours, in the diffusers folder, in the original release


@dataclass(frozen=True)
class Names:
    """A part's rows, and what its files hold that we do not read, by layout."""

    rows: tuple[Row, ...]
    unused: tuple[str, str] = ("", "")  # prefixes, separated by spaces; "{i}" is the first block that is left out

    def source(self, name: str, layout: Layout) -> str:
        """What our parameter is called, both with "{i}" for the number of a block."""
        return _find({row[0]: row[layout] for row in self.rows}, name)

    def sources(self, expected: Iterable[str], layout: Layout, depth: int) -> dict[str, str]:
        """Our parameters -> theirs. `depth` is the number of blocks."""
        table = {row[0].format(i=i): row[layout].format(i=i) for row in self.rows for i in range(depth)}
        return {name: _find(table, name) for name in expected}

    def ignored(self, layout: Layout, depth: int) -> tuple[str, ...]:
        return tuple(prefix.format(i=depth) for prefix in self.unused[layout - 1].split())


def _find(table: dict[str, str], name: str) -> str:
    """A row's name, or that of a layer's weight or bias: of "layer[1/3]" the second third."""
    if name in table:
        return table[name]
    layer, _, parameter = name.rpartition(".")
    theirs, bracket, part = table[layer].partition("[")
    return f"{theirs}.{parameter}{bracket}{part}"
