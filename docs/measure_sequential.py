"""Measures the rule of `asgo sweep --until-certain` on simulated comparisons: false verdicts, power, and seeds.

python docs/measure_sequential.py                        # 10,000 comparisons a row
python docs/measure_sequential.py --comparisons 1000

A final loss is the contender's mean, plus noise that all runs of a seed share, plus noise of the run. Differences of
means are in standard deviations of the difference between two runs of one seed. Beside the rule stand, both with paired
t-tests and Holm's correction: one test after all seeds, and a test after every seed as if it were the only one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr

from pipelines.analysis.comparison.sequential import Looks
from pipelines.sweeps.until_certain import FIRST, MOST

ALPHA = 0.05
LOOKS = Looks(FIRST, tuple(range(MOST)))
COUNTS = range(FIRST, MOST + 1)
SPENT = np.array([LOOKS.share(count) for count in COUNTS])
Array = npt.NDArray[np.float64]
Noise = Callable[[np.random.Generator, tuple[int, ...]], Array]


def normal(chance: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Noise of the runs, `(comparison, contender, seed)`, with standard deviation 1."""
    return chance.standard_normal(shape)


def heavy(chance: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Heavy tails: Student's t with 5 degrees of freedom, with standard deviation 1."""
    return chance.standard_t(5, shape) * np.sqrt(3 / 5)


def unequal(chance: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Standard deviations from 0.25 to 4: the last contender's is 16 times the first's."""
    return chance.standard_normal(shape) * np.geomspace(0.25, 4, shape[1])[:, None]


NOISES: dict[str, Noise] = {"normal": normal, "t(5)": heavy, "unequal": unequal}


@dataclass(frozen=True)
class Decisions:
    """Of a rule in each comparison."""

    at: npt.NDArray[np.int64]
    """Number of seeds at which a pair is decided, `(comparison, pair)`; 0 if undecided."""
    sign: Array
    """Sign of the pair's difference at that look, first minus second."""

    @property
    def power(self) -> float:
        """Fraction of pairs that are decided."""
        return float((self.at > 0).mean())

    def wrong(self, sign: Array) -> float:
        """Return the fraction of comparisons with a verdict that contradicts the true signs, `(pair,)`; 0 is equal."""
        return float(((self.at > 0) & (self.sign != sign)).any(axis=1).mean())

    def seeds(self, pairs: Sequence[tuple[int, int]], contenders: int) -> float:
        """Return the mean number of seeds of a contender: until all its pairs are decided."""
        trained = np.where(self.at > 0, self.at, MOST)
        own = [trained[:, [contender in pair for pair in pairs]].max(axis=1) for contender in range(contenders)]
        return float(np.mean(own))


def losses(chance: np.random.Generator, means: Array, noise: Noise, comparisons: int) -> Array:
    """Return final losses, `(comparison, contender, seed)`."""
    shape = (comparisons, len(means), MOST)
    shared = noise(chance, (comparisons, 1, MOST))
    return means[:, None] * np.sqrt(2) + shared + noise(chance, shape)


def tests(differences: Array) -> tuple[Array, Array]:
    """Return p and sign of paired t-tests, `(comparison, pair, look)`, of differences `(comparison, pair, seed)`."""
    ps, signs = [], []
    for count in COUNTS:
        seen = differences[..., :count]
        mean, error = seen.mean(axis=-1), seen.std(axis=-1, ddof=1) / np.sqrt(count)
        ps.append(2 * stdtr(count - 1, -np.abs(mean / error)))
        signs.append(np.sign(mean))
    return np.stack(ps, axis=-1), np.stack(signs, axis=-1)


def holm_rejects(ps: Array) -> npt.NDArray[np.bool_]:
    """Return what Holm's procedure rejects, along axis 1."""
    order = np.argsort(ps, axis=1)
    ordered = np.take_along_axis(ps, order, axis=1)
    remaining = np.arange(ps.shape[1], 0, -1)
    rejected = np.logical_and.accumulate(ordered < ALPHA / remaining, axis=1)
    back = np.empty_like(rejected)
    np.put_along_axis(back, order, rejected, axis=1)
    return back


def decide(ps: Array, signs: Array) -> Decisions:
    """Test after each look with the p-values `(comparison, pair, look)`; a pair that is decided stays decided."""
    at = np.zeros(ps.shape[:2], np.int64)
    sign = np.zeros(ps.shape[:2])
    for look, count in enumerate(COUNTS):
        new = holm_rejects(ps[..., look]) & (at == 0)
        at[new], sign[new] = count, signs[..., look][new]
    return Decisions(at, sign)


def rules(ps: Array, signs: Array) -> dict[str, Decisions]:
    """Return the decisions of the rule, of one test after all seeds, and of a test after every seed."""
    only_last = np.ones_like(ps)
    only_last[..., -1] = ps[..., -1]
    quotients = ps / SPENT
    smallest = np.minimum.accumulate(quotients, axis=-1)
    deciding = np.maximum.accumulate(np.where(quotients == smallest, np.arange(len(COUNTS)), 0), axis=-1)
    return {
        "until certain": decide(smallest, np.take_along_axis(signs, deciding, axis=-1)),
        "fixed": decide(only_last, signs),
        "naive": decide(ps, signs),
    }


def simulate(means: Array, against: bool, noise: Noise, comparisons: int, seed: int) -> Iterator[tuple[str, str]]:
    """Yield the cells of a row."""
    pairs = [(index, 0) for index in range(1, len(means))] if against else list(combinations(range(len(means)), 2))
    first, second = np.array(pairs).T
    values = losses(np.random.default_rng(seed), means, noise, comparisons)
    found = rules(*tests(values[:, first] - values[:, second]))
    true_signs = np.sign(means[first] - means[second])
    for name, decisions in found.items():
        yield f"wrong, {name}", f"{decisions.wrong(true_signs):.2%}"
    if true_signs.any():
        for name, decisions in found.items():
            yield f"decided, {name}", f"{decisions.power:.1%}"
        yield "seeds", f"{found['until certain'].seeds(pairs, len(means)):.2f}"


def show(title: str, rows: Sequence[Sequence[tuple[str, str]]]) -> None:
    """Print rows as a Markdown table."""
    heads = [head for head, _ in rows[0]]
    lines = [heads, ["---:"] * len(heads), *([text for _, text in row] for row in rows)]
    print(f"\n{title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)  # noqa: T201


def main() -> None:
    """Parse the options, simulate, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=10_000)
    count, began = parser.parse_args().comparisons, time.monotonic()
    kinds = [(2, False), (9, False), (9, True)]
    labels = {(2, False): "2", (9, False): "9, all pairs", (9, True): "9, against one"}
    equal = [
        [("contenders", labels[kind]), ("noise", name), *simulate(np.zeros(kind[0]), kind[1], noise, count, 0)]
        for kind in kinds
        for name, noise in NOISES.items()
    ]
    some = np.array([0.0] * 5 + [5.0, 10.0, 15.0, 20.0])
    cells = [cell for cell in simulate(some, False, normal, count, 0) if cell[0].startswith("wrong")]
    equal.append([("contenders", "9, of which 5 equal"), ("noise", "normal"), *cells])
    show(f"Equal contenders: comparisons with a false verdict, of {count:,}", equal)
    apart = []
    for kind in kinds:
        for difference in (0.8, 1.2, 1.6, 2.0, 3.0, 5.0, 10.0):
            means = difference * np.arange(kind[0]) if not kind[1] else np.array([0.0, *[difference] * (kind[0] - 1)])
            cells = simulate(means, kind[1], normal, count, 1)
            apart.append([("contenders", labels[kind]), ("difference", f"{difference:g}"), *cells])
    show("Unequal contenders: neighbours, or all others and the one, differ", apart)
    print(f"\n{time.monotonic() - began:.0f} s")  # noqa: T201


if __name__ == "__main__":
    main()
