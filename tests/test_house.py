"""The architecture: who may import whom, and what `asgo --help` must not load."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ROOMS = ("asgo_cli", "pipelines", "models", "optim")
MAY_IMPORT = {
    "asgo_cli": {"asgo_cli", "pipelines"},
    "pipelines": {"pipelines", "models", "optim"},
    "models": {"models"},
    "optim": set(),  # its imports of itself are relative: the folder works under any name
}
SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, also inside functions and type-checking blocks."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                names.add(str(node.module).split(".")[0])
            else:
                assert (path.parent, node.level) == (ROOT / "optim", 1), f"{path}: relative import"
    return names


def imported_modules(path: Path, lazily: bool = True) -> set[str]:
    """Full names of the modules that a file imports names from; also inside functions and blocks if `lazily`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = [node for node in (ast.walk(tree) if lazily else tree.body) if isinstance(node, ast.ImportFrom)]
    found = {(str(node.module), alias.name) for node in nodes for alias in node.names}
    return {f"{module}.{name}" if module in ROOMS else module for module, name in found}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards_only(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0]
    imported = imported_packages(path)
    assert imported & {*ROOMS, "tests"} <= MAY_IMPORT[room]
    assert room == "asgo_cli" or not imported & {"typer", "rich"}
    assert "pickle" not in imported


LAYERS = (
    {"errors", "storage", "locking", "shell", "slurm", "stopping", "optimizers", "imported_optimizers"},
    {"config", "resolve", "settings_file", "shadow_settings", "compiler_cache", "tensors"},
    {"data"},
    {"hf"},
    {"tasks", "steps"},
    {"training"},
    {"exchange", "generation"},
    {"analysis"},
    {"sweeps"},
    {"benchmarks", "claim", "demo", "doctor"},
)
"""The packages and modules of `pipelines`, lowest first. One imports its own layer and those before it.

A description of a task also names functions of layers above, which it imports when they are called.
"""


def layer_of(module: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if module.split(".")[1] in names)


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "pipelines" in path.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_pipelines_import_no_layer_above_their_own(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    if module == "pipelines.__init__":
        return
    for imported in imported_modules(path, lazily=not module.startswith("pipelines.tasks.")):
        if imported.startswith("pipelines."):
            assert layer_of(imported) <= layer_of(module), f"{module} imports {imported}"


def test_what_is_general_about_images_does_not_know_imagenet() -> None:
    for path in (ROOT / "pipelines" / "data" / "images").glob("*.py"):
        assert not [name for name in imported_modules(path) if name.startswith("pipelines.data.imagenet")], path


def test_no_two_modules_of_the_command_line_import_each_other() -> None:
    imports = {
        path.stem: {name for name in imported_modules(path) if name.startswith("asgo_cli.")}
        for path in (ROOT / "asgo_cli").glob("*.py")
    }
    for name, imported in imports.items():
        for other in imported:
            assert f"asgo_cli.{name}" not in imports[other.split(".")[1]], f"{name} and {other}"


def test_the_packages_that_are_imported_are_those_that_are_declared_and_pinned() -> None:
    """Not those that come along with another package, and none that nothing imports; extras count, but `dev`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dev = extras.pop("dev")
    declared = [Requirement(line) for lines in (project["dependencies"], *extras.values()) for line in lines]
    names = {name for path in SOURCES for name in imported_packages(path)}
    foreign = names - {*sys.stdlib_module_names, *ROOMS, "_typeshed"}
    installed = packages_distributions()
    imported = {canonicalize_name(installed.get(name, [name])[0]) for name in foreign}
    by_torch = {"tensorboard"}  # for torch.utils.tensorboard
    assert {canonicalize_name(each.name) for each in declared} == imported | by_torch
    assert {line for lines in extras.values() for line in lines} <= {*dev}, "tests need what the extras bring"

    pins = [line.split("#")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {canonicalize_name(name): version.strip() for name, _, version in (pin.partition("==") for pin in pins)}
    for each in declared:
        assert pinned[canonicalize_name(each.name)] in each.specifier, each


@pytest.mark.parametrize("room", ["optim", "models"])
def test_optim_and_models_need_torch_alone(room: str) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "torchvision", room}
    for path in (ROOT / room).rglob("*.py"):
        assert imported_packages(path) <= allowed, path


def test_the_optimizers_work_under_another_name_beside_a_package_named_optim(tmp_path: Path) -> None:
    """As in a project that copies the folder, and has an `optim` of its own."""
    shutil.copytree(ROOT / "optim", tmp_path / "asgo_optim")
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim" / "__init__.py").write_text("raise ImportError('the optim of another project')\n")
    script = """if True:
        import torch
        from asgo_optim import build_optimizer
        settings = {"decrement": 1e-4, "min_scale": 0.1}
        for name, keywords in {"asgo": {}, "dasgo": {}, "muon": {}, "shampoo": {}, "asro": settings}.items():
            net = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.Linear(300, 3))
            optimizer = build_optimizer(net, name, 5, lr=1e-2, **keywords)
            net(torch.randn(4, 300)).sum().backward()
            optimizer.step()
    """
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "gpt", "--help"]], ids=" ".join)
def test_help_loads_little_and_so_is_instant(arguments: list[str]) -> None:
    """Python names each import: under 300 take 0.3 s on a quiet machine; torch alone has over a thousand."""
    command = [sys.executable, "-X", "importtime", "-m", "asgo_cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in lines}
    assert "asgo_cli" in loaded
    assert not loaded & {"torch", "numpy", "pydantic", "matplotlib", "pyarrow", "tiktoken", "datasets", "optuna"}
    assert len(lines) < 400


def test_processes_start_before_their_launcher_loads_torch() -> None:
    script = "import sys, asgo_cli.supervisor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def test_no_function_is_longer_than_a_screen() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}:{node.lineno} {node.name}"
