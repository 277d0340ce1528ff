"""What a person sees while a run goes on: bars with the time left, a readable log, a table at the end."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger(__name__)

_QUIET_SECONDS = 15.0


class ProgressReport:
    """Progress of fits and stages: bars in a terminal, a line every 15 s elsewhere; passes points to loggers.

    Args:
        enabled: False on all ranks but one.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.terminal = enabled and sys.stderr.isatty()
        self.listeners: list[Any] = []
        self._tasks: dict[str, Any] = {}
        self._started: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}
        self._bars: Any = None

    def __enter__(self) -> ProgressReport:
        if self.terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description:<28}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                refresh_per_second=4,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        for listener in self.listeners:
            listener.finish()

    def listen(self, listeners: Sequence[Any]) -> None:
        """Pass all further points to these loggers."""
        self.listeners = list(listeners)

    def report(self, fit: str, points: Sequence[Any]) -> None:
        """Logged points of a fit, `<stage>` or `<stage>.<run>`."""
        stage, _, run = fit.partition(".")
        for listener in self.listeners:
            for step in sorted({point.step for point in points}):
                values = {
                    point.name if run in ("", "found") else f"{run}/{point.name}": point.value
                    for point in points
                    if point.step == step
                }
                listener.log(stage if run in ("", "found") else f"{run}/{stage}", values, step)

    def step(self, label: str, done: int, total: int) -> None:
        """`done` of `total` steps of a fit or stage."""
        if not self.enabled:
            return
        if self._bars is not None:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done)
            if done >= total:
                self._bars.remove_task(self._tasks.pop(label))
            return
        now = time.monotonic()
        started, first = self._started.setdefault(label, (now, done))
        if done >= total:
            self._started.pop(label)
            self._said.pop(label, None)
        elif now - self._said.setdefault(label, now) >= _QUIET_SECONDS and done > first:
            self._said[label] = now
            left = (now - started) / (done - first) * (total - done)
            log.info("%s: %d of %d, about %s left", label, done, total, _duration(left))

    def finish(self, folder: Path, record: dict[str, Any]) -> None:
        """Show the run's result as a table, and hand pictures and record to the loggers."""
        for listener in self.listeners:
            for name in (
                "genotype.png",
                "curves.png",
                "edge_weights.png",
                "reconstructions.png",
                "decisions.png",
            ):
                if (folder / name).exists():
                    listener.image(name.split(".")[0], folder / name)
            files = [
                folder / name
                for name in ("genotype.json", "record.json", "network.safetensors")
                if (folder / name).exists()
            ]
            listener.artifact(f"{record['experiment']}-genotype", "genotype", files, {"seed": record["seed"]})
            listener.summary(_flat(record["metrics"]))
        if not self.enabled or not record["metrics"]:
            return
        if self._bars is not None:
            self._bars.stop()
        from rich.console import Console
        from rich.table import Table

        names = [name for name, value in record["metrics"]["test"].items() if not isinstance(value, dict)]
        table = Table(title=f"{record['experiment']}, seed {record['seed']}: test split (fractions)")
        table.add_column("network")
        for name in names:
            table.add_column(name, justify="right")
        rows = {"found by the search": record["metrics"]["test"]}
        rows |= {name: splits["test"] for name, splits in record["baselines"].items()}
        for name, metrics in rows.items():
            table.add_row(name, *(f"{metrics.get(metric, math.nan):.3f}" for metric in names))
        Console(stderr=True, width=None if self.terminal else 110).print(table)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _flat(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        f"{split}/{name}": value
        for split, values in metrics.items()
        for name, value in values.items()
        if not isinstance(value, dict)
    }
