"""Evidence rules of public benchmarks: when runs show that an optimizer reaches a loss. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ROUNDING = 1e-9  # in float64, 3.28 - 3.276 is below 0.004


@dataclass(frozen=True)
class EvidenceRule:
    """A one-sided z-test over all n runs of a contender: `(target - mean final loss) * sqrt(n) >= threshold`."""

    name: str
    target: float
    """Validation loss to reach."""
    threshold: float
    """The critical value of z times the known standard deviation of a run's final loss."""
    settings: Mapping[str, object]
    """Values, by dotted key, that a run must have."""

    def margin(self, mean: float, count: int) -> float:
        """Return `(target - mean) * sqrt(count)`."""
        return (self.target - mean) * math.sqrt(count)

    def is_met(self, mean: float, count: int) -> bool:
        """Return whether runs with this mean show that the target is reached."""
        return self.margin(mean, count) >= self.threshold - _ROUNDING

    def runs_needed(self, mean: float) -> int | None:
        """Return the smallest number of runs with this mean that meets the rule; None if no number does."""
        gap = self.target - mean
        return math.ceil(((self.threshold - _ROUNDING) / gap) ** 2) if gap > _ROUNDING else None

    @property
    def sentence(self) -> str:
        """The rule as text."""
        return (
            f"Rule {self.name}: ({self.target:g} − mean final loss) · √n ≥ {self.threshold:g} over all n runs of a "
            "contender, which were not selected, at a stopping step that was fixed in advance."
        )


RULES = {
    rule.name: rule
    for rule in (
        # modded-nanogpt's track 3: standard deviation 0.0013 and p < 0.001.
        EvidenceRule(
            "track3",
            target=3.28,
            threshold=0.004,
            settings={
                "data.order": "sequential",
                "model.context_length": 1024,
                "training.batch_size": 512,
                "evaluation.tokens": 10_485_760,
            },
        ),
    )
}
"""Rules by name."""
