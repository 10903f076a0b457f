"""The record of `asgo sweep --until-certain` in the folder of its runs, and which compared runs it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.analysis.comparison.results import Entry
from pipelines.analysis.comparison.sequential import Looks, Results
from pipelines.errors import AsgoError
from pipelines.storage import parse_json, printable, write_atomically

RECORD = "until-certain.json"
MOST_SEEDS = 100
_MOST_BYTES = 10_000_000
_FIXED = ("contenders", "against", "metric", "confidence", "first_look", "seeds")


class Look(BaseModel):
    """A look at the results after a number of seeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seeds: int
    undecided: tuple[tuple[str, str], ...]
    """Pairs of contenders."""


class Record(BaseModel):
    """How a sweep adds seeds, and what it has seen."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    contenders: tuple[str, ...]
    """Names of the runs' folders, without the seed."""
    against: str | None
    """The contender of all pairs; None for all pairs of contenders."""
    metric: str
    confidence: Annotated[float, Field(gt=0, lt=1)]
    first_look: Annotated[int, Field(ge=2)]
    """Number of seeds of every contender before the first look."""
    seeds: Annotated[tuple[int, ...], Field(min_length=2, max_length=MOST_SEEDS)]
    """All seeds that may be trained, in their order."""
    results: dict[str, dict[int, float | None]] = {}
    """Final values by contender and seed that looks have seen; None for a run that diverged."""
    looks: tuple[Look, ...] = ()

    @model_validator(mode="after")
    def _check_seeds(self) -> Record:
        if len(set(self.seeds)) < len(self.seeds) or self.first_look > len(self.seeds):
            raise ValueError("seeds or first_look are wrong")
        return self

    @property
    def plan(self) -> Looks:
        """When pairs are tested."""
        return Looks(self.first_look, self.seeds)

    @property
    def pairs(self) -> int:
        """Number of pairs to decide. A pair of which a contender diverged stays undecided."""
        count = len(self.contenders)
        return count * (count - 1) // 2 if self.against is None else count - 1

    def differences(self, other: Record) -> list[str]:
        """Return a line for each setting in which another record differs."""
        pairs = ((key, getattr(self, key), getattr(other, key)) for key in _FIXED)
        return [
            f"{key.replace('_', ' ')}: {_listed(old)} there, {_listed(new)} now"
            for key, old, new in pairs
            if old != new
        ]

    def write(self, folder: Path) -> None:
        """Write it in the folder of the runs."""
        write_atomically(folder / RECORD, (self.model_dump_json(indent=1) + "\n").encode())


def _listed(value: object) -> str:
    if value is None:
        return "all pairs"
    return printable(", ".join(map(str, value)) if isinstance(value, tuple) else str(value))


def read_record(folder: Path) -> Record | None:
    """Return the record in a folder of runs; None without one. Raises `AsgoError` if it is damaged."""
    path = folder / RECORD
    try:
        with path.open("rb") as file:
            return Record.model_validate(parse_json(file.read(_MOST_BYTES)))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise AsgoError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise AsgoError(f"{path}: damaged; without it, the runs of this sweep cannot be compared") from None


@dataclass(frozen=True)
class Member:
    """A contender whose seeds were added until certain."""

    folder: Path
    record: Record
    name: str
    """In the record."""
    results: Results
    left_out: int = 0
    """Number of its finished runs that the record is not about."""
    missing: tuple[int, ...] = ()
    """Seeds that a look has seen, and that have no result now."""


def member_of(folder: Path, record: Record, name: str, results: Results, elsewhere: int = 0) -> Member:
    """Return a contender of the record in `folder`, with results by seed; `elsewhere` are other finished runs.

    Raises `AsgoError` if a result changed after a look at it.
    """
    require_unchanged(folder, record, name, results)
    own = {seed: value for seed, value in results.items() if seed in record.seeds}
    left_out = elsewhere + sum(value is not None for seed, value in results.items() if seed not in own)
    missing = tuple(seed for seed in record.results.get(name, {}) if seed not in own)
    return Member(folder, record, name, own, left_out, missing)


def require_unchanged(folder: Path, record: Record, name: str, results: Results) -> None:
    """Raise `AsgoError` if a contender's result changed after a look at it: the looks decided by the old one."""
    for seed, value in record.results.get(name, {}).items():
        if results.get(seed, value) != value:
            was = "a divergence" if value is None else value
            raise AsgoError(
                f"{folder / f'{name}-s{seed}'}: changed after a look at its result, which was {was}, see "
                f"{folder / RECORD}; train the sweep again with another --out"
            )


def members_of(contenders: Sequence[Entry]) -> dict[str, Member]:
    """Return the contenders that records are about, by label. Raises `AsgoError` for a damaged record."""
    read = cache(read_record)
    found = ((entry.label, _member(entry, read)) for entry in contenders)
    return {label: member for label, member in found if member is not None}


def _member(entry: Entry, read: Callable[[Path], Record | None]) -> Member | None:
    places: dict[tuple[Path, str], dict[int, float | None]] = {}
    for run in entry.runs:
        folder, name = run.path.resolve().parent, run.name_in_sweep
        record = read(folder)
        if record is not None and name is not None and name in record.contenders and run.seed in record.seeds:
            results = places.setdefault((folder, name), {})
            if run.state in ("finished", "diverged"):
                results[run.seed] = run.final
    if not places:
        return None
    (folder, name), results = next(iter(places.items()))
    record = read(folder)
    assert record is not None
    finished = sum(run.final is not None for run in entry.runs)
    return member_of(folder, record, name, results, finished - sum(value is not None for value in results.values()))


def recorded_reference(contenders: Sequence[Entry], members: Mapping[str, Member]) -> Entry | None:
    """Return the contender of all pairs, if one record is about all contenders, and names one that has finished."""
    folders = {member.folder for member in members.values()}
    if len(folders) != 1 or any(entry.label not in members for entry in contenders):
        return None
    named = (entry for entry in contenders if members[entry.label].name == members[entry.label].record.against)
    return next((entry for entry in named if entry.final is not None), None)


def mixing_cautions(finished: Sequence[str], members: Mapping[str, Member]) -> list[str]:
    """Warn about comparisons with runs that the record of a sweep is not about, and about runs that it misses.

    `finished` are the labels of the contenders with a finished run.
    """
    folders = {members[label].folder for label in finished if label in members}
    others = [label for label in finished if label not in members]
    mixed = [label for label in finished if label in members and members[label].left_out]
    found = []
    if folders and (others or len(folders) > 1):
        names = ", ".join(sorted(printable(folder.name) for folder in folders))
        found.append(
            f"Results decided how many seeds the contenders of {names} got: tests of one of them and a contender from "
            "elsewhere do not account for this, and their p-values are too small."
        )
    if mixed:
        found.append(
            f"More runs than those of a sweep until certain: {', '.join(mixed)}; the sequential tests leave them out."
        )
    missing = [f"{member.name}-s{seed}" for member in members.values() for seed in member.missing]
    if missing:
        found.append(
            f"Runs that a sweep until certain has looked at are missing: {', '.join(missing)}; the sequential tests "
            "end before their seeds."
        )
    return found
