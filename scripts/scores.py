"""Lists or exports the scores of micro-benchmarks.

python scripts/scores.py                              # a table of outputs/scores.sqlite
python scripts/scores.py --store <file> --export scores.csv
python scripts/scores.py --export scores.json         # all columns
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import pandas as pd

from mmnas_lab.score_store import ScoreStore
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
    table = pd.DataFrame([{name: row[name] for name in LISTED} for row in rows], columns=list(LISTED))
    table["data"] = table["data"].str[:8]
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4g}"))
    return 0


def export(rows: list[dict[str, object]], path: Path) -> None:
    """Write all rows. Raises InputError for another suffix."""
    if path.suffix == ".csv":
        plain = [{k: json.dumps(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
        pd.DataFrame(plain).to_csv(path, index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        raise InputError(f"--export takes a .csv or .json file, got '{path}'")


if __name__ == "__main__":
    sys.exit(main())
