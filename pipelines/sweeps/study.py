"""Claims of runs, in an optuna storage that several workers share.

A claim is a trial of a study. optuna numbers trials consecutively, and its storages add a trial atomically, with its
number, worker and choice. All workers therefore see the same list in the same order, and `Claims.held` is a function of
that list alone: a claim is valid unless a lower number made the same choice, or the budget is used up by lower numbers.
Later claims do not change this. So no two workers run the same trial and no budget is exceeded, even if they act at
the same moment.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.errors import UsageError

try:
    import optuna
except ModuleNotFoundError:
    raise UsageError("a search needs optuna: pip install 'asgo[search]'") from None

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError

from pipelines.sweeps.journal import open_journal
from pipelines.tasks.metric import LOSS, Metric

_LOCK_WAIT_S = 60.0
_ATTEMPTS = 10
_ATTEMPT_S = 0.5
_NEEDS = {"cmaes": "cmaes", "gp": "scipy"}
_HOLDING = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
Space = Mapping[str, BaseDistribution]

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Worker:
    """A sweep command that runs in a folder."""

    id: str
    """Constant for the folder."""
    place: str
    """Machine and folder, for messages."""


def open_storage(storage: str | None, journal: Path) -> BaseStorage:
    """Open the database at a URL, or a journal FILE.log; `journal` if `storage` is None.

    Raises `UsageError` if the database cannot be opened, or the file is not a journal.
    """
    if storage is None or storage.endswith(".log"):
        return open_journal(journal if storage is None else Path(storage).expanduser())
    for _ in range(_ATTEMPTS):
        try:
            return optuna.storages.get_storage(_database(storage))
        except Exception as error:  # SQLAlchemy's, or a database driver's
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            if not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                break
            time.sleep(_ATTEMPT_S)  # race: two workers create the tables at the same time
    raise UsageError(f"search.storage: cannot be opened: {reason}")


def _database(url: str) -> RDBStorage:
    if url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_WAIT_S}})
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # servers close idle connections


class Claims:
    """The trials of one study; each is a claim of a run."""

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        budget: int | None = None,
        pruner: BasePruner | None = None,
        metric: Metric = LOSS,
    ):
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            load_if_exists=True,
            pruner=pruner or NopPruner(),
            sampler=RandomSampler(),
            direction=metric.either("minimize", "maximize"),
        )
        self._storage = storage
        self._id = storage.get_study_id_from_name(name)
        self._budget = budget

    @property
    def definition(self) -> Any:
        """The search's definition, which the first worker wrote; None for a new study."""
        return self._study.user_attrs.get("definition")

    def define(self, definition: Any) -> None:
        """Store the search's definition."""
        self._study.set_user_attr("definition", definition)

    @property
    def extended(self) -> int | None:
        """Number of trials to which the search was extended; None if it was not."""
        trials: int | None = self._study.user_attrs.get("trials")
        return trials

    def extend(self, trials: int) -> None:
        """Store a larger number of trials than that of the definition."""
        self._study.set_user_attr("trials", trials)

    def held(self) -> list[FrozenTrial]:
        """Return the valid claims, in the order of their numbers."""
        held: list[FrozenTrial] = []
        choices: list[Any] = []
        for trial in sorted(self._study.get_trials(deepcopy=False, states=_HOLDING), key=lambda trial: trial.number):
            choice = trial.user_attrs.get("choice")
            if (choice is None or choice not in choices) and len(held) != self._budget:
                held.append(trial)
                choices.append(choice)
        return held

    def add(self, worker: Worker, choice: Any, params: Mapping[str, Any], space: Space) -> FrozenTrial | None:
        """Claim a choice; None if the sampler chooses later. Returns None if another worker was first."""
        attributes = {"worker": worker.id, "place": worker.place, "choice": choice}
        template = create_trial(
            state=TrialState.RUNNING, params=dict(params), distributions=dict(space), user_attrs=attributes
        )
        trial = self._storage.get_trial(self._storage.create_new_trial(self._id, template))
        if any(other.number == trial.number for other in self.held()):
            return trial
        self._study.tell(trial.number, state=TrialState.FAIL)
        return None

    def sample(self, number: int, space: Space, sampler: BaseSampler) -> dict[str, Any]:
        """Return the settings that the sampler chooses for a claim. A second call returns the same."""
        self._study.sampler = sampler
        with _no_warnings():
            trial = self._trial(number)
            return {setting: _suggest(trial, setting, distribution) for setting, distribution in space.items()}

    def report(self, number: int, step: int, value: float) -> bool:
        """Report a validation; returns whether to prune the run."""
        with _no_warnings():
            trial = self._trial(number)
            trial.report(value, step)
            return trial.should_prune()

    def finish(self, number: int, value: float) -> None:
        """Mark the claim as complete, with its final value."""
        self._study.tell(number, value)

    def prune(self, number: int) -> None:
        """Mark the claim as pruned, with the last reported value."""
        self._study.tell(number, state=TrialState.PRUNED)

    def leave(self, number: int, reason: str | None) -> None:
        """Store why the claim's run stopped, for other workers; None if it runs."""
        self._storage.set_trial_user_attr(self._trial_id(number), "left", reason)

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)


def require_sampler(name: str) -> None:
    """Raise `UsageError` if the sampler needs a package that is not installed."""
    package = _NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        raise UsageError(f'search.sampler = "{name}" needs {package}: pip install {package}')


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """Return a sampler for one trial: its samples depend on seed and number, not on earlier samples of this process."""
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if name == "cmaes":
        from pipelines.sweeps.cma_sampler import CmaSampler  # needs a package that the others do not

        return CmaSampler(drawn)
    kinds: dict[str, type[Any]] = {"tpe": TPESampler, "random": RandomSampler, "gp": GPSampler}
    with _no_warnings():
        sampler: BaseSampler = kinds[name](seed=drawn)
    return sampler


def make_pruner(name: str, first_step: int, last_step: int) -> BasePruner:
    """Return a pruner for values that are reported from `first_step` to `last_step`."""
    if name == "median":
        return MedianPruner()
    if name == "hyperband":
        return HyperbandPruner(min_resource=first_step, max_resource=last_step)
    if name == "successive-halving":
        return SuccessiveHalvingPruner(min_resource=first_step)
    return NopPruner()


def between(low: float, high: float, *, log: bool) -> BaseDistribution:
    """Return the distribution of numbers in a range; integers if both ends are `int`."""
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def one_of(values: Sequence[Any]) -> BaseDistribution:
    """Return the distribution of a few values."""
    return CategoricalDistribution(values)


def _suggest(trial: Trial, setting: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return trial.suggest_categorical(setting, distribution.choices)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(setting, distribution.low, distribution.high, log=distribution.log)
    assert isinstance(distribution, FloatDistribution)
    return trial.suggest_float(setting, distribution.low, distribution.high, log=distribution.log)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress optuna's warnings: of experimental parts, and of values that are reported again after a kill."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
