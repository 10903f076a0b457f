"""Merge preset, configuration file, flags and `--set` into one validated `RunConfig`."""

from __future__ import annotations

import codecs
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import NoneType
from typing import Any, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipelines.config import (
    DECODERS,
    IMPORTED,
    OPTIMIZER_SETTINGS,
    ImportedOptimizerSettings,
    RunConfig,
    ScheduleSettings,
    ShadowOptimizer,
    flatten,
    run_config_of,
    settings_class_of,
    task_name,
)
from pipelines.errors import UsageError
from pipelines.imported_optimizers import check_keywords, default_lr
from pipelines.optimizers import (
    DEEPEST,
    OPTIMIZER_NAMES,
    import_path_of,
    join_key,
    parse_toml,
    parse_value,
    split_key,
)
from pipelines.storage import parse_json

_PRESET = "preset "
"""The source of a preset's layer begins with this."""


@dataclass(frozen=True)
class Layer:
    """Settings from one source, by dotted key. Later layers override earlier ones."""

    source: str
    values: Mapping[str, Any]

    def for_optimizer(self, name: str) -> dict[str, Any]:
        """Return the settings without the `optimizers` tables; those of `name` override the general ones."""
        general = {key: value for key, value in self.values.items() if key.split(".")[0] != "optimizers"}
        specific = {}
        prefix = join_key(["optimizers", name, ""])
        for key, value in self.values.items():
            if key.startswith(prefix):
                rest = key.removeprefix(prefix)
                specific[rest if rest.startswith("schedule.") else f"optimizer.{rest}"] = value
        return {**general, **specific}


def preset_names(task: str) -> list[str]:
    """Return the names of a task's presets, sorted."""
    names = (Path(entry.name) for entry in (resources.files("pipelines") / "presets").iterdir())
    return sorted(name.stem for name in names if name.suffix == ".toml" and read_preset(name.stem).get("task") == task)


