"""Numbers of several seeds put side by side: means, paired differences, Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """A mean with its two-sided confidence interval; of one value alone, `low` and `high` are nan."""

    mean: float
    low: float
    high: float


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent runs, with Student's t interval.

    Args:
        values: one result a run.
        confidence: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: if there are no values, or `confidence` is not between 0 and 1.
    """
    if not values:
        raise ValueError("mean_interval needs at least one value, got none")
    if not 0 < confidence < 1:
        raise ValueError(f"mean_interval needs confidence between 0 and 1, got {confidence}")
    mean = fmean(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy.stats import t  # a second to import, needed for a report only

    half = float(t.ppf((1 + confidence) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of `a - b` over runs paired by seed, say, with Student's t interval of the differences.

    Args:
        a: one result a run.
        b: result i is the partner of result i of `a`.
        confidence: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: if the two differ in length, or as `mean_interval` does.
    """
    if len(a) != len(b):
        raise ValueError(f"paired_interval needs pairs, got {len(a)} and {len(b)} values")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], confidence)


def markdown_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A GitHub table that also reads well as plain text: cells padded, numbers to the right.

    Args:
        rows: cells by column name; an absent cell, or None, stays empty.
        columns: names of the columns, in their order; they are the header.

    Returns:
        The lines of the table, without a line break at the end.
    """
    cells = [[_cell(name) for name in columns], *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    numeric = [_is_numeric([row.get(name) for row in rows]) for name in columns]

    def line(parts: Sequence[str]) -> str:
        aligned = zip(parts, widths, numeric, strict=True)
        return "| " + " | ".join(p.rjust(w) if right else p.ljust(w) for p, w, right in aligned) + " |"

    rule = ["-" * (w - 1) + ":" if right else "-" * w for w, right in zip(widths, numeric, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *(line(parts) for parts in cells[1:])])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _is_numeric(values: list[Any]) -> bool:
    """Whether each cell of a column is a number, or a text that starts like one ("62.4 ± 0.1")."""
    texts = [_cell(value) for value in values if value is not None]
    return bool(texts) and all(text.lstrip("+-")[:1].isdigit() or text == "nan" for text in texts)
