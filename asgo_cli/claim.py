"""`asgo claim`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asgo_cli import console
from asgo_cli.help_text import examples
from asgo_cli.sweep import GpusOption, SlotsOption
from pipelines.errors import UsageError
from pipelines.shell import command

if TYPE_CHECKING:
    from pipelines.analysis.comparison.results import Interval
    from pipelines.claim import Claim, Judgement
    from pipelines.sweeps.definition import Sweep
    from pipelines.sweeps.until_certain import SeedWish
    from pipelines.tasks.metric import Metric

EXAMPLES = examples("asgo claim asgo-beats-adamw.toml", "asgo claim claims/*.toml --json")


def claim(
    files: Annotated[list[Path], typer.Argument(metavar="FILE.toml...", help="Claims.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the sweep's runs.", show_default="runs/SWEEP")
    ] = None,
    slots: SlotsOption = None,
    gpus: GpusOption = None,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Also write the answers as a Markdown table.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the answers as JSON.")] = False,
) -> None:
    """Train what a claim needs, and say whether it holds.

    A claim is a TOML file: a sweep, a statement about two of its runs, and a confidence. Finished runs are not trained
    again. The answer is holds, does not hold, or cannot tell.
    """
    from pipelines.claim import read_claim

    judged = _judged([(path, read_claim(path)) for path in files], out, slots, gpus)
    if table is not None:
        _write_table(table, judged)
    if as_json:
        console.show_json({"claims": [_facts(*each) for each in judged]})
        return
    console.show_table(("claim", "answer"), [(_title(each, found.metric), found.answer) for _, each, found in judged])
    for _, each, found in judged:
        console.say(_sentence(each, found))
    for caution in dict.fromkeys(caution for _, _, found in judged for caution in found.cautions):
        console.warn(caution)
    folders = dict.fromkeys(_folder(each.sweep, out) for _, each, _ in judged if each.sweep is not None)
    console.suggest_next(*(command("asgo", "compare", folder) for folder in folders))


def _judged(
    claims: Sequence[tuple[Path, Claim]], out: Path | None, slots: int | None, gpus: int | None
) -> list[tuple[Path, Claim, Judgement]]:
    """Train what the claims need, and judge them. All of them are checked before the first run starts."""
    from asgo_cli.sweep import train_sweep
    from pipelines.claim import judge_claim

    if out is not None and len({each.sweep for _, each in claims}) > 1:
        raise UsageError("--out: the claims need several sweeps; leave it out, or give the claims of one sweep")
    sweeps = {each.sweep: _checked(path, each, each.sweep) for path, each in claims if each.sweep is not None}
    wishes = _wishes([each for _, each in claims], sweeps, out)
    judged = []
    for path, each in claims:
        folder = None
        if each.sweep is not None:
            folder = _folder(each.sweep, out)
            train_sweep(sweeps[each.sweep], folder, slots, gpus, wishes[each.sweep] if each.until_certain else None)
        try:
            judged.append((path, each, judge_claim(each, folder)))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return judged


def _folder(sweep: str, out: Path | None) -> Path:
    return out or Path("runs") / (Path(sweep).stem if sweep.endswith(".toml") else sweep)


def _checked(path: Path, claim: Claim, sweep: str) -> Sweep:
    """Return the claim's sweep. Raises `UsageError` for runs or a metric that it does not have."""
    from pipelines.resolve import assignment_layer
    from pipelines.sweeps.definition import read_sweep, resolve_variants
    from pipelines.tasks import TASKS
    from pipelines.tasks.metric import choose_metric

    definition = read_sweep(sweep)
    names = [variant.name for variant in resolve_variants(definition, assignment_layer([]))]
    for name in (claim.statement.contender, claim.statement.reference):
        if name not in names:
            raise UsageError(f"{path}: {name}: no run of {sweep} has this name; choose from {', '.join(names)}")
    metric = choose_metric(TASKS[definition.task], claim.metric, f"{path}: metric")
    try:
        claim.statement.require_unit(metric)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return definition


