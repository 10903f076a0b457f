"""Open the local Hugging Face model of `init_from`, which defines the model's settings. Does not import torch."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pipelines.config import GPTRunConfig, RunConfig
from pipelines.errors import AsgoError, UsageError
from pipelines.hf import gpt2, llama
from pipelines.hf.architecture import Architecture
from pipelines.resolve import Layer, resolve
from pipelines.shell import command
from pipelines.storage import parse_json, refuse_file, sha256_of

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLE = "pytorch_model*.bin"
_HEAD = "lm_head.weight"
_DROPOUT = "model.dropout"
_LARGEST_PADDING = 255
"""Maximum of symbols that the data does not have: models pad the vocabulary to a multiple of 64 to 256."""
_ARCHITECTURES: dict[str, Architecture] = {"gpt2": gpt2, "llama": llama}
"""Architectures by `model_type`."""


@dataclass(frozen=True)
class InitialModel:
    """A verified folder with a model."""

    folder: Path
    architecture: Architecture
    shape: dict[str, Any]
    """Keys of the decoder's settings."""
    weights: tuple[Path, ...]
    """Safetensors files; together they hold every tensor once."""

    @functools.cached_property
    def sha256(self) -> str:
        """Hexadecimal digest of the weights: of the file, or of the joined digests of several files."""
        digests = [sha256_of(path) for path in self.weights]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def open_initial_model(folder: Path) -> InitialModel:
    """Read the configuration and find the files of weights.

    Raises `UsageError` unless the folder holds a supported model in safetensors, and `AsgoError` if a file is damaged.
    """
    refuse_file(folder)
    if not folder.is_dir():
        raise UsageError(
            f"{folder}: no such folder; --init-from needs a local folder, "
            "such as `hf download NAME --local-dir FOLDER` makes"
        )
    _refuse_run(folder)
    config = _read_json(folder / _CONFIG)
    model_type = config.get("model_type")
    if model_type not in [*_ARCHITECTURES]:  # a list, since what stands in a file may have no hash
        raise UsageError(f"{folder / _CONFIG}: model_type is {model_type!r}; supported: {', '.join(_ARCHITECTURES)}")
    architecture = _ARCHITECTURES[model_type]
    problems = architecture.problems_of(config)
    if problems:
        raise UsageError("\n".join(f"{folder / _CONFIG}: {problem}" for problem in problems))
    initial = InitialModel(folder, architecture, architecture.from_config(config), _weight_files(folder))
    _require_weights(initial, architecture.sizes_of(config))
    return initial


def _refuse_run(folder: Path) -> None:
    """Raise `UsageError` if the folder is a checkpoint or a run of asgo."""
    if (folder / "state.json").is_file():
        what = f"a checkpoint of asgo: begin there with --branch {folder.parent.parent}@STEP"
    elif {"config", "environment"} <= _read_json(folder / _CONFIG).keys():
        what = f"a run of asgo: begin there with --branch {folder}"
    else:
        return
    export = command("asgo", "export-model", folder, "--format", "hf", "--out", "FOLDER")
    raise UsageError(f"{folder}: {what}, or give --init-from the folder that this writes: {export}")


def _require_weights(initial: InitialModel, sizes: Mapping[str, list[int]]) -> None:
    """Raise `UsageError` unless the files have all weights of the configuration, no others, and `sizes`.

    The sizes determine memory use: this comes before anything is allocated.
    """
    path, architecture, prefix = initial.folder / _CONFIG, initial.architecture, initial.architecture.PREFIX
    shapes: dict[str, list[int]] = {}
    for file in initial.weights:
        try:
            with safe_open(file, framework="np") as tensors:
                names = tensors.keys()
                shapes |= {name.removeprefix(prefix): tensors.get_slice(name).get_shape() for name in names}
        except SafetensorError as error:
            raise AsgoError(f"{file}: damaged: {error}") from None
    for name, shape in sizes.items():
        if shapes.get(name) != shape:
            found = "none" if name not in shapes else f"one of {' x '.join(map(str, shapes[name]))}"
            raise UsageError(f"{path}: {name} should be {' x '.join(map(str, shape))}, but the weights have {found}")
    # Not more layers than weights: the number is not trusted yet. Names are missing all the same.
    n_layers = min(initial.shape["n_layers"], len(shapes))
    expected = architecture.weight_names(n_layers, initial.shape["tied_head"])
    missing, unknown = expected - shapes.keys(), shapes.keys() - expected - {_HEAD}  # some files also hold a tied head
    if missing:
        raise UsageError(f"{path}: of another model: the weights have no {min(missing)!r}")
    for name in sorted(unknown):
        if not name.endswith(architecture.BUFFERS):
            raise UsageError(f"{path}: of another model: the weights also have {name!r}")


