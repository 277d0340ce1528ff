"""The command line: composes conf/, starts the ranks, turns errors into one message and an exit code.

Exit codes: 0 done, 2 bad input or configuration, 1 anything else, 130 interrupted. Nothing heavy is imported
here: `--help` and `--cfg job` answer at once.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from mmnas_lab.types import InputError, TrainingError

CONF = Path(__file__).parent.parent / "conf"
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a job ended: its folder, or the exit code and the first line of what was said."""

    overrides: str
    code: int = DONE
    folder: Path | None = None
    message: str = ""


class _State:
    """What the job function, Hydra's launchers and the exit need to tell each other."""

    outcomes: ClassVar[list[Outcome]] = []
    multirun = False
    interrupted = False


class _RanksFailed(Exception):
    """A rank ended with this exit code, and has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"its ranks ended with exit code {code}")
        self.code = code


def main() -> None:
    """Run what the command line asks for, and exit with the code that fits."""
    overrides = [a for a in sys.argv[1:] if a.startswith("~") or ("=" in a and not a.startswith("-"))]
    sys.argv[1:] = [a for a in sys.argv[1:] if a not in overrides] + overrides  # Hydra wants options first
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        sys.exit(DONE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of ending in Hydra's exit code 1
    _log_to_console()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    code = DONE
    try:
        _check_groups(arguments)
        if {"-c", "--cfg"} & set(arguments) and not {"-m", "--multirun"} & set(arguments):
            _check_keys(arguments)
        _hydra_main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as exit_:
        code = INTERRUPTED if _State.interrupted else (exit_.code if isinstance(exit_.code, int) else FAILED)
    except BaseException as error:
        code = _explain(error, arguments)
    if (
        code == INTERRUPTED and "LOCAL_RANK" not in os.environ
    ):  # ranks leave it to the process that started them
        _say("interrupted; the same command goes on from the last save point")
    failures = [outcome for outcome in _State.outcomes if outcome.code != DONE]
    if code == DONE and failures:
        code = failures[0].code
        if _State.multirun:
            _say(f"{len(failures)} of {len(_State.outcomes)} jobs failed:")
            for outcome in failures:
                _say(f"  {outcome.overrides}: {outcome.message}")
            code = FAILED
    sys.stderr.flush()
    if os.environ.get("RANK", "0") == "0":
        for outcome in _State.outcomes:
            if outcome.folder is not None:
                print(outcome.folder)
    sys.exit(code)


def _hydra_main() -> None:
    import hydra
    from hydra._internal.hydra import Hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: Any) -> Outcome:
        _log_to_console()  # a launcher may have started a process of its own
        overrides = list(HydraConfig.get().overrides.task)
        try:
            values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            outcome = Outcome(" ".join(overrides), folder=_run(values, overrides))
        except (Exception, SystemExit) as error:  # kept from Hydra, which would print more around it
            if _State.interrupted:
                raise KeyboardInterrupt from None
            code = _explain(error, overrides)
            message = (str(error) or repr(error)).strip().splitlines()[0]
            outcome = Outcome(" ".join(overrides), code or FAILED, message=message)
        _State.outcomes.append(outcome)
        return outcome

    multirun = Hydra.multirun

    def with_outcomes(self: Any, *args: Any, **kwargs: Any) -> Any:
        """A multirun whose jobs' outcomes come back, from other processes too."""
        _State.multirun = True
        batches = multirun(self, *args, **kwargs)
        _State.outcomes = [done.return_value for batch in batches for done in batch]
        return batches

    Hydra.multirun = with_outcomes  # type: ignore[method-assign]
    try:
        job()
    finally:
        Hydra.multirun = multirun  # type: ignore[method-assign]


def _run(values: dict[str, Any], overrides: list[str]) -> Path | None:
    """One job: here, or on several ranks."""
    from mmnas_lab.build import check_config

    config = check_config(values)
    if config.trainer.devices > 1 and "LOCAL_RANK" not in os.environ:
        return _run_on_ranks(config.trainer.devices, overrides)
    from mmnas_lab.runner import run

    return run(values, overrides)


