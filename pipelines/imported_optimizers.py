"""Optimizers of other libraries and of the user, by import path. Imports torch only when it imports a class."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from optim.specs import unknown_name
from pipelines.errors import UsageError
from pipelines.optimizers import ImportPath, import_path_of

if TYPE_CHECKING:
    import torch

_KNOWN = ("torch", "pytorch_optimizer", "heavyball", "schedulefree", "prodigyopt")
"""Packages with optimizers, for hints."""
_ALIASES = {"torch": "torch.optim"}
"""Modules whose optimizers are in a submodule: `torch.Adafactor` is `torch.optim.Adafactor`."""


@dataclass(frozen=True)
class OptimizerSource:
    """The code of an imported optimizer."""

    package: str | None
    """Name and version of its distribution, such as `heavyball 3.2.1`; None for a file of the user."""
    file: Path
    content: bytes

    @property
    def sha256(self) -> str:
        """Hexadecimal digest of the file."""
        return hashlib.sha256(self.content).hexdigest()

    def record(self) -> dict[str, Any]:
        """Return it as JSON, for a run's `config.json`."""
        return {"package": self.package, "file": self.file.name, "sha256": self.sha256}


def import_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of an import path; see `pipelines.optimizers.import_path_of`.

    A module that is not installed is also looked for in the working directory. This executes the module's code. Raises
    `UsageError` with one line if the import fails, or the name is no optimizer that asgo can use.
    """
    path = import_path_of(name)
    if path is None:
        raise UsageError(f"--optimizer {name}: write an import path as module.Class or ./FILE.py:Class")
    with errors_named(name, "it does not import"):
        module = _load_file(Path(path.place).expanduser()) if path.is_file else _load_module(path)
    try:
        return _checked_class(path, module)
    except ValueError as error:
        raise UsageError(f"--optimizer {name}: {error}") from None


class NotInstalled(UsageError):
    """A module that is neither installed nor on the path."""


def import_library(name: str) -> ModuleType:
    """Import a module by name. Raises `NotInstalled`, or `UsageError` if the import fails, with one line."""
    top = name.partition(".")[0]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # on stdout, its prints would mix with the command's data
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit
        if isinstance(error, ModuleNotFoundError) and error.name == top:
            raise NotInstalled(f"{top} is not installed") from None
        raise UsageError(f"{name} does not import: {one_line(error)}") from error


def named_constructor(name: str) -> Callable[..., torch.optim.Optimizer]:
    """Return the class of an import path as a function. It raises an error of the constructor as a `UsageError`."""
    cls = import_optimizer(name)

    def construct(*arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        with errors_named(name, "its constructor fails"):
            optimizer = cls(*arguments, **keywords)
            if not hasattr(optimizer, "param_groups"):
                raise UsageError("its constructor does not call that of torch.optim.Optimizer")
            return optimizer

    construct.__wrapped__ = cls  # type: ignore[attr-defined]  # for inspect.signature
    return construct


def check_keywords(name: str, keywords: Mapping[str, Any]) -> None:
    """Raise `UsageError` if the constructor lacks a keyword, needs another, or has a default of another type."""
    parameters = _keywords_of(import_optimizer(name))
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    named = {key: each for key, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    # Constructors with **keywords ignore a misspelled one.
    near = difflib.get_close_matches
    unknown = [key for key in keywords if key not in named and (not takes_any or near(key, named, cutoff=0.8))]
    problems = [str(unknown_name(f"keyword of {name}", key, named)) for key in unknown]
    missing = [key for key, each in named.items() if each.default is each.empty and key not in keywords]
    problems += [f"its keyword {key} has no default: set it" for key in missing]
    given = [(key, value) for key, value in keywords.items() if key in named]
    problems += [problem for key, value in given for problem in _type_problems(key, value, named[key].default)]
    if problems:
        raise UsageError("\n".join(f"--optimizer {name}: {problem}" for problem in problems))


def default_lr(name: str) -> float:
    """Return the default learning rate of the constructor. Raises `UsageError` if there is none."""
    default = _keywords_of(import_optimizer(name))["lr"].default
    if isinstance(default, bool) or not isinstance(default, int | float):
        raise UsageError(f"--optimizer {name}: its learning rate, lr, has no default: set it")
    return float(default)


def _type_problems(key: str, value: Any, default: Any) -> Iterator[str]:
    """Yield a problem if a flag or a number gets a value of another type."""
    if isinstance(default, bool) and not isinstance(value, bool | None):
        yield f"its keyword {key} takes true or false, not {value!r}"
    elif isinstance(default, int | float) and isinstance(value, str):
        yield f"its keyword {key} takes a number, not {value!r}"


def check_part_keywords(optimizer: torch.optim.Optimizer, parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise `ValueError` for a keyword of a part of the model that an imported optimizer does not read from its groups.

    Some read keys that their constructors do not have, such as `use_muon`. Those are in quotes in the class's file.
    """
    cls = type(optimizer)
    named = _keywords_of(cls)
    for part, keywords in parts.items():
        for key, value in keywords.items():
            if key in named and key not in optimizer.defaults:
                raise ValueError(f"parts.{part}: {key} is a keyword of the constructor only; it cannot differ by part")
            if key not in named and (key in ("params", "part") or not _is_quoted(key, cls)):
                raise unknown_name(f"keyword in parts.{part}", key, [key for key in named if key in optimizer.defaults])
            if key == "lr" and not (isinstance(value, int | float) and value >= 0):
                raise ValueError(f"parts.{part}: lr is {value!r}; it must be a number >= 0")