def _wishes(claims: Sequence[Claim], sweeps: Mapping[str, Sweep], out: Path | None) -> dict[str, SeedWish]:
    """Return the wish of each sweep that adds seeds, one for all its claims.

    Pairs with their common reference are tested; all pairs if the claims have several references, or if the sweep has
    begun with all pairs. Raises `UsageError` if the claims differ in `max_seeds`, or it is too small.
    """
    from pipelines.analysis.comparison.until_certain import read_record
    from pipelines.sweeps.until_certain import SeedWish

    wishes = {}
    for sweep in dict.fromkeys(each.sweep for each in claims if each.until_certain and each.sweep is not None):
        own = [each for each in claims if each.until_certain and each.sweep == sweep]
        most = {each.max_seeds for each in own if each.max_seeds is not None}
        if len(most) > 1:
            given = " and ".join(map(str, sorted(most)))
            raise UsageError(f"max_seeds: the claims about {sweep} have {given}; choose one number")
        references = {each.statement.reference for each in own}
        record = read_record(_folder(sweep, out))
        has_all_pairs = len(references) > 1 or (record is not None and record.against is None)
        recorded = None if record is None else len(record.seeds)
        wishes[sweep] = SeedWish((), max(most, default=recorded), None if has_all_pairs else references.pop())
        wishes[sweep].seeds(sweeps[sweep])  # raises if there are too few
    return wishes


def _title(claim: Claim, metric: Metric) -> str:
    return claim.title or claim.statement.in_words(metric)


def _sentence(claim: Claim, found: Judgement) -> str:
    """Say what is claimed, what was found, and how surely."""
    parts = [*_measured(claim, found), *_remarks(found)]
    return f"{found.answer}: {claim.statement.in_words(found.metric)}: {'; '.join(parts)}"


def _measured(claim: Claim, found: Judgement) -> list[str]:
    """Describe what was found: the ends of both, and how much better than claimed."""
    metric, statement = found.metric, claim.statement
    sides = ((statement.contender, found.contender), (statement.reference, found.reference))
    ends = [f"{name} ends at {metric.text(final.mean)}" for name, final in sides if final is not None]
    counts = sorted({final.count for _, final in sides if final is not None})
    tested = f", {found.test} test" if found.test else ""
    seeds = f" ({' and '.join(map(str, counts))} seed{'s' * (counts != [1])}{tested})" if counts else ""
    surplus = [] if found.surplus is None else [_surplus(found, found.surplus, claim.confidence)]
    return [", ".join(ends) + seeds, *surplus] if ends else []


def _remarks(found: Judgement) -> list[str]:
    needed = [f"about {found.seeds_needed} seeds of each would tell"] if found.seeds_needed else []
    return [*needed, *([found.reason] if found.reason else [])]


def _surplus(found: Judgement, surplus: Interval, confidence: float) -> str:
    """Describe how much better than claimed, with the interval."""
    metric = found.metric
    size = metric.difference(abs(surplus.mean)) + metric.difference_unit
    words = f"{size} {'better' if surplus.mean >= 0 else 'worse'} than claimed"
    finals = [final for final in (found.contender, found.reference) if final is not None]
    if found.test == "sequential" and any(final.count != surplus.count for final in finals):
        words += f" in {surplus.count} seeds of each"  # an earlier look decided, or other seeds do not count
    if surplus.low is None or surplus.high is None:
        return words
    low, high = (metric.difference(end, "+") for end in (surplus.low, surplus.high))
    return f"{words} ({confidence:.0%} interval {low} to {high})"


def _facts(path: Path, claim: Claim, found: Judgement) -> dict[str, Any]:
    return {
        "claim": str(path),
        "title": _title(claim, found.metric),
        "statement": claim.statement.in_words(found.metric),
        "answer": found.answer,
        "reason": found.reason,
        "metric": found.metric.name,
        "contender": None if found.contender is None else found.contender.mean,
        "reference": None if found.reference is None else found.reference.mean,
        "seeds": [0 if final is None else final.count for final in (found.contender, found.reference)],
        "surplus": None if found.surplus is None else found.surplus.mean,
        "interval": None if found.surplus is None else [found.surplus.low, found.surplus.high],
        "confidence": claim.confidence,
        "test": found.test,
        "p": found.p,
        "seeds_needed": found.seeds_needed,
        "cautions": list(found.cautions),
    }


def _write_table(path: Path, judged: list[tuple[Path, Claim, Judgement]]) -> None:
    from pipelines.storage import write_output

    lines = ["| claim | measured | answer |", "| --- | --- | --- |"]
    for file, each, found in judged:
        title = f"{_title(each, found.metric)} ({file.name})"
        cells = (title, "; ".join(_measured(each, found)), "; ".join([found.answer, *_remarks(found)]))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    write_output(path, ("\n".join(lines) + "\n").encode())
