"""Boxes in columns by depth, with the wires between them: few crossings, and no wire through a box.

A wire that passes a column gets a lane of its own there, and the order within a column is the one with the
fewest crossings. All lengths are inches, y points up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from scipy.optimize import isotonic_regression

Orders = list[list[str]]
"""Keys of the boxes of each column, top first."""


@dataclass
class Box:
    """A box with its centre at (x, y); `entries` and `exit` are heights of its ports above the centre.

    `any_order` says that its entries are alike, so that wires take them in the order in which they come. A
    wire that leaves runs level up to `column_end`, the right edge of the widest box of the column.
    """

    key: str
    column: int
    width: float
    height: float
    entries: tuple[float, ...] = (0.0,)
    exit: float = 0.0
    any_order: bool = False
    column_end: float = 0.0
    x: float = 0.0
    y: float = 0.0

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2


@dataclass
class Wire:
    """From box `source` to entry `port` of box `target`, through the lanes that lie between."""

    source: str
    target: str
    port: int
    lanes: list[str] = field(default_factory=list)

    def hops(self) -> list[tuple[str, str]]:
        return list(pairwise([self.source, *self.lanes, self.target]))


@dataclass
class Layout:
    """Placed boxes by key, lanes among them, and the wires between them; the first column begins at x = 0."""

    boxes: dict[str, Box]
    wires: list[Wire]

    @property
    def top(self) -> float:
        return max(box.y + box.height / 2 for box in self.boxes.values())

    @property
    def bottom(self) -> float:
        return min(box.y - box.height / 2 for box in self.boxes.values())

    @property
    def right(self) -> float:
        return max(box.right for box in self.boxes.values())

    def heights(self, wire: Wire, before: str, after: str) -> tuple[float, float]:
        """Where one hop of a wire begins and ends."""
        start, end = self.boxes[before], self.boxes[after]
        return start.y + start.exit, end.y + (end.entries[wire.port] if after == wire.target else 0.0)


def arrange(
    boxes: list[Box],
    wires: list[Wire],
    first_orders: list[list[str]],
    gap: Callable[[Box, Box], float],
    column_gap: float,
) -> Layout:
    """Give every box its place: few crossings first, the given order second, short wires third.

    Args:
        boxes: their columns are set.
        wires: each leads to a later column.
        first_orders: the orders of the first column that are allowed, top first.
        gap: least distance of two neighbours of a column, upper one first.
        column_gap: least distance of two columns; steep wires widen it.
    """
    by_key = {box.key: box for box in boxes}
    for wire in wires:
        for column in range(by_key[wire.source].column + 1, by_key[wire.target].column):
            lane = f"{wire.source} past column {column}"
            by_key.setdefault(lane, Box(lane, column, 0.0, 0.06))
            wire.lanes.append(lane)
    layout = Layout(by_key, wires)
    later: list[list[str]] = [[] for _ in range(max(box.column for box in by_key.values()))]
    for box in by_key.values():
        if box.column:
            later[box.column - 1].append(box.key)

    rank = {box.key: number for number, box in enumerate(boxes)}

    def cost(orders: Orders) -> tuple[int, int, float]:
        _set_heights(layout, orders, gap)
        hops = _hop_heights(layout)
        pairs = (pair for column in hops for pair in combinations(column, 2))
        crossings = sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for a, b in pairs)
        named = [[rank[key] for key in column if key in rank] for column in orders[1:]]
        reversals = sum(a > b for column in named for a, b in combinations(column, 2))
        length = sum(abs(start - end) for column in hops for start, end in column)
        return crossings, reversals, round(length, 6)

    best = min((_untangle([first, *later], cost) for first in first_orders), key=cost)
    _set_heights(layout, best, gap)
    x = 0.0
    for keys, hops in zip(best, _hop_heights(layout), strict=True):
        if hops:
            x += max(column_gap, *(0.4 * abs(start - end) for start, end in hops))
        width = max(by_key[key].width for key in keys)
        for key in keys:
            box = by_key[key]
            box.x, box.column_end = x + box.width / 2, x + width
        x += width
    return layout


def _untangle(orders: Orders, cost: Callable[[Orders], tuple[int, int, float]]) -> Orders:
    """Swap neighbours in all columns but the first for as long as that lowers the cost."""
    best, improved = cost(orders), True
    while improved:
        improved = False
        for column in range(1, len(orders)):
            for i in range(len(orders[column]) - 1):
                trial = [list(keys) for keys in orders]
                trial[column][i : i + 2] = trial[column][i : i + 2][::-1]
                if (value := cost(trial)) < best:
                    orders, best, improved = trial, value, True
    return orders


def _hop_heights(layout: Layout) -> list[list[tuple[float, float]]]:
    """By column, the (start, end) heights of the pieces of wire that lead into it."""
    columns: list[set[tuple[float, float]]] = [
        set() for _ in range(1 + max(box.column for box in layout.boxes.values()))
    ]
    for wire in layout.wires:
        for before, after in wire.hops():
            columns[layout.boxes[after].column].add(layout.heights(wire, before, after))
    return [sorted(column) for column in columns]


def _set_heights(layout: Layout, orders: Orders, gap: Callable[[Box, Box], float]) -> None:
    """Put each box as near to the height of what leads into it as order and gaps allow."""
    for keys in orders:
        column = [layout.boxes[key] for key in keys]
        wanted = []
        for box in column:
            box.y = 0.0
            hops = [(w, *hop) for w in layout.wires for hop in w.hops() if hop[1] == box.key]
            if box.any_order:
                hops.sort(key=lambda hop: -layout.heights(*hop)[0])
                for port, (wire, *_) in enumerate(hops):
                    wire.port = port
            rises = [start - end for start, end in (layout.heights(*hop) for hop in hops)]
            wanted.append(sum(rises) / len(rises) if rises else 0.0)
        offsets = [0.0]
        for above, below in pairwise(column):
            offsets.append(offsets[-1] + (above.height + below.height) / 2 + gap(above, below))
        levels = isotonic_regression(np.add(wanted, offsets), increasing=False).x.tolist()
        for box, level, offset in zip(column, levels, offsets, strict=True):
            box.y = level - offset
