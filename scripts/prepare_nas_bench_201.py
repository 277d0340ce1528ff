"""Converts NAS-Bench-201's published file, once, into a small table for searches of its space.

    python scripts/prepare_nas_bench_201.py NAS-Bench-201-v1_1-096897.pth data/nas_bench_201.parquet

Then a search with search_space.vocabulary=nas_bench_201 and search_space.table=<the parquet file> writes
what the table says of its cell into the record, as `benchmark`.

The file is read as data alone: what it names to be run is refused. It needs memory for its 4.7 GB.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.search_space.cnn_cells.bench_201 import convert
from mmnas_lab.types import InputError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("published", type=Path, help="NAS-Bench-201-v1_1-096897.pth")
    parser.add_argument("table", type=Path, help="parquet file to write")
    options = parser.parse_args(arguments)
    try:
        count = convert(options.published, options.table)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.table}: {count} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
