"""Which optimizers are measured, and how they are built."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

from optim import ASGO, AccAsro
from pipelines.benchmarks.peers import BASELINE, DEFAULT_NAMES, OURS, PEER_LIBRARIES, choose, parse_choice, versions
from pipelines.benchmarks.shapes import Matrices, build_model
from pipelines.errors import UsageError
from pipelines.optimizers import OWN_NAMES

ROOT = Path(__file__).parents[3]


def hide(monkeypatch: pytest.MonkeyPatch, *libraries: str) -> None:
    """Make libraries look as if they were not installed."""
    for library in libraries:
        monkeypatch.setitem(sys.modules, library, None)


def matrices() -> Matrices:
    return Matrices({"a": (4, 6), "b": (6, 4)})


def test_without_names_ours_and_torchs_are_measured_after_the_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *PEER_LIBRARIES)
    choices, left_out = choose([])
    names = [choice.name for choice in choices]
    assert names == [BASELINE, *(name for name in DEFAULT_NAMES if name.partition(".")[0] not in PEER_LIBRARIES)]
    assert {*OWN_NAMES, "torch.Muon"} < set(names)
    assert left_out == [f"{name} is not installed; its optimizers are left out" for name in PEER_LIBRARIES]
    assert versions(choices) == {}


def test_the_baseline_comes_with_any_choice_and_never_twice() -> None:
    assert [choice.name for choice in choose(["dasgo", "dasgo"])[0]] == [BASELINE, "dasgo"]
    assert [choice.name for choice in choose(["muon", BASELINE])[0]] == [BASELINE, "muon"]


def test_a_library_that_nobody_asks_for_is_not_imported() -> None:
    script = (
        "import sys; from pipelines.benchmarks.peers import choose, versions; versions(choose(['asgo'])[0]); "
        f"sys.exit(len({set(PEER_LIBRARIES)} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=ROOT).returncode == 0


def test_the_version_of_a_library_is_known_where_it_is_installed() -> None:
    pytest.importorskip("pytorch_optimizer")
    choices, _ = choose(["pytorch_optimizer.Lion", "pytorch_optimizer.AdamW"])
    assert versions(choices) == {"pytorch_optimizer": metadata.version("pytorch_optimizer")}


def test_keywords_reach_the_constructor() -> None:
    (asgo,) = parse_choice("asgo:root_method=newton,root_steps=7,lr=0.5").build(matrices())
    assert isinstance(asgo, ASGO)
    assert {key: asgo.defaults[key] for key in ("root_method", "root_steps", "lr")} == {
        "root_method": "newton",
        "root_steps": 7,
        "lr": 0.5,
    }
    (adamw,) = parse_choice("torch.AdamW:betas=0.5,0.75,fused=true,weight_decay=0.25").build(matrices())
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.defaults["betas"] == (0.5, 0.75)
    assert (adamw.defaults["fused"], adamw.defaults["weight_decay"]) == (True, 0.25)
    (accasro,) = parse_choice("accasro:increment=0.125").build(matrices())
    assert isinstance(accasro, AccAsro)
    assert accasro.defaults["increment"] == 0.125


@pytest.mark.parametrize("name", ["asgo", "torch.Muon", "torch.RAdam", "accasro"])
def test_every_parameter_of_a_whole_model_is_in_one_group(name: str) -> None:
    model = build_model("tiny")
    optimizers = parse_choice(name).build(model)
    held = [id(param) for each in optimizers for group in each.param_groups for param in group["params"]]
    assert sorted(held) == sorted(id(param) for param in model.parameters())


def test_torchs_muon_gets_the_matrices_that_ours_gets_and_adamw_the_rest() -> None:
    model = build_model("tiny")
    muon, adamw = parse_choice("torch.Muon:momentum=0.5").build(model)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    (ours,) = parse_choice("muon").build(model)
    expected = {id(p) for group in ours.param_groups if group.get("rule") != "adam" for p in group["params"]}
    assert {id(p) for p in muon.param_groups[0]["params"]} == expected
    assert len(expected) == 4 * 6
    (alone,) = parse_choice("torch.Muon").build(matrices())
    assert len(alone.param_groups[0]["params"]) == 2


def test_torchs_muon_leaves_kernels_to_adamw() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 2), torch.nn.Linear(5, 6), torch.nn.Linear(6, 2))
    muon, adamw = parse_choice("torch.Muon").build(model)
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(6, 5)]
    assert len(adamw.param_groups[0]["params"]) == 5


def test_a_muon_of_pytorch_optimizer_is_told_which_parameters_are_matrices() -> None:
    pytest.importorskip("pytorch_optimizer")
    (muon,) = parse_choice("pytorch_optimizer.Muon").build(build_model("tiny"))
    assert [(group["use_muon"], len(group["params"])) for group in muon.param_groups] == [(True, 24), (False, 44)]


@pytest.mark.parametrize("name", [name for name in DEFAULT_NAMES if name.startswith("pytorch_optimizer.")])
def test_the_default_ones_of_pytorch_optimizer_take_a_step(name: str) -> None:
    pytest.importorskip("pytorch_optimizer")
    model = matrices()
    before = [param.detach().clone() for param in model.parameters()]
    (optimizer,) = parse_choice(name).build(model)
    for _ in range(2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert not any(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("name", [name for name in DEFAULT_NAMES if name.startswith("heavyball.")])
def test_the_default_ones_of_heavyball_can_be_built(name: str) -> None:
    """Without a step, for which they would compile for a minute."""
    pytest.importorskip("heavyball")
    (optimizer,) = parse_choice(name).build(matrices())
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asgoo", "--optimizer asgoo: unknown optimizer: 'asgoo'; did you mean 'asgo'?"),
        ("torch.rmspropp", "unknown optimizer of torch.optim: 'rmspropp'; did you mean 'RMSprop'?"),
        ("torch.lr_scheduler", "not a subclass of torch.optim.Optimizer"),
        ("xyzzy", "unknown optimizer: 'xyzzy'; known: asgo, dasgo, muon"),
        ("torch.Optimizer", "unknown optimizer of torch.optim: 'Optimizer'"),
        ("torhc.AdamW", "torhc is not installed: did you mean 'torch'"),
        ("asgo:root_steps", "'root_steps' is not key=value"),
        ("asgo:root_stepz=3", "unknown keyword of asgo: 'root_stepz'; did you mean 'root_steps'?"),
        ("asgo:lr=-1", "--optimizer asgo:lr=-1: invalid lr: -1"),
        ("torch.AdamW:nonsense=1", "nonsense"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_measured(name: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        choose([name])
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"--optimizer {name}: ")


def test_a_library_that_is_asked_for_and_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "heavyball")
    with pytest.raises(UsageError, match="heavyball is not installed: pip install heavyball"):
        choose(["heavyball.SOAP"])


def test_a_library_that_breaks_on_import_is_left_out_with_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory
) -> None:
    hide(monkeypatch, "pytorch_optimizer")
    monkeypatch.delitem(sys.modules, "heavyball", raising=False)
    (tmp_path / "heavyball.py").write_text("import surely_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    choices, left_out = choose([])
    assert not any(choice.library in PEER_LIBRARIES for choice in choices)
    problem = "heavyball does not import: ModuleNotFoundError: No module named 'surely_not_there'"
    assert left_out[1] == f"{problem}; its optimizers are left out"
    with pytest.raises(UsageError) as error:
        choose(["heavyball.SOAP"])
    assert str(error.value) == f"--optimizer heavyball.SOAP: {problem}"


def test_a_library_that_exits_or_prints_on_import_is_left_out_and_stdout_stays_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hide(monkeypatch, "pytorch_optimizer")
    monkeypatch.delitem(sys.modules, "heavyball", raising=False)
    (tmp_path / "heavyball.py").write_text("print('hello')\nraise SystemExit('bye')\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert choose([])[1][1] == "heavyball does not import: SystemExit: bye; its optimizers are left out"
    assert capsys.readouterr() == ("", "hello\n")


def test_a_default_that_another_version_of_a_library_lacks_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "pytorch_optimizer")
    old = ModuleType("heavyball")
    old.SOAP = torch.optim.SGD  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "heavyball", old)
    choices, left_out = choose([])
    assert [choice.name for choice in choices if choice.library == "heavyball"] == ["heavyball.SOAP"]
    assert any("heavyball.Muon: unknown optimizer of heavyball: 'Muon'" in line for line in left_out)


def test_of_many_names_some_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    big = ModuleType("heavyball")
    for index in range(30):
        setattr(big, f"Optimizer{index}", type(f"Optimizer{index}", (torch.optim.SGD,), {}))
    monkeypatch.setitem(sys.modules, "heavyball", big)
    with pytest.raises(UsageError, match=r"unknown optimizer of heavyball: 'xyz'; known: .* and 10 more"):
        parse_choice("heavyball.xyz")


def test_names_of_our_registry_without_a_library_are_ours() -> None:
    assert [parse_choice(name).library for name in ("muon", "adamw")] == [OURS, OURS]
