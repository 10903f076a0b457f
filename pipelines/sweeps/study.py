"""What is tried and what came of it, in a storage of optuna's that several workers share.

A claim is a trial of a study. optuna numbers them one after another, and its storages write a new one whole: its
number, its worker and what it chose, at once. So all workers see the same list, in the same order, and `Claims.held` is
a function of that list alone: a claim holds unless one with a lower number has made the same choice, or as many as the
budget hold before it. Later claims change nothing about it. Therefore no two workers run the same, and no budget is
exceeded, whatever they do at the same moment.
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
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial
from sqlalchemy.exc import IntegrityError

from pipelines.sweeps.journal import open_journal

_LOCK_WAIT_S = 60.0
_ATTEMPTS = 10
_ATTEMPT_S = 0.5
_NEEDS = {"cmaes": "cmaes", "gp": "scipy", "qmc": "scipy"}
_HOLDING = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
Space = Mapping[str, BaseDistribution]

optuna.logging.set_verbosity(optuna.logging.ERROR)


@dataclass(frozen=True)
class Worker:
    """A sweep at work in a folder."""

    id: str
    """Stays the same for the folder."""
    place: str
    """For people: machine and folder."""


def open_storage(storage: str | None, journal: Path) -> BaseStorage:
    """The database at a URL, or a journal file: the one that is named, or else `journal`.

    Raises `UsageError` for a database that cannot be used, or a file that is no journal.
    """
    if storage is None or storage.endswith(".log"):
        return open_journal(journal if storage is None else Path(storage).expanduser())
    for _ in range(_ATTEMPTS):
        try:
            return optuna.storages.get_storage(_database(storage))
        except Exception as error:  # of SQLAlchemy, and of any driver
            reason = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
            if not (isinstance(error, IntegrityError) or "already exists" in str(error)):
                break
            time.sleep(_ATTEMPT_S)  # two workers come first at the same moment, and both make the tables
    raise UsageError(f"search.storage: cannot be opened: {reason}")


def _database(url: str) -> RDBStorage:
    if url.startswith("sqlite"):
        return RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCK_WAIT_S}})
    return RDBStorage(url, engine_kwargs={"pool_pre_ping": True})  # the server may have hung up during a long run


class Claims:
    """The trials of one study; each a claim to run something."""

    def __init__(self, storage: BaseStorage, name: str, budget: int | None = None, pruner: BasePruner | None = None):
        self._study = optuna.create_study(
            storage=storage, study_name=name, load_if_exists=True, pruner=pruner or NopPruner(), sampler=RandomSampler()
        )
        self._storage = storage
        self._id = storage.get_study_id_from_name(name)
        self._budget = budget

    @property
    def definition(self) -> Any:
        """What the first worker has written of what is searched; None for a new study."""
        return self._study.user_attrs.get("definition")

    def define(self, definition: Any) -> None:
        """Write what is searched."""
        self._study.set_user_attr("definition", definition)

    def held(self) -> list[FrozenTrial]:
        """The claims that hold, in their order."""
        held: list[FrozenTrial] = []
        choices: list[Any] = []
        for trial in sorted(self._study.get_trials(deepcopy=False, states=_HOLDING), key=lambda trial: trial.number):
            choice = trial.user_attrs.get("choice")
            if (choice is None or choice not in choices) and len(held) != self._budget:
                held.append(trial)
                choices.append(choice)
        return held

    def add(self, worker: Worker, choice: Any, params: Mapping[str, Any], space: Space) -> FrozenTrial | None:
        """Claim a choice (None: any is welcome); returns None where another worker was first."""
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
        """What the sampler chooses for a claim; the same again for one that has been asked for already."""
        self._study.sampler = sampler
        with _no_warnings():
            trial = self._trial(number)
            return {setting: _suggest(trial, setting, distribution) for setting, distribution in space.items()}

    def report(self, number: int, step: int, loss: float) -> bool:
        """Record a validation loss; returns whether the pruner gives the run up."""
        with _no_warnings():
            trial = self._trial(number)
            trial.report(loss, step)
            return trial.should_prune()

    def finish(self, number: int, loss: float) -> None:
        """The claim is done."""
        self._study.tell(number, loss)

    def prune(self, number: int) -> None:
        """The claim is done, with the last loss reported."""
        self._study.tell(number, state=TrialState.PRUNED)

    def leave(self, number: int, why: str | None) -> None:
        """Tell the other workers why the claim's run stands still; None: it goes on."""
        self._storage.set_trial_user_attr(self._trial_id(number), "left", why)

    def _trial(self, number: int) -> Trial:
        return Trial(self._study, self._trial_id(number))

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)


def require_sampler(name: str) -> None:
    """`UsageError` if the sampler needs a package that is not there."""
    package = _NEEDS.get(name)
    if package is not None and find_spec(package) is None:
        raise UsageError(f'search.sampler = "{name}" needs {package}: pip install {package}')


def make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """One of optuna's for one trial: what it draws depends on seed and number, not on what this process drew before."""
    drawn = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if name == "cmaes":
        from pipelines.sweeps.cma_sampler import CmaSampler  # needs a package that the others do not

        return CmaSampler(drawn)
    kinds: dict[str, type[Any]] = {"tpe": TPESampler, "random": RandomSampler, "gp": GPSampler, "qmc": QMCSampler}
    with _no_warnings():
        sampler: BaseSampler = kinds[name](seed=drawn)
    return sampler


def make_pruner(name: str, first_step: int, last_step: int) -> BasePruner:
    """One of optuna's, for losses that are reported between the two steps."""
    if name == "median":
        return MedianPruner()
    if name == "hyperband":
        return HyperbandPruner(min_resource=first_step, max_resource=last_step)
    if name == "successive-halving":
        return SuccessiveHalvingPruner(min_resource=first_step)
    return NopPruner()


def between(low: float, high: float, *, log: bool) -> BaseDistribution:
    """All numbers between two; whole ones if both are `int`."""
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log=log)
    return FloatDistribution(low, high, log=log)


def one_of(values: Sequence[Any]) -> BaseDistribution:
    """One of a few."""
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
    """Of parts of optuna that may change, and of losses that are reported again after a kill."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