def _is_quoted(key: str, cls: type) -> bool:
    try:
        text = Path(inspect.getfile(cls)).read_text(encoding="utf-8")
    except (OSError, TypeError, ValueError):
        return False
    return f"'{key}'" in text or f'"{key}"' in text


def source_of(name: str) -> OptimizerSource:
    """Return the file that defines an imported class. Raises `UsageError` if it has no file."""
    cls = import_optimizer(name)
    try:
        file = Path(inspect.getfile(cls))
        content = file.read_bytes()
    except (OSError, TypeError):
        raise UsageError(f"--optimizer {name}: the file of its code cannot be read; put the class in a file") from None
    return OptimizerSource(_distribution_of(cls), file, content)


def _keywords_of(cls: type[torch.optim.Optimizer]) -> dict[str, inspect.Parameter]:
    """Return the parameters of the constructor, without the first, which takes the model's parameters."""
    parameters = list(inspect.signature(cls).parameters.items())
    return {name: each for name, each in parameters[1:] if each.kind is not each.VAR_POSITIONAL}


def _load_file(file: Path) -> Any:
    if not file.is_file():
        where = "" if file.is_absolute() else f" in the working directory, {Path.cwd()}"
        raise UsageError(f"{file}: no such file{where}; a run that used it has a copy in its folder, in optimizer/")
    module_name = f"asgo_optimizer_{file.stem}_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and torch.compile look the module up
    try:
        _search(file.resolve().parent)
        with contextlib.redirect_stdout(sys.stderr):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _load_module(path: ImportPath) -> Any:
    module_name = _ALIASES.get(path.place, path.place)
    top = module_name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        _search(Path.cwd())
    try:
        return import_library(module_name)
    except NotInstalled as error:
        # A misspelled name must not be installed: it may be somebody's trap.
        near = difflib.get_close_matches(top, _KNOWN, n=1)
        advice = f"did you mean {near[0]!r}" if near and near[0] != top else f"pip install {top}"
        raise UsageError(f"{error}: {advice}, or ./FILE.py:{path.name} for a file") from None


def _search(folder: Path) -> None:
    """Make later imports search a folder too, last: it must not hide an installed module."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


@contextlib.contextmanager
def errors_named(name: str, what: str) -> Iterator[None]:
    """Context manager that raises any error of foreign code as a `UsageError` with the optimizer's name."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"--optimizer {name}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit
        raise UsageError(f"--optimizer {name}: {what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """Return the class and the first line of an error of foreign code."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _checked_class(path: ImportPath, module: Any) -> type[torch.optim.Optimizer]:
    import torch

    base = torch.optim.Optimizer
    cls = getattr(module, path.name, None)
    if cls is None or cls is base:
        members = {key: value for key, value in vars(module).items() if isinstance(value, type) and value is not base}
        known = [key for key, value in members.items() if issubclass(value, base)]
        raise unknown_name(f"optimizer of {_ALIASES.get(path.place, path.place)}", path.name, known)
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError("not a subclass of torch.optim.Optimizer")
    step = inspect.signature(cls.step).parameters.get("closure")
    if step is not None and step.default is step.empty:
        raise ValueError("its step() needs a closure that computes the loss again, which asgo does not give")
    if "lr" not in _keywords_of(cls):
        raise ValueError("its constructor has no keyword lr, which the learning rate schedule sets")
    return cls


def _distribution_of(cls: type) -> str | None:
    for name in metadata.packages_distributions().get(cls.__module__.partition(".")[0], []):
        return f"{name} {metadata.version(name)}"
    return None
