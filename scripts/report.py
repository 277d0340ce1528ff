"""Tables and figures of the studies under `results/`, made from their rows alone.

python scripts/report.py results                 (tables and figures from the rows that are there)
python scripts/report.py results --collect outputs   (first add the runs of a sweep to the rows)
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from mmnas_lab.report.fusion_table import report_fusion_table
from mmnas_lab.report.kinds import report_kinds
from mmnas_lab.report.mechanisms import report_mechanisms
from mmnas_lab.report.mixer_grid import report_mixer_grid
from mmnas_lab.report.mixmas import report_mixmas
from mmnas_lab.report.studies import collect_posters, report_posters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--collect", type=Path, help="output folder of the runs to add")
    arguments = parser.parse_args()
    if arguments.collect is not None:
        print(f"{collect_posters(arguments.collect, arguments.results)} new rows")
    for write in (
        report_posters,
        report_fusion_table,
        report_mechanisms,
        report_mixmas,
        report_kinds,
        report_mixer_grid,
    ):
        for path in write(arguments.results):
            print(path)


if __name__ == "__main__":
    main()