def resolve_with_initial_model(layers: Sequence[Layer]) -> RunConfig:
    """Merge layers like `resolve`. If a layer sets `init_from`, that model's settings replace the lowest layer's.

    Only dropout stays, which belongs to a run. A resumed run, whose configuration is the lowest layer, does not need
    the folder. Raises `UsageError` if the folder holds no supported model, or if settings contradict it.
    """
    base, *given = layers
    folder = next((layer.values["init_from"] for layer in reversed(layers) if "init_from" in layer.values), None)
    if folder in (None, base.values.get("init_from")):
        return resolve(layers)
    initial = open_initial_model(Path(str(folder)))
    kinds = [layer.values["model.kind"] for layer in given if "model.kind" in layer.values]
    if kinds and kinds[-1] != initial.shape["kind"]:  # `resolve` would refuse each key of the other kind
        raise UsageError(f"model.kind is {kinds[-1]}, but {initial.shape['kind']} in {folder}: leave it out")
    kept = {key: value for key, value in base.values.items() if key == _DROPOUT or not key.startswith("model.")}
    values = {f"model.{key}": value for key, value in initial.shape.items()}
    beginning = Layer(str(folder), {**values, "initial_weights_sha256": initial.sha256})
    config = resolve([Layer(base.source, kept), beginning, *given])
    assert isinstance(config, GPTRunConfig)
    refuse_contradictions(config, initial)
    return config


def refuse_contradictions(config: GPTRunConfig, initial: InitialModel) -> None:
    """Raise `UsageError` with a line for each setting of the model that differs from the initial model.

    A shorter context is allowed: the first positions are used. So is `bias=false` for a model with biases;
    `load_initial_weights` requires that all biases are zero.
    """
    asked = config.model.model_dump()
    allowed = {"context_length", "bias"} if initial.shape["bias"] else {"context_length"}
    problems = [
        f"model.{key} is {asked.get(key)}, but {value} in {initial.folder}: leave it out"
        for key, value in initial.shape.items()
        if key not in allowed and asked.get(key) != value
    ]
    longest = initial.shape["context_length"]
    if config.model.context_length > longest:
        problems.append(f"model.context_length is {config.model.context_length}, but {initial.folder} allows {longest}")
    if config.initial_weights_sha256 not in (None, initial.sha256):
        problems.append(f"{initial.folder}: its weights are not those that initial_weights_sha256 names")
    if problems:
        raise UsageError("\n".join(problems))


def refuse_other_vocabulary(config: GPTRunConfig, vocab_size: int, tokenizer: str) -> list[str]:
    """Compare the numbers of symbols of the initial model and of the data's tokenizer; return a line if they differ.

    Raises `UsageError` unless the model has those of the data. More are padding: up to 255, and up to as many as the
    data has.
    """
    if config.init_from is None:
        return []
    symbols = config.model.vocab_multiple
    has = f"{config.data.folder} has {vocab_size:,} ({tokenizer})"
    if not vocab_size <= symbols <= vocab_size + min(_LARGEST_PADDING, vocab_size):
        raise UsageError(
            f"{config.init_from}: the model has {symbols:,} symbols, but {has}; "
            "use --data that was made with the model's tokenizer"
        )
    unused = f"{symbols - vocab_size} of the model's {symbols:,} symbols are unused, since {has}"
    return [f"{config.init_from}: {unused}; the data must be made with the model's tokenizer"] * (symbols > vocab_size)


def _weight_files(folder: Path) -> tuple[Path, ...]:
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,)
    if (folder / _INDEX).is_file():
        try:
            names = sorted({Path(name).name for name in _read_json(folder / _INDEX)["weight_map"].values()})
        except (KeyError, AttributeError, TypeError):
            raise UsageError(f"{folder / _INDEX}: damaged: it lists no files of weights") from None
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise UsageError(f"{folder / missing[0]}: missing from the model")
        return tuple(folder / name for name in names)
    pickled = sorted(folder.glob(_PICKLE))
    if pickled:
        raise UsageError(
            f"{pickled[0]}: a pickle, which can run any code and is never opened here; "
            "save it again with save_pretrained of transformers, which writes safetensors"
        )
    raise UsageError(f"{folder}: has no {_WEIGHTS}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path.parent}: not a Hugging Face model: it has no {path.name}") from None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"{path}: damaged: not a JSON object")
    return content
