"""Optimizers of other libraries and of the user train, are saved and resume exactly."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from pipelines.analysis.comparison.read_runs import read_run
from pipelines.analysis.comparison.settings import identity, settings_of
from pipelines.config import GPTRunConfig, RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.imported_optimizers import import_optimizer
from pipelines.training.checkpoint import open_checkpoint
from pipelines.training.imported import ImportedOptimizer
from pipelines.training.lineage import BranchPoint
from pipelines.training.packing import CannotPack, pack, same, unpack
from pipelines.training.run_folder import RunFolder
from pipelines.training.train import plan, train
from tests.conftest import SilentReporter
from tests.long import sampled
from tests.pipelines.training.test_kills import finish, start, wait_for_records
from tests.pipelines.training.test_resume import assert_same_run, final_tensors

Make = Callable[..., RunConfig]

SOPHIA = """
import torch

class SophiaG(torch.optim.Optimizer):
    '''Sophia (arXiv 2305.14342) with squared gradients as the estimate of the curvature, taken every 2nd step.'''

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), rho=0.04, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["calls"] = group.get("calls", 0) + 1
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["moments"] = [torch.zeros_like(param), torch.zeros_like(param)]
                    state["of"] = {"shape": tuple(param.shape), "name": None}
                momentum, curvature = state["moments"]
                momentum.lerp_(param.grad, 1 - group["betas"][0])
                if group["calls"] % 2 == 1:
                    curvature.lerp_(param.grad.square(), 1 - group["betas"][1])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                ratio = (momentum / (group["rho"] * curvature + 1e-12)).clamp_(-1, 1)
                param.add_(ratio, alpha=-group["lr"])
"""

KEEPS_A_SECRET = """
import torch

