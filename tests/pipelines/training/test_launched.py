"""Who this process is among several, from variables that launchers set, and others too."""

from __future__ import annotations

import pytest

from pipelines.errors import UsageError
from pipelines.training.launched import Place, launched, local_rank

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
WRAPPER = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
TORCHRUN = {**WRAPPER, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of them is set."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "place"),
    [
        (TORCHRUN, Place(3, 4, 1, by_torchrun=True)),
        ({**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"}, Place(0, 1, 1, by_torchrun=True)),
        (WRAPPER, Place(3, 4, 0, by_torchrun=False)),
        ({}, None),
        ({"RANK": "1"}, None),
        ({"RANK": "1", "WORLD_SIZE": ""}, None),
        ({"WORLD_SIZE": "8"}, None),
        ({"LOCAL_RANK": "5", "MASTER_ADDR": "node-1"}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({**WRAPPER, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "5"}, None),
    ],
)
def test_several_processes_are_recognized_and_variables_that_mean_nothing_are_not(
    given: dict[str, str], place: Place | None, variables: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    assert launched() == place
    assert local_rank() == (0 if place is None else place.local_rank)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "1", "WORLD_SIZE": "2"}, r"^RANK=1 and WORLD_SIZE=2 are set, but not MASTER_ADDR and MASTER_PORT: "),
        ({**WRAPPER, "RANK": "4"}, r"^RANK=4 and WORLD_SIZE=4 are set, but ranks are 0 to 3; "),
        ({**WRAPPER, "WORLD_SIZE": "four"}, r"^WORLD_SIZE=four: not a number; "),
        ({**WRAPPER, "MASTER_PORT": "tcp://a:1"}, r"^MASTER_PORT=tcp://a:1: not a number; "),
    ],
)
def test_variables_that_contradict_each_other_are_one_line(
    given: dict[str, str], message: str, variables: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        variables.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        launched()
