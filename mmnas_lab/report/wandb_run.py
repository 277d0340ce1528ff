"""A Weights & Biases run that needs neither an account nor a network."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlparse

log = logging.getLogger(__name__)

Mode = Literal["offline", "online"]


class WandbRun:
    """One W&B run; everything that it writes lies below its folder.

    Where W&B cannot start, one warning says why and the methods do nothing: no experiment fails for that.

    Args:
        folder: the record of the run is written to `folder/wandb`; `wandb sync` uploads an offline one.
        project: W&B project.
        name: display name of the run.
        config: plain values, shown and filtered by in W&B.
        mode: `offline`, `online`, or `auto`: as `WANDB_MODE` says, else online where an API key is known.
        group: name that the runs of one study share.
        tags: labels of the run.

    Raises:
        ValueError: if `mode` is none of the three.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        name: str,
        config: dict[str, Any],
        mode: str = "offline",
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        if mode not in ("offline", "online", "auto"):
            raise ValueError(f"WandbRun needs mode offline, online or auto, got '{mode}'")
        self.folder = folder
        self._stages: set[str] = set()
        self._run: Any = None
        chosen = _automatic_mode() if mode == "auto" else cast(Mode, mode)
        try:
            import wandb  # more than a second, and not every run logs to it

            folder.mkdir(parents=True, exist_ok=True)
            quiet = wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,
                x_disable_stats=True,
                x_service_wait=300,  # its process takes long to start on a busy machine
                init_timeout=300,
            )
            with self._writing_below_folder():
                self._run = wandb.init(
                    dir=folder,
                    project=project,
                    name=name,
                    config=config,
                    group=group,
                    tags=list(tags),
                    mode=chosen,
                    reinit="create_new",
                    settings=quiet,
                )
        except Exception as error:  # whatever it is, the experiment goes on without it
            log.warning("W&B did not start (mode %s), this run is not logged to it: %s", chosen, error)

    def log(self, stage: str, values: Mapping[str, float], step: int) -> None:
        """Add values of one step of a stage, `search` say, plotted over that stage's own steps.

        Args:
            stage: its name is put before names that lack it: `arch_loss` becomes `search/arch_loss`.
            values: by name.
            step: counted within the stage.
        """
        if self._run is None:
            return
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/step")
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        named = {k if k.startswith(f"{stage}/") else f"{stage}/{k}": value for k, value in values.items()}
        self._run.log({**named, f"{stage}/step": step})

    def image(self, key: str, path: Path) -> None:
        """Show a picture file, such as a PNG; W&B keeps a copy."""
        if self._run is None:
            return
        import wandb

        with self._writing_below_folder():
            self._run.log({key: wandb.Image(str(path))})

    def artifact(self, name: str, type: str, files: Sequence[Path], metadata: dict[str, Any]) -> None:
        """Keep files, each under its own name, as one versioned artifact."""
        if self._run is None:
            return
        import wandb

        with self._writing_below_folder():
            artifact = wandb.Artifact(name, type, metadata=metadata)
            for file in files:
                artifact.add_file(str(file), name=file.name)
            self._run.log_artifact(artifact)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the values that stand for the whole run in W&B's table of runs."""
        if self._run is not None:
            self._run.summary.update(dict(values))

    def finish(self) -> None:
        """Write what is left and close the run; later calls do nothing."""
        if self._run is not None:
            with self._writing_below_folder():
                self._run.finish()
            self._run = None

    @contextmanager
    def _writing_below_folder(self) -> Iterator[None]:
        """Keep W&B's copies and caches out of the home directory; it reads these variables when it writes."""
        places = {f"WANDB_{kind}_DIR": kind.lower() for kind in ("CACHE", "DATA")}
        before = {variable: os.environ.get(variable) for variable in places}
        for variable, place in places.items():
            os.environ[variable] = str(self.folder.resolve() / "wandb" / place)
        try:
            yield
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


def _automatic_mode() -> Mode:
    """What `WANDB_MODE` says, else online where there is an API key for W&B's server, else offline."""
    if "WANDB_MODE" in os.environ:
        return cast(Mode, os.environ["WANDB_MODE"])
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def _in_netrc() -> bool:
    """Whether the user's netrc file knows the server, which is where `wandb login` writes the key."""
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(server) is not None
    except (OSError, netrc.NetrcParseError):
        return False
