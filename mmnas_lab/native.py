"""C sources of the package as shared libraries, compiled at their first use with the machine's compiler.

A machine without a compiler does without them: whoever asks falls back to torch, slower.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from ctypes import c_void_p
from functools import cache
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

log = logging.getLogger(__name__)

# Sums may be reordered; NaN stays NaN.
FLAGS = (
    "-O3 -shared -fPIC -ffp-contract=fast -fno-math-errno -fno-trapping-math "
    "-fno-signed-zeros -fassociative-math"
)
REALS = {torch.float32: "float", torch.float64: "double"}  # what C calls them
THREADED = 2**14  # fewest entries that are worth a second thread
# Tried in this order: what the machine's instructions and threads give, then less.
EXTRAS = ("-march=native -fopenmp", "-march=native", "")


def compiler() -> str | None:
    """The command that compiles C here: $CC, cc, gcc or clang; None without any."""
    return os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)


@cache
def library(source: Path, defines: str = "") -> ctypes.CDLL | None:
    """The compiled source; None, and one line in the log, where it cannot be had.

    It shares torch's threads where both use the same OpenMP runtime, as the usual builds for Linux do.

    Args:
        source: a C file; it may include `native.h`.
        defines: options of the preprocessor, such as "-DREAL=float".
    """
    command_name = compiler()
    if command_name is None:
        log.info(
            "no C compiler (cc, gcc, clang or $CC): %s is replaced by torch, which is slower", source.name
        )
        return None
    errors = []
    for extra in EXTRAS:
        command = [*command_name.split(), *FLAGS.split(), *extra.split(), *defines.split()]
        try:
            found = ctypes.CDLL(str(_compiled(command, source)))
            log.debug("%s is compiled by %s", source.name, " ".join(command))
            return found
        except subprocess.CalledProcessError as error:
            errors.append(error.stderr.strip())
        except OSError as error:
            errors.append(str(error))
    log.warning("%s is replaced by torch, which is slower: %s", source.name, errors[-1] or command_name)
    return None


def pointer(tensor: Tensor | None) -> c_void_p:
    """Where a dense tensor's entries begin, null for None; whoever uses it keeps the tensor."""
    return c_void_p(None if tensor is None else tensor.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[c_void_p]:
    """An array of pointers, null for None."""
    return (c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def threads_for(tensor: Tensor) -> int:
    """How many threads are worth it."""
    return min(torch.get_num_threads(), len(tensor)) if tensor.numel() >= THREADED else 1


def _compiled(command: list[str], source: Path) -> Path:
    """The library that a command makes of a source, made unless this machine has it."""
    header = Path(__file__).with_name("native.h")
    address = "\x1f".join([*command, header.read_text(), source.read_text(), _processor()])
    name = f"{source.stem}-{hashlib.blake2b(address.encode(), digest_size=8).hexdigest()}.so"
    folder = _own(user_cache_path("mmnas_lab"))
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            subprocess.run(
                [*command, f"-I{header.parent}", str(source), "-o", str(made), "-lm"],
                check=True,
                capture_output=True,
                text=True,
            )
            made.replace(folder / name)  # whole or not there, whoever else compiles it
    return folder / name


def _own(folder: Path) -> Path:
    """The folder where nobody but this user can write into it, else a new one for this process.

    A library that others could put there would run as this user.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    scratch = Path(tempfile.mkdtemp(prefix="mmnas_lab-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    return scratch


def _processor() -> str:
    """What a compiled file depends on; machines may share a cache folder."""
    libc = " ".join(platform.libc_ver())
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{libc} {platform.processor() or platform.machine()}"
    kinds = ("flags", "Features", "model name")
    return "\n".join([libc, *sorted({line for line in lines if line.startswith(kinds)})])
