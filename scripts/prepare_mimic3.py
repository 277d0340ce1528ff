"""Converts MultiBench's im.pk of MIMIC-III to the file that `dataset=mimic3` reads.

    python scripts/prepare_mimic3.py im.pk                     # to data/mimic3.npz
    python scripts/prepare_mimic3.py im.pk --out other.npz

The authors of MultiBench send im.pk to users with a credential for MIMIC-III. It is a pickle; nothing that it
names is run: only plain values and numpy arrays are read from it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np

from mmnas_lab.dataset.mimic3 import ARRAYS, check_shape
from mmnas_lab.dataset.picture_files import ArrayUnpickler
from mmnas_lab.types import InputError


def read_arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays of `ARRAYS` in a pickled dictionary. Raises InputError."""
    try:
        with file.open("rb") as stream:
            content = ArrayUnpickler(stream, encoding="bytes").load()
    except FileNotFoundError:
        raise InputError(f"'{file}' does not exist; give the path of im.pk") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise InputError(f"'{file}' cannot be read ({error}); get im.pk anew") from error
    if not isinstance(content, dict):
        raise InputError(f"'{file}' holds no dictionary but {type(content).__name__}; get im.pk anew")
    content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    arrays = {}
    for name in ARRAYS:
        if name not in content:
            raise InputError(
                f"'{file}' has no '{name}'; it has: {', '.join(map(str, content))}. Get im.pk anew"
            )
        try:
            arrays[name] = np.asarray(content[name], np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"'{name}' in '{file}' is no array of numbers: {error}") from error
        check_shape(arrays[name], name, str(file))
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(f"the arrays in '{file}' differ in length: {lengths}; get im.pk anew")
    return arrays


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pickle", type=Path, help="im.pk")
    parser.add_argument("--out", type=Path, default=Path("data/mimic3.npz"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        arrays = read_arrays(options.pickle)
        part = options.out.with_name(options.out.name + ".part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as stream:
            np.savez_compressed(stream, **arrays)
        os.replace(part, options.out)
    except (InputError, OSError) as error:
        print(f"prepare_mimic3: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.out} is ready, {len(arrays['ep_tdata'])} admissions: "
        f"dataset=mimic3 dataset.path={options.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
