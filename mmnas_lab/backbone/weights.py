"""Where an encoder's weights lie: files, installed packages; and how they are read, written and hashed."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmnas_lab.types import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PACKAGE_PREFIX = "package:"


def resolve(reference: str, patterns: Iterable[str]) -> Path:
    """The one file that a path, or a `package:<name>` of an installed package, stands for.

    The package is found, not imported.

    Args:
        reference: a path, or `package:` and the import name of a package that ships weights.
        patterns: globs of the file inside such a package; the first that matches a single file wins.

    Raises:
        InputError: no such file or package, or a package with no single file of that kind.
    """
    if not reference.startswith(PACKAGE_PREFIX):
        path = Path(reference).expanduser()
        if not path.exists():
            raise InputError(f"an encoder's weights are to be read from '{path}', which does not exist")
        return path
    package = reference.removeprefix(PACKAGE_PREFIX)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise InputError(
            f"'{reference}' needs the package '{distribution}', which is not installed; "
            f"make install, or uv pip install {distribution}"
        )
    folder = Path(spec.submodule_search_locations[0])
    patterns = tuple(patterns)
    for pattern in patterns:
        found = sorted(folder.rglob(pattern))
        if len(found) == 1:
            return found[0]
    raise InputError(f"package '{package}' holds no single file {' or '.join(patterns)} to read weights from")


def device_of(name: str) -> torch.device:
    """The device that a setting names; `auto` is this process's CUDA device where there is one."""
    import torch

    if name != "auto":
        try:
            return torch.device(name)
        except RuntimeError as error:
            raise InputError(f"an encoder's device must be auto, cpu or cuda, got '{name}'") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict in a .safetensors, .pt or .pth file; nothing but tensors is ever unpickled.

    Raises:
        InputError: the file cannot be read that way, or holds no tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise InputError(f"'{path}' cannot be read as a file of weights: {error}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    tensors = content if isinstance(content, dict) else {}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise InputError(f"'{path}' holds no state dict; save one with torch.save(model.state_dict(), path)")
    return tensors


def fit_state(
    model: nn.Module, tensors: dict[str, Tensor], source: str, unused: tuple[str, ...] = ()
) -> None:
    """Load a state dict into a model, by name or, where all names differ, by order.

    Some files name their layers otherwise than the model does, but list them alike. They are taken by order
    if the counts are equal and every tensor has the shape of its counterpart. Batch counters are left out.

    Args:
        model: gets the weights.
        tensors: the state dict.
        source: what errors call it.
        unused: prefixes of layers that features never read; these may be missing or shaped otherwise.

    Raises:
        InputError: the state dict does not fit; the message names the first tensors that differ.
    """

    def counted(name: str) -> bool:
        return not name.endswith("num_batches_tracked")

    wanted = {name: value for name, value in model.state_dict().items() if counted(name)}
    given = {name: value for name, value in tensors.items() if counted(name)}
    if not wanted.keys() & given.keys() and len(wanted) == len(given):
        given = dict(zip(wanted, given.values(), strict=True))

    def needed(name: str) -> bool:
        return not name.startswith(unused) if unused else True

    fitting = {n: value for n, value in given.items() if n in wanted and wanted[n].shape == value.shape}
    faults = [
        f"{name} {tuple(wanted[name].shape)}"
        + (f" is {tuple(given[name].shape)} in the file" if name in given else " is missing")
        for name in wanted
        if needed(name) and name not in fitting
    ]
    faults += [f"{name} is not in the model" for name in given if needed(name) and name not in wanted]
    if faults:
        raise InputError(
            f"'{source}' does not fit {type(model).__name__}: {len(given)} tensors for {len(wanted)}; "
            f"{'; '.join(faults[:3])}{' ...' if len(faults) > 3 else ''}"
        )
    model.load_state_dict(fitting, strict=False)


def save_state(model: nn.Module, path: Path) -> None:
    """Write a model's whole state as safetensors."""
    from safetensors.torch import save_file

    save_file({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}, path)


def hash_settings(**settings: Any) -> str:
    """16 hex digits of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths: Iterable[Path]) -> str:
    """16 hex digits of file contents; names and folders do not count."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of named tensors, whatever their order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()[:16]
