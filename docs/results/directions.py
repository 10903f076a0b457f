"""Write how the directions of shadow optimizers compare with the run's own, from the records of the sweep `why`.

`python docs/results/directions.py FOLDER` reads each `RUN-shadow-steps.csv` of the folder, and writes
`RUN-directions.csv` and `RUN-directions.md` beside it: means over the later half of the records, and the difference
from the run's own step at equal length, with two standard errors.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from pathlib import Path
from typing import Any

CHANGES = {
    "same batch": "same_batch.at_lengths.1",
    "next batch": "held_out.at_lengths.1",
    "next batch, twice the length": "held_out.at_lengths.2",
}
"""Columns of the records: changes of the loss after a step of the run's length, and of twice this length."""


def main(folder: Path) -> None:
    """Write both files of each run."""
    for path in sorted(folder.glob("*-shadow-steps.csv")):
        rows = directions(path)
        run = path.name.removesuffix("-shadow-steps.csv")
        with (folder / f"{run}-directions.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (folder / f"{run}-directions.md").write_text(as_markdown(rows), encoding="utf-8")


def directions(path: Path) -> list[dict[str, Any]]:
    """Return a row for each direction and change of the loss."""
    with path.open(encoding="utf-8", newline="") as file:
        whole = [row for row in csv.DictReader(file) if not row["layer"]]
    steps = sorted({int(row["step"]) for row in whole})
    later = steps[len(steps) // 2 :]
    found = {(row["direction"], int(row["step"])): row for row in whole}
    rows = []
    for direction in dict.fromkeys(row["direction"] for row in whole):
        for change, column in CHANGES.items():
            values = [float(found[direction, step][column]) for step in later]
            own = [float(found["run", step][column]) for step in later]
            differences = [value - run for value, run in zip(values, own, strict=True)]
            error = 2 * statistics.stdev(differences) / math.sqrt(len(later))
            rows.append(
                {
                    "direction": direction,
                    "change": change,
                    "mean": statistics.fmean(values),
                    "difference": statistics.fmean(differences),
                    "two_standard_errors": error,
                    "records": len(later),
                }
            )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return a line for each direction, in thousandths of a nat: means, and differences in brackets."""
    lines = [f"| direction | {' | '.join(CHANGES)} |", "| --- |" + " ---: |" * len(CHANGES)]
    for direction in dict.fromkeys(row["direction"] for row in rows):
        cells = [_cell(row) for row in rows if row["direction"] == direction]
        lines.append(f"| {direction} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any]) -> str:
    mean, difference, error = (1000 * row[key] for key in ("mean", "difference", "two_standard_errors"))
    return f"{mean:+.1f}" if row["direction"] == "run" else f"{mean:+.1f} ({difference:+.1f} ± {error:.1f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
