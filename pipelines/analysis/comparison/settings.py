"""Settings in which runs differ, as short texts."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from pipelines.analysis.comparison.results import Run
from pipelines.config import MAY_CHANGE_ON_RESUME, RunConfig, flatten
from pipelines.storage import printable

Settings = Mapping[str, Any]
LR = "optimizer.lr"
_DATA = "data"
LOG = "log"
"""A setting that only the runs of logs have."""
_NOT_COMPARED = ("seed", "preset", "evaluation.every", "metrics.", *MAY_CHANGE_ON_RESUME)
"""Settings, or prefixes of settings, that change a run's result only by chance."""
_VAGUE = ("every", "kind", "name", "batches", "tokens")
"""Last parts of keys that are not clear without the first part."""


def settings_of(run: Run) -> Settings:
    """Return the settings that affect the result by more than chance, by dotted key.

    `data` is the fingerprint; `optimizer.code` that of an imported optimizer's file; `branch` says with which optimizer
    a branch began, and until which step. Of a run of a log, only the contender and the number of steps are known.
    """
    if run.config is None:
        return {"optimizer.name": run.optimizer, "training.steps": run.steps or "unknown", LOG: True}
    branch = ",".join(f"{ancestor.optimizer}@{ancestor.step}" for ancestor in run.lineage)
    code = {"optimizer.code": run.optimizer_sha256} if run.optimizer_sha256 else {}
    return {**settings_in(run.config), **code, _DATA: run.data.get("fingerprint"), "branch": branch or "no"}


def settings_in(config: RunConfig) -> dict[str, Any]:
    """Return those of `settings_of` that are in the configuration."""
    flat = flatten(config.model_dump(mode="json"))
    without_effect = {f"schedule.{key}" for key in config.schedule.without_effect}
    return {
        key: value for key, value in flat.items() if not key.startswith(_NOT_COMPARED) and key not in without_effect
    }


def identity(settings: Settings) -> str:
    """Return a text that is equal only for equal settings."""
    return json.dumps(settings, sort_keys=True)


def differing_keys(tables: Sequence[Settings]) -> list[str]:
    """Return the keys whose values differ between tables, in the order of the configuration."""
    keys = dict.fromkeys(key for table in tables for key in table)
    return [key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)]


def in_words(settings: Settings, keys: Iterable[str], rounded: Container[str] = ()) -> str:
    """Return a text such as `lr=0.01 d_model=256`, without absent keys.

    Numbers have all their digits, so that different values give different texts; those of the keys `rounded` have four.
    """
    return " ".join(f"{_short(key)}={_shown(key, settings[key], key in rounded)}" for key in keys if key in settings)


def _short(key: str) -> str:
    """Return the key without its table; with it if the rest is vague. Tables within tables stay."""
    return key if key.rpartition(".")[2] in _VAGUE else key.partition(".")[2] or key


def _shown(key: str, value: Any, rounded: bool) -> str:
    if key == _DATA:
        return str(value)[:8]
    if isinstance(value, float):
        exact = f"{value:g}" if float(f"{value:g}") == value else repr(value)
        return min(exact, f"{value:.4g}", key=len) if rounded else exact
    if isinstance(value, list):
        return ",".join(_shown(key, part, rounded) for part in value)
    return printable(value) if isinstance(value, str) else json.dumps(value)
