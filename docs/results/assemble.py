"""Put the tables of `make results` into the pages beside this file.

What stands in a page between `<!-- FILE -->` and `<!-- end -->` becomes the file: a Markdown table as it is, anything
else as a block. The trajectories' table is made here, of what `asgo viz all --json` printed, and the table that says
which code made which results, of the comparisons' `runs.csv`.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FUNCTIONS = HERE / "functions" / "functions.json"
ORIGIN = {"git_commit": "commit", "torch": "torch", "device": "device", "instructions": "instruction set"}
"""Columns of `runs.csv`, and their heads."""
_PLACE = re.compile(r"(<!-- ([\w./-]+\.\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Rewrite the tables of the trajectories, and every page."""
    rows = trajectory_rows(json.loads(FUNCTIONS.read_text(encoding="utf-8")))
    FUNCTIONS.with_suffix(".csv").write_text(as_csv(rows), encoding="utf-8")
    FUNCTIONS.with_suffix(".md").write_text(as_markdown(rows), encoding="utf-8")
    (HERE / "origins" / "origins.md").write_text(origins(), encoding="utf-8")
    for page in sorted(HERE.glob("*.md")):
        page.write_text(assembled(page.read_text(encoding="utf-8")), encoding="utf-8")


def trajectory_rows(printed: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each optimizer on each function."""
    return [
        {
            "function": function["function"],
            "optimizer": run["label"],
            "steps": function["steps"],
            "final x": run["final_point"][0],
            "final y": run["final_point"][1],
            "final value": run["final_value"],
            "distance": run["distance"],
            "at most, in last tenth": run["late_distance"],
            "stays within 0.1 from step": run["steps_to_reach"],
        }
        for function in printed["functions"]
        for run in function["trajectories"]
    ]


def origins() -> str:
    """A row for each folder with runs; several commits or machines of one folder are all in it."""
    rows = []
    for path in sorted(HERE.glob("*/runs.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            runs = list(csv.DictReader(file))
        made = {head: " and ".join(sorted({_short(run.get(key)) for run in runs})) for key, head in ORIGIN.items()}
        rows.append({"results": path.parent.name, "runs": len(runs), **made})
    return as_markdown(rows)


def _short(value: str | None) -> str:
    """Seven digits of a commit, and whether files had changed; other values as they are."""
    return re.sub(r"^([0-9a-f]{7})[0-9a-f]{33}", r"\1", value or "not recorded")


def as_csv(rows: list[dict[str, Any]]) -> str:
    """With all digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """With three digits."""
    lines = [
        list(rows[0]),
        ["---" if isinstance(value, str) else "---:" for value in rows[0].values()],
        *(map(_rounded, row.values()) for row in rows),
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(value: Any) -> str:
    if value is None:
        return "never"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value


def assembled(page: str) -> str:
    """The page with the files that it asks for."""

    def filled(place: re.Match[str]) -> str:
        path = HERE / place[2]
        content = path.read_text(encoding="utf-8").rstrip()
        table = content if path.suffix == ".md" else f"```text\n{content}\n```"
        return f"{place[1]}{table}\n{place[3]}"

    return _PLACE.sub(filled, page)


if __name__ == "__main__":
    main()