def _run_on_ranks(count: int, overrides: list[str]) -> Path | None:
    """Start one process of this job for each device; the first failure ends all. Gives the run's folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, sys.argv[0], *_config_dir(sys.argv[1:]), *overrides, "hydra.mode=RUN"]
    ranks = []
    for rank in range(count):
        environment = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
        }
        stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL  # one line, the folder
        ranks.append(subprocess.Popen(command, env=environment, stdout=stdout, text=True))
    try:
        while any(process.poll() is None for process in ranks):
            if any(process.poll() for process in ranks):
                time.sleep(1.0)  # let the rank that knows the reason say it
                break
            time.sleep(0.1)
        failed = [process.returncode for process in ranks if process.returncode]
        if failed:
            raise _RanksFailed(next((code for code in failed if code > 0), FAILED))
        assert ranks[0].stdout is not None
        lines = ranks[0].stdout.read().splitlines()
        return Path(lines[-1]) if lines else None
    finally:
        for process in ranks:
            if process.poll() is None:
                process.terminate()
        for process in ranks:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _check_groups(arguments: list[str]) -> None:
    """Name the nearest valid option of a group before Hydra composes anything."""
    from mmnas_lab.build import near

    groups = group_options(arguments)
    for argument in arguments:
        match = re.fullmatch(r"\+{0,2}([\w/]+)=([\w,\- ]+)", argument)
        if match is None or argument.startswith("-"):
            continue
        group, options = match.groups()
        if group in groups:
            for option in options.split(","):
                if option.strip() and option.strip() not in groups[group]:
                    raise InputError(
                        f"{group}={option.strip()}: no such option; {near(option.strip(), groups[group])}"
                    )


def _check_keys(arguments: list[str]) -> None:
    """Refuse unknown keys before `--cfg` prints the configuration; types within nodes wait for the run."""
    from mmnas_lab.build import check_schema

    check_schema(
        _compose([a for a in arguments if "=" in a and not a.startswith("-")], _config_dir(arguments))
    )


def _compose(overrides: list[str], config_dir: list[str]) -> dict[str, Any]:
    """The configuration as plain values, with `???` where something is not set."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    more = [f"hydra.searchpath=[{Path(config_dir[1]).resolve()}]"] if config_dir else []
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("config", [*overrides, *more]), resolve=True)
    return values


def _config_dir(arguments: list[str]) -> list[str]:
    """The option that names a folder of further configurations, if it is there."""
    for k, argument in enumerate(arguments):
        if argument in ("--config-dir", "-cd"):
            return ["--config-dir", *arguments[k + 1 : k + 2]]
        if argument.startswith("--config-dir="):
            return ["--config-dir", argument.partition("=")[2]]
    return []


