"""Downloads CIFAR-10 or CIFAR-100 from its authors, by torchvision, to where the datasets look for it.

    python scripts/prepare_cifar.py                       # 170 MB to data/cifar10
    python scripts/prepare_cifar.py --classes 100         # 169 MB to data/cifar100

A second run does nothing where the data is there and whole.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.error import URLError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--classes", type=int, choices=[10, 100], default=10)
    parser.add_argument("--path", type=Path, help="folder; default data/cifar10 or data/cifar100")
    options = parser.parse_args(arguments)
    from torchvision.datasets import CIFAR10, CIFAR100

    folder = options.path or Path("data") / f"cifar{options.classes}"
    dataset = CIFAR10 if options.classes == 10 else CIFAR100
    try:
        dataset(str(folder), download=True)
    except (OSError, URLError, RuntimeError) as error:
        print(
            f"error: cannot get {dataset.url} into '{folder}': {error}. Try again, or download the archive "
            f"by hand into '{folder}' and run this again: it is checked and unpacked",
            file=sys.stderr,
        )
        return 2
    print(f"{folder} is ready: dataset=cifar{options.classes} dataset.path={folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
