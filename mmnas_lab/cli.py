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
from pathlib import Path
from typing import Any, NoReturn

from mmnas_lab.types import InputError, TrainingError

CONF = Path(__file__).parent.parent / "conf"
DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

log = logging.getLogger(__name__)


class _State:
    """What the job function and the exit need to tell each other."""

    folders: list[Path] = []
    failures: list[tuple[str, str, int]] = []  # overrides, first line of the message, exit code
    interrupted = False


def main() -> None:
    """Run what the command line asks for, and exit with the code that fits."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        sys.exit(DONE)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us instead of ending in Hydra's exit code 1
    _log_to_console()
    signal.signal(signal.SIGINT, _interrupt)
    code = DONE
    try:
        _check_groups(arguments)
        _hydra_main()
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as exit_:
        code = INTERRUPTED if _State.interrupted else (exit_.code if isinstance(exit_.code, int) else FAILED)
    except BaseException as error:
        code = _explain(error)
    if code == INTERRUPTED:
        _say("interrupted; the same command goes on from the last save point")
    if code == DONE and _State.failures:
        code = _State.failures[0][2]
        if _is_multirun(arguments):
            _say(f"{len(_State.failures)} of {len(_State.failures) + len(_State.folders)} jobs failed:")
            for overrides, message, _ in _State.failures:
                _say(f"  {overrides}: {message}")
            code = FAILED
    sys.stderr.flush()
    if os.environ.get("RANK", "0") == "0":
        for folder in _State.folders:
            print(folder)
    sys.exit(code)


def _hydra_main() -> None:
    import hydra
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: Any) -> None:
        from hydra.core.hydra_config import HydraConfig

        overrides = list(HydraConfig.get().overrides.task)
        try:
            values: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
            _State.folders.append(_run(values, overrides))
        except (Exception, SystemExit) as error:  # kept from Hydra, which would print more around it
            if _State.interrupted:
                raise KeyboardInterrupt from None
            code = _explain(error)
            if code != DONE:
                first_line = (str(error) or repr(error)).splitlines()[0]
                _State.failures.append((" ".join(overrides), first_line, code))

    job()


def _run(values: dict[str, Any], overrides: list[str]) -> Path:
    """One job: here, or on several ranks."""
    from mmnas_lab.build import check_config

    config = check_config(values)
    if config.trainer.devices > 1 and "LOCAL_RANK" not in os.environ:
        sys.exit(_start_ranks(config.trainer.devices))
    from mmnas_lab.runner import run

    return run(values, overrides)


def _start_ranks(count: int) -> int:
    """Start this very command once for each device; the first failure ends all. Gives the exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
        ranks.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        while all(process.poll() is None for process in ranks) or any(process.poll() is None for process in ranks):
            failed = [process.returncode for process in ranks if process.returncode not in (None, 0)]
            if failed:
                time.sleep(1.0)  # let the rank that knows the reason say it
                return failed[0] if failed[0] > 0 else FAILED
            time.sleep(0.1)
        return max(abs(process.returncode) for process in ranks)
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
    """Name the nearest valid option of a group, or group, before Hydra composes anything."""
    from mmnas_lab.build import near

    groups = group_options()
    for argument in arguments:
        match = re.fullmatch(r"\+{0,2}([\w/]+)=([\w,\- ]+)", argument)
        if match is None or argument.startswith("-"):
            continue
        group, options = match.groups()
        if group in groups:
            for option in options.split(","):
                if option.strip() and option.strip() not in groups[group]:
                    raise InputError(f"{group}={option.strip()}: no such option; {near(option.strip(), groups[group])}")


def group_options() -> dict[str, list[str]]:
    """Options of every group of conf/; those with a leading underscore are shared parts."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml") if not path.stem.startswith("_"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


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
        "  baselines=[]                   none; default text, image, two_stream, late_fusion, random_genotype",
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


def _explain(error: BaseException) -> int:
    """Say what went wrong in one message; gives the exit code."""
    from hydra.errors import HydraException, InstantiationException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, InputError):
        _say(f"error: {error}")
        return BAD_INPUT
    if isinstance(error, TrainingError):
        _say(f"error: {error}")
        return FAILED
    if isinstance(error, (HydraException, OmegaConfBaseException)) and not isinstance(error, InstantiationException):
        _say(f"error: {_composition_message(error)}")
        return BAD_INPUT
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        _say(f"error: no space left on the disk{f' for {error.filename}' if error.filename else ''}; free some, or "
             "set output=<folder on another disk>; finished stages are kept and the same command goes on")
        return FAILED
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else FAILED
    traceback.print_exception(error)
    return FAILED


def _composition_message(error: BaseException) -> str:
    """Hydra's message about a key, with the nearest valid keys in place of its advice to add a `+`."""
    from mmnas_lab.build import near

    text = str(error)
    cause = f"{text}\n{error.__cause__ or ''}"
    match = re.search(r"Could not override '([^']+)'", cause)
    if match:
        path = match.group(1)
        keys = _known_keys()
        parent = path.rpartition(".")[0]
        siblings = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == parent] or keys
        return f"unknown key '{path}'; {near(path.rpartition('.')[2] if parent or siblings is not keys else path, siblings)}"
    match = re.search(r"Could not override '?([\w/]+)'?\. No match in the defaults list", cause)
    if match:
        return f"unknown group '{match.group(1)}'; {near(match.group(1), [*group_options(), *_known_keys()])}"
    lines = [line for line in text.splitlines() if line.strip() and "full_key" not in line and "object_type" not in line]
    return "\n".join(lines)


def _known_keys() -> list[str]:
    """Dotted keys of the composed configuration without overrides."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        values = OmegaConf.to_container(compose("config"), resolve=False)

    def walk(node: Any, prefix: str) -> list[str]:
        if not isinstance(node, dict):
            return []
        here = [f"{prefix}{key}" for key in node]
        return here + [deeper for key, value in node.items() for deeper in walk(value, f"{prefix}{key}.")]

    return walk(values, "")


def _is_multirun(arguments: list[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def _log_to_console() -> None:
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
