"""What training programs print: nanoGPT, nanochat, modded-nanogpt (its track 3, too) and llm.c."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from pipelines.analysis.comparison.logs.log import Log, Place, Series, columns_of
from pipelines.training.metrics import Split

_NUMBER = rb"[-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf)"
_RANK = rb"^(?:\[rank0\]: ?)?"
"""Lines start so: a program that prints its own code has its format strings there too, though not at the start."""


def _pattern(line: bytes) -> re.Pattern[bytes]:
    """Compile a line in which `<name>` is a number."""
    return re.compile(_RANK + re.sub(rb"<(\w+)>", lambda name: rb"(?P<%s>%s)" % (name[1], _NUMBER), line), re.M | re.I)


PROGRAMS: Mapping[str, tuple[re.Pattern[bytes], ...]] = {
    "nanoGPT": (
        _pattern(rb"step <step>: train loss [^,\n]*, val loss <val>"),
        _pattern(rb"iter <step>: loss <train>(?:, time <step_ms>ms)?"),
    ),
    "nanochat": (
        _pattern(rb"step <step>(?:/<steps>)? \([^)\n]*\) \| loss: <train>[^\n]*?\| dt: <step_ms>ms"
                 rb"(?:[^\n]*?\| total time: <minutes>m)?"),
        _pattern(rb"step <step> \| validation bpb: <bpb>"),
    ),
    "modded-nanogpt": (
        _pattern(rb"step:<step>/<steps> val_loss:<val>(?:[^\n]*? train_time:(?:<ms>ms|<seconds>s))?"),
        _pattern(rb"step:<step>/<steps> train_loss:<train>(?:[^\n]*? train_time:(?:<ms>ms|<seconds>s))?"),
    ),
    "llm.c": (
        _pattern(rb"s:<step> tel:<val>"),
        _pattern(rb"s:<step> trl:<train>"),
    ),
}  # fmt: skip
"""The lines of each program."""

_METRICS: Mapping[str, tuple[Split, str]] = {
    "train": ("train", "loss"),
    "val": ("val", "loss"),
    "bpb": ("val", "bpb"),
}
_PROGRESS = {
    "step_ms": ("step_ms", 1.0),
    "ms": ("elapsed_s", 1e-3),
    "seconds": ("elapsed_s", 1.0),
    "minutes": ("elapsed_s", 60.0),
}
"""Quantity and factor."""


def read_text(content: bytes) -> list[Log]:
    """Return the run that one of the programs printed, the one with the most lines; none without such lines."""
    content = content.replace(b"\r", b"\n")  # a progress line that overwrites itself
    logs = [_read(content, patterns) for patterns in PROGRAMS.values()]
    best = max(logs, key=lambda log: len(log.columns["step"]))
    return [best] if len(best.columns["step"]) else []


def _read(content: bytes, patterns: tuple[re.Pattern[bytes], ...]) -> Log:
    found: dict[Place, list[tuple[float, float]]] = {}
    length = 0.0
    for pattern in patterns:
        for line in pattern.finditer(content):
            numbers = {name: float(text) for name, text in line.groupdict().items() if text is not None}
            step, length = numbers.pop("step"), max(length, numbers.pop("steps", 0.0))
            for name, number in numbers.items():
                quantity, factor = _PROGRESS.get(name, ("", 1.0))
                place = _METRICS.get(name) or (None, quantity)
                found.setdefault(place, []).append((step, number * factor))
    series: dict[Place, Series] = {
        place: (np.array([step for step, _ in pairs]), np.array([number for _, number in pairs]))
        for place, pairs in found.items()
    }
    return Log("", "", None, columns_of(series), int(length) if 0 < length < 1e15 else None)
