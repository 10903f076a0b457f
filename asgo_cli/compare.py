"""`asgo compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.names import completing
from pipelines.analysis.comparison.rules import RULES
from pipelines.shell import command
from pipelines.tasks.metric import METRICS

if TYPE_CHECKING:
    from pipelines.analysis.comparison.results import Comparison

EXAMPLES = examples(
    "asgo compare runs/asgo runs/adamw",
    "asgo compare runs --target 3.28 --out report",
    "asgo compare runs --against adamw",
    "asgo compare runs --rule track3",
    "asgo compare logs --columns step=iteration,val.loss=nll",
    "asgo compare runs/images --metric accuracy --target 0.9",
)


TargetOption = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Validation loss to reach; with --metric accuracy, a fraction.",
        show_default="AdamW's final one",
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Compare by {' or '.join(METRICS)}.",
        show_default="accuracy for images, else loss",
        autocompletion=completing(list(METRICS)),
    ),
]
RuleOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help=f"Evidence rule of a benchmark: {', '.join(RULES)}, or a TOML file with a rule.",
        autocompletion=completing(list(RULES)),
    ),
]


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs, logs, or folders of them.")],
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder of the report; an earlier report is replaced.")
    ] = Path("report"),
    target: TargetOption = None,
    metric: MetricOption = None,
    confidence: Annotated[
        float,
        typer.Option(min=0.5, max=0.9999, metavar="X", help="Confidence level of intervals and verdicts."),
    ] = 0.95,
    rule: RuleOption = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Test all others with this contender only.", show_default="all pairs"),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="KEY=NAME,...",
            help="Columns of logs with other names: step=iteration,val.loss=nll.",
            show_default="the usual names",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Compare training runs: one HTML page, figures and tables.

    Runs that differ only in the seed are grouped. Only the run folders and logs are read. A log is a CSV, an export of
    W&B, TensorBoard's event files, trainer_state.json of Hugging Face, or what nanoGPT, nanochat, modded-nanogpt or
    llm.c print.
    """
    from pipelines.analysis.comparison.compare import compare_runs
    from pipelines.analysis.comparison.headline import headline
    from pipelines.analysis.comparison.report import check_report_folder, summary, write_report

    check_report_folder(out)
    comparison = compare_runs(runs, target, confidence, rule, metric, against, columns)
    page = write_report(comparison, out, command("asgo", *sys.argv[1:]))
    for caution in comparison.cautions:
        console.warn(caution)
    if as_json:
        console.show_json(summary(comparison))
    else:
        _show_contenders(comparison)
        _show_evidence(comparison)
    console.say(headline(comparison))
    console.say(f"{page}: the report; figures and tables are in the same folder")
    console.suggest_next(command("python", "-m", "webbrowser", page))


def _show_contenders(comparison: Comparison) -> None:
    """Print the columns that fit a narrow terminal; the report has all."""
    from pipelines.analysis.comparison.figures import shown
    from pipelines.analysis.comparison.tables import entry_table

    table = entry_table(comparison, shown(comparison))
    final, best = (f"{kind} {comparison.metric.name}" for kind in ("final", "best"))
    kept = ["", "seeds", final if final in table.heads else best, "steps to target", "step, ms"]
    places = [table.heads.index(head) for head in kept if head in table.heads]
    console.show_table([table.heads[place] for place in places], [[row[p] for p in places] for row in table.texts])
    left_out = len(comparison.contenders) - len(table.texts)
    if left_out:
        console.say(f"and {left_out} more in the report")


def _show_evidence(comparison: Comparison) -> None:
    from pipelines.analysis.comparison.tables import evidence_table

    if comparison.evidence_rule is not None:
        table = evidence_table(comparison)
        console.show_table(table.heads, table.texts)
        console.say(comparison.evidence_rule.sentence)
