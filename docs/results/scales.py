"""Write how the scales of AccAsro grow from each start rate, from the statistics of the sweep `start-rates`.

`python docs/results/scales.py RUNS FOLDER` writes `scales.csv`, a row for each run and recorded step, and `scales.md`,
the means over the seeds. Embeddings are left out: most bytes never occur, and their scales rise to the ceiling.
"""

from __future__ import annotations

import csv
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

SHOWN = (500, 2000, 4000, 6000)


def main(runs: Path, folder: Path) -> None:
    """Write both files in `folder`."""
    rows = [row for run in sorted(runs.glob("accasro-lr*-s*")) for row in scales_of(run)]
    with (folder / "scales.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "scales.md").write_text(as_markdown(rows), encoding="utf-8")


def scales_of(run: Path) -> list[dict[str, Any]]:
    """Return the mean scale of all elements, and the fractions at the ends of its range, at each recorded step."""
    start_rate = json.loads((run / "config.json").read_text(encoding="utf-8"))["config"]["optimizer"]["lr"]
    rows = []
    for line in (run / "statistics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        layers = record.get("layers", {}).items()
        scales = [layer["scale"] for name, layer in layers if "embedding" not in name and "scale" in layer]
        elements = sum(sum(scale["histogram"]) for scale in scales)
        if elements:
            means = {
                key: sum(scale[key] * sum(scale["histogram"]) for scale in scales) / elements
                for key in ("mean", "at_min", "at_max")
            }
            rows.append({"run": run.name, "start_rate": start_rate, "step": record["step"], **means})
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """Return the mean scales by start rate, over the seeds."""
    found: dict[float, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["start_rate"]][row["step"]].append(row["mean"])
    lines = [f"| start rate | {' | '.join(f'step {step:,}' for step in SHOWN)} |", "| --- |" + " ---: |" * len(SHOWN)]
    for rate, means in sorted(found.items()):
        cells = (f"{sum(means[step]) / len(means[step]):.1f}" for step in SHOWN)
        lines.append(f"| {rate:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