def group_options(arguments: Sequence[str] = ()) -> dict[str, list[str]]:
    """Options of every group of conf/ and of `--config-dir`; a leading underscore marks a shared part."""
    options: dict[str, list[str]] = {}
    for root in [CONF, *map(Path, _config_dir(list(arguments))[1:])]:
        for folder in sorted(path for path in root.glob("*") if path.is_dir() and path.name != "hydra"):
            names = [path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_")]
            options[folder.name] = sorted({*options.get(folder.name, []), *names})
    return options


def help_text() -> str:
    """Usage, the experiments with a line each, and the groups."""
    lines = [
        "mmnas_lab: neural architecture search of multimodal networks with few labels or none",
        "",
        "usage: python run.py [experiment=<name>] [<group>=<option>] [<key>=<value>] [-m]",
        "",
        "experiments:",
    ]
    for name in group_options()["experiment"]:
        lines.append(f"  {name:<18} {_first_comment(CONF / 'experiment' / f'{name}.yaml')}")
    lines += ["", "sweeps (with -m sweep=<name>):"]
    for name in group_options()["sweep"]:
        lines.append(f"  {name:<18} {_first_comment(CONF / 'sweep' / f'{name}.yaml')}")
    lines += ["", "groups:"]
    for group, options in group_options().items():
        if group not in ("experiment", "sweep"):
            lines.append(f"  {group:<18} {', '.join(options)}")
    lines += [
        "",
        "often used keys:",
        "  seed=1                         another seed; -m seed=0,1,2 runs three",
        "  labelled_share=0.1             share of the training labels that the classifier sees",
        "  stages=[features,search]       a part of the chain features, search, pretrain, train, test",
        "  baselines=[]                   none, or of text, image, two_stream, late_fusion, random_genotype",
        "  dataset.path=<folder>          where the data lies",
        "  trainer=ddp trainer.devices=2  two processes",
        "  output=<folder>                instead of outputs",
        "",
        "--cfg job prints the composed configuration, --hydra-help Hydra's own options.",
        "Exit codes: 0 done, 2 bad input or configuration, 1 anything else, 130 interrupted.",
    ]
    return "\n".join(lines)


def _first_comment(path: Path) -> str:
    """The first comment of a yaml that says something."""
    for line in path.read_text().splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line[2:].strip()
    return ""


def _explain(error: BaseException, arguments: list[str]) -> int:
    """Say what went wrong in one message; gives the exit code."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, _RanksFailed):
        return error.code
    if isinstance(error, (InputError, TrainingError)):
        if os.environ.get("RANK", "0") != "0":
            time.sleep(10)  # rank 0 mostly says the same, and then this rank is ended before it speaks
        _say(f"error: {error}")
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    if isinstance(error, MissingMandatoryValue):
        key = error.full_key
        _say(f"error: '{key}' is not set; give {key}=<value>")
        return BAD_INPUT
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(
        error, InstantiationException
    ):
        _say(f"error: {_composition_message(error, arguments)}")
        return BAD_INPUT
    full = _full_disk(error)
    if full is not None:
        _say(
            f"error: no space left on the disk{full}; free some, or set output=<folder on another disk>; "
            "finished stages are kept and the same command goes on"
        )
        return FAILED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    traceback.print_exception(error)
    return FAILED


def _full_disk(error: BaseException | None) -> str | None:
    """` for '<file>'` where the error, or what caused it, is a full disk; libraries wrap it differently."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return f" for '{error.filename}'" if error.filename else ""
        if os.strerror(errno.ENOSPC) in str(error):
            return ""
        error = error.__cause__ or error.__context__
    return None


def _composition_message(error: BaseException, arguments: list[str]) -> str:
    """Hydra's message about a key, with the nearest valid keys in place of its advice to add a `+`."""
    from mmnas_lab.build import near, parameter_names

    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    match = re.search(r"Could not override '([^']+)'", cause)
    if match is None:
        lines = [line for line in text.splitlines() if line.strip() and "full_key" not in line]
        return "\n".join(
            line for line in lines if "object_type" not in line and "HYDRA_FULL_ERROR" not in line
        )
    path = match.group(1)
    groups = group_options(arguments)
    if "." not in path and "No match in the defaults list" in cause:
        return f"unknown group '{path}'; {near(path, groups)}"
    choices = [a for a in arguments if a.partition("=")[0].lstrip("+") in groups and "," not in a]
    node: Any = _compose(choices, _config_dir(arguments))
    *parents, key = path.split(".")
    for depth, parent in enumerate(parents):
        if not isinstance(node.get(parent), dict):
            unknown = ".".join(parents[: depth + 1])
            return f"unknown key '{unknown}'; {near(parent, node)}"
        node = node[parent]
    names = parameter_names(node["_target_"]) if "_target_" in node else None
    if names is not None and key in names:
        return f"'{path}' is left at its default by the configuration; set it with +{path}=<value>"
    return f"unknown key '{path}'; {near(key, {*node, *(names or [])} - {'_target_'})}"


def _log_to_console() -> None:
    """Log to stderr, on rank 0 only; does nothing the second time."""
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _interrupt(number: int, frame: Any) -> NoReturn:
    _State.interrupted = True
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
