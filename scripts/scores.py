"""Lists or exports the scores of micro-benchmarks.

python scripts/scores.py                              # a table of outputs/scores.sqlite
python scripts/scores.py --store <file> --export scores.csv
python scripts/scores.py --export scores.json         # all columns
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from rich.console import Console
from rich.table import Table

from mmnas_lab.score_store import COLUMNS, ScoreStore
from mmnas_lab.types import InputError

LISTED = ("choice", "option", "seed", "metric", "score", "seconds", "sample", "data")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path("outputs/scores.sqlite"))
    parser.add_argument("--export", type=Path, help="a .csv or .json file")
    options = parser.parse_args(arguments)
    try:
        if not options.store.is_file():
            raise InputError(
                f"no score store '{options.store}'; a search with strategy=micro_benchmark makes one"
            )
        rows = ScoreStore(options.store).rows()
        if options.export is not None:
            export(rows, options.export)
            print(f"{options.export}: {len(rows)} scores")
            return 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{options.store}: {len(rows)} scores")
    for name in LISTED:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in LISTED))
    Console(width=140).print(table)
    return 0


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:20]


def export(rows: list[dict[str, object]], path: Path) -> None:
    """Write all rows. Raises InputError for another suffix."""
    if path.suffix == ".csv":
        plain = [{k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(plain)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        raise InputError(f"--export takes a .csv or .json file, got '{path}'")


if __name__ == "__main__":
    sys.exit(main())