def read_preset(name: str) -> dict[str, Any]:
    """Return the TOML tables of a preset."""
    return tomllib.loads((resources.files("pipelines") / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def preset_layer(task: str, name: str) -> Layer:
    """Return a preset as the lowest layer. Raises `UsageError` if the task has no preset of that name."""
    known = preset_names(task)
    if name not in known:
        raise UsageError(f"--preset: unknown preset {name!r}; {_hint(name, known)}")
    return Layer(f"{_PRESET}{name}", {**flatten(read_preset(name)), "preset": name})


def file_layer(path: Path) -> Layer:
    """Return a TOML file as a layer. Raises `UsageError` if it cannot be read."""
    try:
        return Layer(str(path), flatten(parse_toml(_text_of(path.read_bytes()))))
    except ValueError as error:  # not UTF-8, not TOML, or a number with thousands of digits
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def _text_of(content: bytes) -> str:
    """Decode a file as UTF-8, with or without the byte order mark that Windows editors write."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    return content.decode("utf-8-sig")


def saved_layer(run: Path, optimizer: str | None) -> Layer | None:
    """Return the configuration of a run as the lowest layer, or None if the folder holds no run.

    Raises `UsageError` if the run has another optimizer than `optimizer`: its settings would not apply.
    """
    if (run / "state.json").is_file():
        raise UsageError(f"{run}: a checkpoint; --resume takes the run that holds it: --out {run.parent.parent}")
    path = run / "config.json"
    if not path.is_file():
        return None
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))["config"]
        values = {key: value for key, value in flatten(saved).items() if value is not None}
        trained_with = values["optimizer.name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: not a configuration that asgo wrote") from None
    if optimizer not in (None, trained_with):
        raise UsageError(f"{run}: holds a run with {trained_with}, not {optimizer}; choose another --out")
    return Layer(str(path), values)


def branch_layer(task: str, run: Path, later: Sequence[Layer]) -> Layer:
    """Return the configuration of the parent run as the lowest layer of a branch.

    If `later` layers choose another optimizer, it has the settings of the parent's preset, and the parent's schedule.
    Raises `UsageError` if the folder holds no run of the task.
    """
    if (run / "state.json").is_file():
        raise UsageError(f"{run}: a checkpoint; --branch takes the run that holds it: {run.parent.parent}@STEP")
    parent = saved_layer(run, None)
    if parent is None:
        raise UsageError(f"--branch {run}: holds no run")
    preset, optimizer = (str(parent.values.get(key)) for key in ("preset", "optimizer.name"))
    trained = task_name(parent.values.get("task"))
    if trained != task:
        raise UsageError(f"--branch {run}: a run of asgo train {trained}, not of asgo train {task}")
    name = _optimizer_name([parent, *later])
    if name == optimizer:
        return parent
    known = preset_layer(task, preset).for_optimizer(name) if preset in preset_names(task) else {}
    values = {key: value for key, value in parent.values.items() if not key.startswith("optimizer.")}
    return Layer(parent.source, {**values, **{key: known[key] for key in known if key.startswith("optimizer.")}})


def _optimizer_name(layers: Sequence[Layer]) -> str:
    names = (layer.values["optimizer.name"] for layer in reversed(layers) if "optimizer.name" in layer.values)
    return str(next(names, ""))


def assignment_layer(assignments: Sequence[str]) -> Layer:
    """Return `key=value` texts as a layer. `parse_value` reads the values."""
    values: dict[str, Any] = {}
    problems = []
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            problems.append(f"--set {text}: write it as key=value, such as training.steps=100")
        elif key.count(".") > DEEPEST:
            problems.append(f"--set {key.strip()}: nested too deeply")
        else:
            values.update(flatten({key.strip(): parse_value(value.strip())}))
    if problems:
        raise UsageError("\n".join(problems))
    return Layer("--set", values)


def resolve(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers, lowest first, into a configuration. Raises `UsageError` with one line for each problem.

    An optimizer of another library is imported, to check its keywords.
    """
    name = _optimizer_name(layers)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.for_optimizer(name).items():
            values[key] = value
            sources.pop(key, None)  # the order of sources is the order of layers
            sources[key] = layer.source
    if import_path_of(name) is not None and "optimizer.lr" not in values:
        values["optimizer.lr"] = default_lr(name)
    problems = [problem for layer in layers for problem in _table_problems(layer, name)]
    nested, conflicts = _nest(values, sources)
    kind = run_config_of(nested)
    try:
        config = kind.model_validate(nested)
    except ValidationError as error:
        known, other_kind = _without_other_kind(_without_consequences(error.errors()), layers, sources)
        problems += [*other_kind, *(_explain(details, sources, kind) for details in known)]
    if problems or conflicts:
        raise UsageError("\n".join(dict.fromkeys([*conflicts, *problems])))
    if isinstance(config.optimizer, ImportedOptimizerSettings):
        check_keywords(config.optimizer.name, config.optimizer.keywords)
    return _without_unused(config, layers[0].source, sources)


def _without_unused(config: RunConfig, lowest: str, sources: Mapping[str, str]) -> RunConfig:
    """Give keys of the model that have no effect their defaults, if a preset sets them; others are errors."""
    model = config.model
    defaults = {key: type(model).model_fields[key].default for key in model.without_effect()}
    unused = {key: default for key, default in defaults.items() if getattr(model, key) != default}
    problems = [
        f"{sources[f'model.{key}']}: model.{key} = {getattr(model, key)!r}: has no effect with "
        f"{model.without_effect()[key]}; leave it out"
        for key in unused
        if sources[f"model.{key}"] != lowest
    ]
    if problems:
        raise UsageError("\n".join(problems))
    if not (unused and lowest.startswith(_PRESET)):  # an older run keeps its configuration
        return config
    return config.model_copy(update={"model": model.model_copy(update=unused)})


def _without_consequences(errors: list[ErrorDetails]) -> list[ErrorDetails]:
    """Leave out the other keys of a decoder of an unknown kind: they may be right for the one that was meant."""
    if all(details["loc"] != ("model", "kind") for details in errors):
        return errors
    return [details for details in errors if details["loc"][0] != "model" or details["loc"] == ("model", "kind")]


def _without_other_kind(
    errors: list[ErrorDetails], layers: Sequence[Layer], sources: Mapping[str, str]
) -> tuple[list[ErrorDetails], list[str]]:
    """Replace unknown keys that a lower layer has for a decoder of another kind by one line."""
    kinds = {layer.source: str(layer.values["model.kind"]) for layer in layers if "model.kind" in layer.values}
    kinds = {layers[0].source: "gpt", **kinds}  # a decoder without a kind is a "gpt"
    asker, kind = [*kinds.items()][-1]
    others = [(source, other) for source, other in kinds.items() if other != kind and other in DECODERS]
    if not others:
        return errors, []
    source, other = others[-1]
    places = [layer.source for layer in layers]
    lower = places[: places.index(asker)]
    stale = [
        details
        for details in errors
        if details["type"] == "extra_forbidden"
        and details["loc"][0] == "model"
        and details["loc"][-1] in DECODERS[other].model_fields
        and sources.get(".".join(map(str, details["loc"]))) in lower
    ]
    if not stale:
        return errors, []
    keys = ", ".join(str(details["loc"][-1]) for details in stale)
    problem = (
        f"{asker}: model.kind = {kind!r}: the model of {source} is a {other!r}, with keys that a {kind!r} "
        f"does not have: {keys}; {_how_to_get(kind, source)}"
    )
    return [details for details in errors if details not in stale], [problem]


def _how_to_get(kind: str, source: str) -> str:
    """Return advice for who wants a decoder of another kind than a preset or a run has."""
    if not source.startswith(_PRESET):
        return "leave it out"
    presets = [name for name in preset_names("gpt") if read_preset(name)["model"].get("kind", "gpt") == kind]
    if not presets:
        return f"no preset has a {kind!r}; write one"
    needed = [key for key, field in DECODERS[kind].model_fields.items() if field.is_required() and key != "kind"]
    keys = ", ".join(f"model.{key}" for key in needed)
    return f"choose a --preset with a {kind!r} ({', '.join(presets)}) and set {keys} there"


def _nest(values: Mapping[str, Any], sources: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return dotted keys as nested tables, and one line for each key that is both a value and a table."""
    nested: dict[str, Any] = {}
    conflicts = []
    for key, value in values.items():
        *tables, last = split_key(key)
        table = nested
        for part in tables:
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                conflicts.append(f"{sources[key]}: {key}: {part} is set to {inner!r} elsewhere, so it has no keys")
                break
            table = inner
        else:
            table[last] = value
    return nested, conflicts


def _table_problems(layer: Layer, chosen: str) -> list[str]:
    """Return the problems in tables of optimizers that are not chosen; else a typo there would stay unnoticed."""
    tables = {key: split_key(key) for key in layer.values if key.split(".")[0] == "optimizers"}
    problems = [
        f"{layer.source}: {key} = {layer.values[key]!r}: should be a table of settings"
        for key, parts in tables.items()
        if len(parts) < 3
    ]
    for name in dict.fromkeys(parts[1] for parts in tables.values() if len(parts) >= 3):
        prefix = join_key(["optimizers", name])
        if settings_class_of(name) is None:
            problems.append(f"{layer.source}: {prefix}: unknown optimizer; {_hint(name, OPTIMIZER_NAMES)}")
        elif name != chosen:
            problems += _problems_in_table(layer, name, prefix)
    return problems


def _problems_in_table(layer: Layer, name: str, prefix: str) -> list[str]:
    values = {key: value for key, value in layer.values.items() if key.startswith(f"{prefix}.")}
    table, problems = _nest(values, dict.fromkeys(values, layer.source))
    settings = table["optimizers"][name]
    schedule = settings.pop("schedule", {})
    checks: tuple[tuple[type[BaseModel], Any, str], ...] = (
        (cast(type[BaseModel], settings_class_of(name)), {"name": name, **settings}, prefix),
        (ScheduleSettings, schedule, f"{prefix}.schedule"),
    )
    for model, content, place in checks:
        try:
            model.model_validate(content)
        except ValidationError as error:
            found = [details for details in error.errors() if details["type"] != "missing"]
            problems += [_explain(details, {}, model, layer.source, f"{place}.") for details in found]
    return problems


def _explain(
    details: ErrorDetails, sources: Mapping[str, str], model: type[BaseModel], source: str = "", place: str = ""
) -> str:
    """Return one line for a pydantic error: source, key, what is wrong, what to do."""
    loc = [str(part) for part in details["loc"]]
    if loc[:2] == ["shadows", "optimizers"] and len(loc) > 3:
        shadow, inner = join_key(loc[:3]), details.copy()
        inner["loc"], origin = details["loc"][3:], _origin(shadow, sources)
        if details["type"] in ("missing", "union_tag_not_found"):
            return (
                f'{origin}: {shadow} has no optimizer: write a list of names, as in shadows.optimizers=["muon:lr=0.1"]'
            )
        return _explain(inner, sources, ShadowOptimizer, origin, f"{shadow}.")
    tag = loc[1] if loc[:1] == ["optimizer"] and len(loc) > 1 and issubclass(model, RunConfig | ShadowOptimizer) else ""
    if tag in OPTIMIZER_SETTINGS or tag == IMPORTED:
        del loc[1]  # pydantic names the member of the union there
    key = ".".join(loc)
    origin = source or _origin(key, sources)
    where = f"{origin}: {place}{key}".rstrip(".: ")
    kind, value = details["type"], details["input"]
    if kind == "missing" and isinstance(details["loc"][-1], int):
        values = ".".join(loc[:-1])
        return f"{_origin(key, sources)}: {place}{values} = {value!r}: should have more values"
    if kind == "missing":
        return f"{place}{key} is missing: set it with --set {place}{key}=VALUE or in a --config file"
    if kind == "extra_forbidden":
        table = _table_of(model, loc, details["loc"])
        return f"{where}: {_unknown_key(loc[-1], table)}"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = value.get("name", "") if isinstance(value, dict) else value
        hint = _hint(str(name), OPTIMIZER_NAMES)
        paths = "" if hint.startswith("did") else "; or an import path, such as torch.NAdam or ./FILE.py:Class"
        return f"{source or _origin('optimizer.name', sources)}: unknown optimizer {name!r}; {hint}{paths}"
    if kind == "value_error":
        return f"{where}: {details['msg'].removeprefix('Value error, ')}"
    message = details["msg"].removeprefix("Input ").replace("a valid tuple", "a list of values")
    nearest = _nearest_literal(details, value)
    return f"{where} = {value!r}: {message}{nearest}"


def _origin(key: str, sources: Mapping[str, str]) -> str:
    """Return the source of the layer that set a key, a key under it, or the list that contains it."""
    found = [
        source
        for name, source in sources.items()
        if name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")
    ]
    return found[-1] if found else "configuration"


def _table_of(model: type[BaseModel], loc: Sequence[str], raw_loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the settings class of the table that contains an unknown key."""
    for part in loc[:-1]:
        if part == "optimizer":
            model = OPTIMIZER_SETTINGS[str(raw_loc[1])]
        else:
            annotation = model.model_fields[part].annotation  # a class, or None and a class
            model = next(kind for kind in (get_args(annotation) or (annotation,)) if kind is not NoneType)
    return model


def _unknown_key(key: str, table: type[BaseModel]) -> str:
    owners = [name for name, other in OPTIMIZER_SETTINGS.items() if key in other.model_fields]
    if table in OPTIMIZER_SETTINGS.values() and owners:
        return f"unknown key of this optimizer; these have it: {', '.join(owners)}"
    return f"unknown key; {_hint(key, [name for name in table.model_fields if name not in ('name', 'preset', 'task')])}"


def _nearest_literal(details: ErrorDetails, value: object) -> str:
    if details["type"] != "literal_error" or not isinstance(value, str):
        return ""
    choices = [choice.strip(" '") for choice in details["ctx"]["expected"].replace(" or ", ",").split(",")]
    nearest = difflib.get_close_matches(value, choices, n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _hint(name: str, known: Iterable[str]) -> str:
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known: {', '.join(known)}"
