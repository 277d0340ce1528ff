"""The command line for tests: each call is a fork of one server process that has done the slow imports."""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "run.py"

# Sizes, all different, at which a whole run takes a second or two.
TINY = (
    "scale=smoke", "trainer.threads=1", "dataset.num_train=48", "dataset.num_val=24", "dataset.num_test=25",
    "dataset.poster_height=48", "dataset.poster_width=32", "features.num_views=2",
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A command that has ended; `code` is negative for a signal."""

    code: int
    out: str
    err: str

    @property
    def folder(self) -> Path:
        """The run folder that the last line of stdout names."""
        return Path(self.out.splitlines()[-1])

    def record(self) -> dict[str, Any]:
        return json.loads((self.folder / "record.json").read_text())


def run(
    *arguments: str,
    cwd: Path,
    hook: Mapping[str, Any] | None = None,
    drawings: bool = False,
    timeout: float = 300,
) -> Finished:
    """`python run.py <arguments>` in `cwd`, without the imports.

    Args:
        arguments: of the command line.
        cwd: a folder of the test; outputs lie in it.
        hook: `{"name": <function of this module>, ...}` is called in the process before the command.
        drawings: whether genotype and curves are drawn, which takes as long as the rest of a tiny run.
        timeout: seconds after which it is killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        request = {
            "arguments": list(arguments), "cwd": str(cwd), "hook": hook and dict(hook),
            "drawings": drawings,
            "out": str(out), "err": str(err), "timeout": timeout,
        }  # fmt: skip
        code = _server().ask(request)
        finished = Finished(code, _text(out), _text(err))
    if code == -signal.SIGKILL and not hook:
        raise TimeoutError(f"{arguments} took more than {timeout} s; it said:\n{finished.err}")
    return finished


def succeed(*arguments: str, cwd: Path, **options: Any) -> Finished:
    """As `run`, of a command that must end with 0."""
    finished = run(*arguments, cwd=cwd, **options)
    assert finished.code == 0, finished.err
    return finished


def run_process(*arguments: str, cwd: Path, timeout: float = 300) -> Finished:
    """`python run.py <arguments>` as a process of its own, imports and all."""
    command = [sys.executable, str(RUN), *arguments]
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout, env=_environment()
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def reproducible(record: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that the same command gives again, bit for bit."""
    return {key: value for key, value in record.items() if key not in ("timing", "environment")}


def one_message(finished: Finished, code: int = 2) -> str:
    """The single message of a refused command, after a look that it is one."""
    lines = [line for line in finished.err.splitlines() if line.strip()]
    messages = [line for line in lines if line.startswith("error: ")]
    assert finished.code == code, finished.err
    assert len(messages) == 1, finished.err
    assert "Traceback" not in finished.err
    assert "full_key" not in finished.err
    assert "HYDRA_FULL_ERROR" not in finished.err
    assert "use +" not in finished.err, "Hydra's advice opens a hole in the schema"
    assert finished.out == ""
    return "\n".join(lines[lines.index(messages[0]) :])


def stage_folders(outputs: Path, stage: str) -> list[Path]:
    """Folders of a stage, finished or not."""
    return sorted(path for path in (outputs / "stages" / stage).glob("*") if path.is_dir())


def files_of(outputs: Path, *stages: str) -> dict[str, dict[str, str]]:
    """Digests of the result files of every folder of these stages, by folder."""
    return {
        f"{stage}/{folder.name}": json.loads((folder / "done.json").read_text())["files"]
        for stage in stages
        for folder in stage_folders(outputs, stage)
    }


# Movies as files, in both forms that `dataset=mmimdb` reads.

GENRES = (["Drama"], ["Comedy", "Romance"], ["Drama", "Thriller"], ["Horror"], ["Comedy"])
SIZES = {"train": 34, "dev": 19, "test": 21}
MMIMDB = (
    "experiment=ssl_nas_mmimdb", "scale=smoke", "dataset.path=movies", "trainer.threads=1", "baselines=[]",
    "search.batch_size=8", "pretrain.batch_size=8", "train.batch_size=8", "encoder_pretrain.batch_size=8",
)  # fmt: skip
LABEL_FREE = "stages=[features,search,pretrain]"


def movies() -> dict[str, list[dict[str, Any]]]:
    """Rows of each split: id, poster (JPEG), plot and genres."""
    generator = np.random.default_rng(0)
    words = (
        "love",
        "war",
        "a dog",
        "the town",
        "murder",
        "a wizard",
        "the sea",
        "a train",
        "her brother",
        "gold",
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, size in SIZES.items():
        rows[split] = []
        for i in range(size):
            file = io.BytesIO()
            pixels = generator.integers(0, 256, (4, 3, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((20, 28)).save(file, "JPEG")
            plot = f"{split} {i}. " + " and ".join(generator.choice(words, 6)) + "."
            rows[split].append(
                {
                    "id": f"{split}{i:03d}",
                    "poster": file.getvalue(),
                    "plot": plot,
                    "genres": GENRES[i % len(GENRES)],
                }
            )
    return rows


def write_raw(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """The layout of the MM-IMDB archive; a row without genres has none in its file."""
    folder.mkdir(parents=True)
    (folder / "split.json").write_text(
        json.dumps({split: [r["id"] for r in part] for split, part in rows.items()})
    )
    for row in (row for part in rows.values() for row in part):
        content = {"plot": [row["plot"]], **({"genres": row["genres"]} if "genres" in row else {})}
        (folder / f"{row['id']}.json").write_text(json.dumps(content))
        (folder / f"{row['id']}.jpeg").write_bytes(row["poster"])


def write_parquet(folder: Path, rows: dict[str, list[dict[str, Any]]], without: str = "") -> None:
    """One parquet file a split, all columns but one."""
    folder.mkdir(parents=True)
    for split, part in rows.items():
        columns = {
            "imdb_id": [row["id"] for row in part],
            "poster": [{"bytes": row["poster"], "path": ""} for row in part],
            "plot": [row["plot"] for row in part],
            "genres": [row["genres"] for row in part],
        }
        columns.pop(without, None)
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")


# The server.


class _Server:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(),
        )
        atexit.register(self.stop)

    def ask(self, request: dict[str, Any]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the server process of the command line tests has ended")
        return int(answer)

    def stop(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()


@functools.cache
def _server() -> _Server:
    return _Server()


def _environment() -> dict[str, str]:
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "WANDB_SERVICE")
    }
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "WANDB_MODE": "offline", "HF_HUB_OFFLINE": "1"}


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _serve() -> None:
    import hydra
    import lightning.pytorch
    import matplotlib.figure
    import sklearn.base
    import timm
    import torch.utils.flop_counter
    import torchmetrics
    import torchvision.transforms.v2

    import mmnas_lab.cli
    import mmnas_lab.report.curves
    import mmnas_lab.report.fusion_drawing
    import mmnas_lab.runner
    import mmnas_lab.strategy.gradient_search
    import mmnas_lab.strategy.sampling_search

    assert all((hydra, lightning, sklearn, matplotlib, timm, torch, torchmetrics, torchvision, mmnas_lab))
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become_the_command(request)
        print(_wait(child, request["timeout"]), file=answers, flush=True)


def _wait(child: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            deadline += 60
        time.sleep(0.01)


def _become_the_command(request: dict[str, Any]) -> None:
    code = 70
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        os.chdir(request["cwd"])
        sys.argv = [str(RUN), *request["arguments"]]
        if not request["drawings"]:
            without_drawings()
        if request["hook"]:
            options = request["hook"]
            globals()[options.pop("name")](**options)
        from mmnas_lab.cli import main

        main()
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# Hooks: what a test does to the process of a command before it runs.


def kill_at(place: str, fit: str, number: int = 1, by: int = signal.SIGKILL) -> None:
    """A signal at a place of the fit or stage whose label begins with `fit`, when it is passed so often.

    `after_step` and `last_step` are ends of training steps, `after_validation` comes before that epoch's save
    point and `after_epoch` behind it; `before_done` is when the stage is about to be marked.
    """
    from mmnas_lab import stage
    from mmnas_lab.strategy.search_module import SearchModule
    from mmnas_lab.training import Fit, TrainFit

    passed = 0

    def pass_here() -> None:
        nonlocal passed
        passed += 1
        if passed == number:
            os.kill(os.getpid(), by)

    def behind(kind: Any, method: str, here: Any = lambda fit, arguments: True) -> None:
        original = getattr(kind, method)

        @functools.wraps(original)
        def then_pass(self: Any, *arguments: Any) -> Any:
            value = original(self, *arguments)
            if self.label.startswith(fit) and here(self, arguments):
                pass_here()
            return value

        setattr(kind, method, then_pass)

    if place == "after_step":
        behind(Fit, "on_train_batch_end")
    elif place == "last_step":
        behind(Fit, "on_train_batch_end", lambda fit, arguments: arguments[2] + 1 == fit.steps_left)
    elif place == "after_validation":
        behind(TrainFit, "after_epoch")
        behind(SearchModule, "after_epoch")
    elif place == "after_epoch":
        behind(Fit, "on_train_epoch_end")
    elif place == "before_done":
        write = stage.write_json

        def write_json(path: Path, value: Any) -> None:
            if path.name == stage.DONE and path.parent.parent.name == fit:
                pass_here()
            write(path, value)

        stage.write_json = write_json
    else:
        raise ValueError(f"no place '{place}'")


def without_drawings() -> None:
    """Pictures of the run folder are left out."""
    from mmnas_lab.report import curves, fusion_drawing

    curves.draw_curves = lambda *arguments: None
    fusion_drawing.draw_fusion = lambda *arguments: None


def full_disk(file: str) -> None:
    """Writing a file of this name ends as on a full disk."""
    import errno

    from mmnas_lab import stage

    original = os.fsync

    def fsync(descriptor: int) -> None:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if f".{file}." in Path(path).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        original(descriptor)

    stage.os.fsync = fsync


def without_hub() -> None:
    """Weights of the model hub cannot be had."""
    import timm

    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> Any:
        if pretrained:
            raise ConnectionError("Failed to resolve 'huggingface.co'")
        return create(name, pretrained=pretrained, **options)

    timm.create_model = create_model


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _serve()
