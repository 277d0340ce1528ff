"""Metrics and pictures for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmnas_lab.types import InputError


class TensorBoardRun:
    """Event files of one run.

    Args:
        folder: where they go.

    Raises:
        InputError: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise InputError(
                "logger=tensorboard needs the package tensorboard; install it or use logger=csv"
            ) from None
        self.writer = SummaryWriter(str(folder))

    def log(self, stage: str, values: dict[str, float], step: int) -> None:
        """Scalars of one step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def image(self, key: str, path: Path) -> None:
        """A picture."""
        import numpy as np
        from PIL import Image

        self.writer.add_image(key, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")

    def artifact(self, name: str, kind: str, files: list[Path], metadata: dict[str, Any]) -> None:
        """TensorBoard keeps no files; the run folder has them."""

    def summary(self, values: dict[str, float]) -> None:
        """Final values."""
        for name, value in values.items():
            self.writer.add_scalar(f"summary/{name}", value)

    def finish(self) -> None:
        """Write everything."""
        self.writer.close()