class Forgetful(torch.optim.SGD):
    '''Its steps depend on an attribute that is not in its state_dict.'''

    count = 0

    def step(self, closure=None):
        self.count += 1
        self.param_groups[0]["momentum"] = 1 / (1 + self.count)
        super().step()
        self.param_groups[0]["momentum"] = 0.0
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of the user into the working directory and return its path."""
    monkeypatch.chdir(tmp_path)

    def write(text: str, name: str = "mine.py") -> str:
        Path(name).write_text(text)
        return f"./{name}"

    return write


def library(name: str) -> str:
    pytest.importorskip("pytorch_optimizer")
    return f"pytorch_optimizer.{name}"


LIBRARY = ["SOAP", "Kron", "Lion", "AdEMAMix", "MARS", "Prodigy", "ScheduleFreeAdamW"]


@pytest.mark.parametrize(
    "name", [*sampled(LIBRARY, "SOAP", "Kron", "Prodigy", "ScheduleFreeAdamW"), "torch.Adafactor", "SophiaG"]
)
def test_a_killed_run_resumes_exactly(
    name: str, module: Callable[[str], str], small_config: Make, tmp_path: Path
) -> None:
    own = module(SOPHIA)
    path = f"{own}:SophiaG" if name == "SophiaG" else name if "." in name else library(name)
    config = small_config(
        optimizer__name=path, optimizer__lr=1e-3, training__steps=12, checkpoint__every=2, evaluation__every=5,
        model__dropout=0.1, training__micro_batch_size=2,
    )  # fmt: skip
    finish(config, tmp_path / "whole")
    process = start(config, tmp_path / "killed")
    wait_for_records(process, tmp_path / "killed", 7)
    process.kill()
    process.join()
    assert not (tmp_path / "killed" / "checkpoints" / "step-00000012").exists()
    finish(config, tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 12)
    values = [
        open_checkpoint(tmp_path / run / "checkpoints" / "step-00000012").state["optimizer_scalars"]
        for run in ("whole", "killed")
    ]
    assert values[0] == values[1]


def test_the_code_is_kept_with_its_hash_and_must_be_the_same_on_resume(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = module(SOPHIA)
    config = small_config(optimizer__name=f"{path}:SophiaG", optimizer__rho=0.1)
    assert config.optimizer.lr == 1e-3  # the constructor's default is recorded
    train(config, tmp_path / "run", reporter)
    assert (tmp_path / "run" / "optimizer" / "mine.py").read_text() == SOPHIA
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["config"]["optimizer"]["rho"] == 0.1
    assert record["optimizer_source"]["file"] == "mine.py"
    # Another process reads the new file.
    Path(path).write_text(SOPHIA + "\n# changed\n")
    with pytest.raises(UsageError, match=r"other code .*mine.py has now; restore it \(a copy is in .*run/optimizer"):
        train(config, tmp_path / "run", reporter, resume=True)


def test_a_run_is_read_without_its_optimizer(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = module(SOPHIA)
    train(small_config(optimizer__name=f"{path}:SophiaG"), tmp_path / "run", reporter)
    Path(path).write_text("raise SystemExit('executed')")
    for run in (tmp_path / "run" / "optimizer").iterdir():
        run.write_text("raise SystemExit('executed')")
    assert RunFolder(tmp_path / "run").config().optimizer.name == f"{path}:SophiaG"
    assert GPTRunConfig.model_validate_json(RunFolder(tmp_path / "run").config().model_dump_json())


def test_what_cannot_be_resumed_exactly_says_so_before_it_trains(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = module(KEEPS_A_SECRET)
    config = small_config(optimizer__name=f"{path}:Forgetful", optimizer__lr=0.1)
    train(config, tmp_path / "run", reporter)
    assert "cannot be resumed exactly" in reporter.notes[0]
    with_function = KEEPS_A_SECRET.replace('["momentum"] = 0.0', '["momentum"] = 0.0\n        self.state["x"] = print')
    config = small_config(optimizer__name=f"{module(with_function, 'other.py')}:Forgetful", optimizer__lr=0.1)
    with pytest.raises(UsageError, match="cannot be saved: /state/0 is a builtins"):
        train(config, tmp_path / "other", reporter)
    assert not (tmp_path / "other" / "config.json").exists()


def test_schedule_free_weights_are_validated_and_exported(
    small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """A checkpoint has the weights that are trained and those that are evaluated, and validating changes neither."""
    name = library("ScheduleFreeAdamW")
    often = small_config(optimizer__name=name, optimizer__lr=0.05, evaluation__every=1, checkpoint__every=1)
    train(often, tmp_path / "often", reporter)
    rarely = small_config(optimizer__name=name, optimizer__lr=0.05, evaluation__every=6, checkpoint__every=6)
    train(rarely, tmp_path / "rarely", reporter)
    folders = [tmp_path / run / "checkpoints" / "step-00000006" for run in ("often", "rarely")]
    for file in ("model", "average", "optimizer"):
        one, other = (safetensors.torch.load_file(folder / f"{file}.safetensors") for folder in folders)
        assert same(one, other), file
    trained = safetensors.torch.load_file(folders[0] / "model.safetensors")
    evaluated = open_checkpoint(folders[0]).model_tensors()
    assert not same(trained, evaluated)


@pytest.mark.parametrize(
    ("text", "class_name", "message"),
    [
        ("1 / 0", "A", "it does not import: ZeroDivisionError"),
        ("import sys; sys.exit('bye')", "A", "it does not import: SystemExit: bye"),
        ("import nonesuch", "A", "it does not import: ModuleNotFoundError: No module named 'nonesuch'"),
        ("class A: pass", "A", "not a subclass of torch.optim.Optimizer"),
        ("class A: pass", "B", "unknown optimizer of ./bad.py: 'B'"),
        (
            "import torch\nclass A(torch.optim.Optimizer):\n  def __init__(self, params): super().__init__(params, {})",
            "A",
            "no keyword lr",
        ),
        (
            "import torch\nclass A(torch.optim.SGD):\n  def step(self, closure): pass",
            "A",
            "needs a closure",
        ),
    ],
)
def test_what_is_no_optimizer_is_one_line(
    text: str, class_name: str, message: str, module: Callable[..., str], small_config: Make
) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        small_config(optimizer__name=f"{module(text, 'bad.py')}:{class_name}", optimizer__lr=0.1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__name": "nonesuch.Lion"}, "nonesuch is not installed: pip install nonesuch"),
        ({"optimizer__name": "torch.AdamWW"}, "unknown optimizer of torch.optim: 'AdamWW'; did you mean 'AdamW'"),
        ({"optimizer__name": "torch.AdamW", "optimizer__wait_decay": 0.1}, "did you mean 'weight_decay'"),
        ({"optimizer__name": "torch.AdamW", "runtime__shard_model": True}, "works with asgo's own optimizers"),
    ],
)
def test_wrong_settings_are_one_line(changes: dict[str, Any], message: str, small_config: Make) -> None:
    with pytest.raises(UsageError, match=message) as raised:
        small_config(**changes)
    assert "\n" not in str(raised.value)


def test_values_keep_their_kinds() -> None:
    tensors: dict[str, torch.Tensor] = {}
    value: dict[Any, Any] = {
        0: [torch.ones(2), None, (1, 2.5)],
        "a": {3: {4, 5}, (1, 2): "x"},
        "nan": [float("nan"), float("inf"), True, 2**70, torch.ones(2, dtype=torch.bfloat16)],
        "numpy": [np.arange(3.0), np.float64(0.1), np.int32(4), torch.ones(2, 3).shape],
    }
    packed = json.loads(json.dumps(pack(value, "state", tensors)))
    value["numpy"][3] = (2, 3)
    assert same(unpack(packed, tensors), value)
    assert not same([1.0], [float("nan")])
    assert not same([float("nan")], [1.0])
    assert type(unpack(packed, tensors)["a"][3]) is set
    with pytest.raises(CannotPack, match="state is a builtins"):
        pack(lambda: 0, "state", tensors)


def test_a_branch_keeps_the_state_unless_a_keyword_may_change_its_shape(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = module(SOPHIA)
    config = small_config(optimizer__name=f"{path}:SophiaG", optimizer__lr=1e-3)
    train(config, tmp_path / "trunk", reporter)
    point = BranchPoint(tmp_path / "trunk", 4)
    train(config, tmp_path / "same", reporter, branch=point)
    assert_same_run(tmp_path / "trunk", tmp_path / "same")
    for changes, is_new in (({"optimizer__lr": 2e-3}, False), ({"optimizer__rho": 0.1}, True)):
        reporter.notes.clear()
        other = small_config(**{"optimizer__name": f"{path}:SophiaG", "optimizer__lr": 1e-3, **changes})
        train(other, tmp_path / f"new-{is_new}", reporter, branch=point)
        assert any("with a new state" in note for note in reporter.notes) == is_new


def test_an_error_in_a_step_is_one_line_and_leaves_the_checkpoint(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    text = "import torch\nclass Late(torch.optim.SGD):\n    def step(self, closure=None):\n        super().step()\n"
    text += "        group = self.param_groups[0]\n        group['calls'] = group.get('calls', 0) + 1\n"
    text += "        if group['calls'] == 27: raise KeyError('gone')\n"
    config = small_config(optimizer__name=f"{module(text)}:Late", optimizer__lr=0.1, training__steps=30)
    with pytest.raises(AsgoError, match="step 27: the optimizer, Late, raises KeyError: 'gone'; earlier checkpoints"):
        train(config, tmp_path / "run", reporter)
    assert RunFolder(tmp_path / "run").rows()[-1]["step"] == 26


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__clip": float("inf")}, "clip = inf: must be a finite number"),
        ({"optimizer__nesterov": "maybe"}, "its keyword nesterov takes true or false, not 'maybe'"),
        ({"optimizer__momentum": "much"}, "its keyword momentum takes a number, not 'much'"),
        ({"optimizer__parts__vectors__momentun": 7}, "unknown keyword in parts.vectors: 'momentun'; did you mean 'mom"),
        ({"optimizer__parts__vectors__lr": -1}, "parts.vectors: lr is -1; it must be a number >= 0"),
        (
            {"optimizer__name": "torch.SGD.x"},
            r"--optimizer torch\.SGD\.x: torch\.SGD does not import: ModuleNotFoundError",
        ),
    ],
)
def test_wrong_keywords_are_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    settings = {"optimizer__name": "torch.SGD", "optimizer__lr": 0.1, **changes}
    with pytest.raises(UsageError, match=message):
        train(small_config(**settings), tmp_path / "run", reporter)
    assert not (tmp_path / "run").exists()


ODD = """
import sys, torch
class Base(torch.optim.SGD):
    def __init__(self, params, lr=0.1, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
class NotCalled(Base):
    def __init__(self, params, lr=0.1): pass
class Exits(Base):
    def __init__(self, params, lr=0.1): sys.exit('bye')
class Grows(Base):
    def step(self, closure=None):
        super().step()
        if len(self.param_groups) < 9: self.add_param_group({'params': [torch.nn.Parameter(torch.ones(1))]})
class Large(Base):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for param in group['params']:
                if param.numel() > 100: self.state[param]['f'] = print
class BadEval(Base):
    def train(self): pass
    def eval(self): raise RuntimeError('no eval')
class Sparse(Base):
    def step(self, closure=None):
        super().step()
        for param in self.param_groups[0]['params']: self.state[param]['s'] = torch.ones(2).to_sparse()
class Keys(Base):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for param in group['params']:
                state = self.state[param]
                state['a/b'], state[''], state[3] = torch.ones(2), 4, (1, {2})
                group['lr'] = group['lr'] * 0.5
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NotCalled", "its constructor fails: UsageError|does not call that of torch.optim.Optimizer"),
        ("Exits", "its constructor fails: SystemExit: bye"),
        ("Grows", "adds parameters or groups in a step"),
        ("Large", "the state of the optimizer, Large, cannot be saved: .*/f is a builtins"),
        ("BadEval", "a step with it raises RuntimeError: no eval"),
        ("Sparse", "cannot be saved: .*/s is a tensor that safetensors cannot store"),
    ],
)
def test_an_odd_optimizer_is_refused_in_one_line_at_its_first_step(
    name: str, message: str, module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config(optimizer__name=f"{module(ODD)}:{name}", checkpoint__every=100)
    with pytest.raises(AsgoError, match=message) as raised:
        train(config, tmp_path / "run", reporter)
    assert "\n" not in str(raised.value)


def test_odd_keys_and_a_changed_rate_are_saved_without_a_warning(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    config = small_config(optimizer__name=f"{module(ODD)}:Keys")
    train(config, tmp_path / "run", reporter)
    assert not any("exactly" in note for note in reporter.notes)
    train(config, tmp_path / "same", reporter, branch=BranchPoint(tmp_path / "run", 4))
    assert_same_run(tmp_path / "run", tmp_path / "same")


def test_a_branch_that_splits_groups_keeps_their_state_and_one_of_edited_code_says_so(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """The counter of steps is in the groups: a new group with the same settings continues from its old one's."""
    path = module(SOPHIA)
    config = small_config(optimizer__name=f"{path}:SophiaG", optimizer__weight_decay=0.1)
    train(config, tmp_path / "trunk", reporter)
    split = small_config(
        optimizer__name=f"{path}:SophiaG", optimizer__weight_decay=0.1, optimizer__parts__embedding__lr=1e-3
    )
    point = BranchPoint(tmp_path / "trunk", 4)
    train(split, tmp_path / "split", reporter, branch=point)
    weights = [final_tensors(tmp_path / run) for run in ("trunk", "split")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not any("other code" in note for note in reporter.notes)
    config_file = tmp_path / "trunk" / "config.json"
    config_file.write_text(config_file.read_text().replace('"sha256": "', '"sha256": "0'))
    train(config, tmp_path / "edited", reporter, branch=point)
    assert any("has other code than in the parent" in note for note in reporter.notes)


def test_runs_with_other_code_are_other_contenders(
    module: Callable[[str], str], small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    path = module(SOPHIA)
    config = small_config(optimizer__name=f"{path}:SophiaG")
    train(config, tmp_path / "one", reporter)
    train(config.model_copy(update={"seed": 7}), tmp_path / "two", reporter)
    Path(path).write_text(SOPHIA + "# edited")
    train(config.model_copy(update={"seed": 8}), tmp_path / "edited", reporter)
    one, two, edited = (identity(settings_of(read_run(run, tmp_path / run))) for run in ("one", "two", "edited"))
    assert one == two != edited


@pytest.mark.parametrize("optimizer", ["muon", "torch.SGD"])
def test_a_preset_for_an_untied_head_trains_a_tied_one(
    optimizer: str, small_config: Make, tmp_path: Path, reporter: SilentReporter
) -> None:
    """The settings of the part head have no parameters then, and one warning says so."""
    settings: dict[str, Any] = {"optimizer__name": optimizer, "optimizer__lr": 0.1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        rows = train(small_config(**settings, optimizer__parts__head__lr=1.0), tmp_path / "tied", reporter)
    assert [str(each.message) for each in caught if "head" in str(each.message)] == [
        "optimizer.parts.head has no effect: with model.tied_head=true, the head has the weight of the embedding; "
        "optimizer.parts.embedding sets both"
    ]
    assert [row["loss"] for row in rows] == [
        row["loss"] for row in train(small_config(**settings), tmp_path / "plain", reporter)
    ]


def test_a_schedule_of_a_tied_head_is_an_error_and_no_warning(small_config: Make) -> None:
    config = small_config(optimizer__name="muon", schedule__parts__head__kind="linear")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"^schedule\.parts\.head: no parameter of the model is in this"):
            plan(config)


UNPICKLES = """
import pickle, torch
class Unpickles(torch.optim.SGD):
    '''Keeps pickled bytes in its state_dict and loads them, as heavyball does.'''
    def __init__(self, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.register_state_dict_post_hook(lambda _, content: content.update(own={"schedule": pickle.dumps(3)}))
        self.register_load_state_dict_pre_hook(lambda _, content: pickle.loads(content["own"]["schedule"]) and None)
"""


def test_a_forged_checkpoint_cannot_make_an_optimizer_unpickle_it(module: Callable[[str], str], tmp_path: Path) -> None:
    """Its own bytes are made by its constructor and not saved. An array of bytes would be unpickled too."""
    optimizer_class = import_optimizer(f"{module(UNPICKLES)}:Unpickles")
    weight = torch.nn.Parameter(torch.ones(2))
    imported = ImportedOptimizer(optimizer_class([weight]), {"weight": weight}, ["lr"])
    tensors: dict[str, torch.Tensor] = {}
    assert imported.gather_state(tensors) == {}
    imported.load_state(tensors, {})
    program = f"cos\nsystem\n(S'touch {tmp_path / 'executed'}'\ntR."
    forged = {"bytes": torch.tensor(list(program.encode()), dtype=torch.uint8)}
    values = {"/other": {"mapping": [["own", {"mapping": [["schedule", {"array": "bytes"}]]}]]}}
    with pytest.raises(AsgoError, match="'schedule' is not something that asgo saves"):
        imported.load_state(forged, values)
    assert not (tmp_path / "executed").exists()
