"""Which layers make a model's outputs: its heads, which no matrix rule suits."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

_HEAD_NAME = re.compile(
    r"head|class|cls|pred|score|logit|out|box|policy|actor|critic|value|fc|mean|mu$|sigma|std|var|label|projection"
)
"""In the names of layers that make outputs."""

_CONCATENATED = 4
"""Up to so many outputs of one size are taken for the input of a layer that they may be joined to."""

_CHUNKED = 16
"""Into up to so many inputs of one size a layer's output is taken to be cut: queries, keys and values, gates."""

_SMALLEST_PART = 4
"""Fewer features are taken neither for a part of a layer's inputs nor of its outputs: they are actions, or colours."""


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """The model and what it wraps, outermost first: DDP, `torch.compile`, PEFT and the like have one child."""
    chain = [model]
    while not _is_layer(chain[-1]) and len(children := _children(chain[-1])) == 1:
        chain += children
    return chain


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The layers that make the model's outputs; none where it ends in hidden features.

    They are what `get_output_embeddings()` of Hugging Face and `get_classifier()` of timm name, and the layers at the
    ends of the model and of its branches whose number of outputs no other layer takes in, as far as sizes and the order
    of the modules tell; of lone layers beside the last one, those whose names say so. Where there is none, it is the
    model's last module if that is a layer, or a `nn.Sequential` that ends in one. Wrappers change nothing.
    """
    chain = unwrapped(model)
    named = [head for module in chain for head in _named_heads(module)]
    layout = _Layout(chain[-1])
    found = [layer for layer in layout.ends(chain[-1], is_whole=True) if all(layer is not head for head in named)]
    return named + found or _last_step(chain[-1])


def _named_heads(module: nn.Module) -> Iterator[nn.Module]:
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            heads = getattr(module, method)()
        except (AttributeError, NotImplementedError):  # also of a model that has the method and no head to give
            continue
        yield from (each for each in (heads if isinstance(heads, Iterable) else [heads]) if isinstance(each, nn.Module))


def _children(module: nn.Module) -> list[nn.Module]:
    """Those that have parameters."""
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def _last_step(module: nn.Module) -> list[nn.Module]:
    """The last layer, if nothing but the model itself and sequences contain it."""
    children = _children(module)
    last = module if _is_layer(module) or not children else children[-1]
    while isinstance(last, nn.Sequential) and _children(last):
        last = _children(last)[-1]
    return [last] if _is_layer(last) else []


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a linear map or a convolution, also one that is parametrized, or has an adapter of PEFT."""
    has_weight = next(module.parameters(recurse=False), None) is not None
    return (has_weight or parametrize.is_parametrized(module) or hasattr(module, "base_layer")) and bool(_sizes(module))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """The features, or channels, that go in and come out."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("in1_features", "out_features")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return cast("tuple[int, int]", sizes)
    return None


@dataclass(frozen=True)
class _Step:
    """A module that takes in features, and gives out others where it is a layer; else a norm or a recurrent one."""

    module: nn.Module
    inputs: int
    outputs: int | None
    place: str
    """The path of what contains it, not counting sequences."""

    @property
    def is_convolution(self) -> bool:
        return hasattr(self.module, "in_channels")

    def may_feed(self, later: _Step) -> bool:
        """Whether `later` may take in this layer's outputs: all, some copies, in parts, or laid out otherwise."""
        assert self.outputs is not None
        if self.outputs == later.inputs or later.outputs is None:
            return self.outputs == later.inputs
        if self.inputs == later.inputs and f"{later.place}.".startswith(f"{self.place}." if self.place else ""):
            return False  # beside it, as the predictions of classes and of boxes are
        part, whole = sorted((self.outputs, later.inputs))
        if whole % part:
            return False
        if part == self.outputs:
            is_flattened = self.is_convolution and not later.is_convolution
            return is_flattened or (part >= _SMALLEST_PART and whole <= _CONCATENATED * part)
        is_unflattened = later.is_convolution and not self.is_convolution
        return part >= _SMALLEST_PART and (is_unflattened or whole <= _CHUNKED * part)


class _Layout:
    """The layers and norms of a model in the order in which it has them, which is nearly that in which they run."""

    def __init__(self, model: nn.Module) -> None:
        self._steps = list(_steps(model))
        self._position = {id(step.module): index for index, step in enumerate(self._steps)}
        self._names = {id(module): name.lower() for name, module in model.named_modules()}
        self._outputs = Counter(step.outputs for step in self._steps)
        self._tables = {each.embedding_dim for each in model.modules() if isinstance(each, nn.Embedding)}
        self._data = self._data_sizes()

    def _data_sizes(self) -> set[tuple[bool, int]]:
        """Kind and inputs of the layers that take in the data: the first one, or the only one that no layer feeds."""
        sizes = [(step.is_convolution, step.inputs) for step in self._steps]
        sources = {size for size, step in zip(sizes, self._steps, strict=True) if self._is_source(step)}
        if not sizes or sizes[0] in sources or self._takes_in_the_outputs(self._steps[0]):
            return set(sizes[:1])
        return sources if len(sources) == 1 else set()

    def _takes_in_the_outputs(self, first: _Step) -> bool:
        """Whether the model's outputs are like its inputs, as those of autoencoders: no layer before them feeds one."""
        takes = [index for index, step in enumerate(self._steps) if step.inputs == first.inputs]
        gives = [index for index, step in enumerate(self._steps) if step.outputs == first.inputs]
        is_fed = any(step.inputs == first.outputs for step in self._steps[1:])
        return is_fed and gives[0] >= takes[-1]

    def ends(self, module: nn.Module, is_whole: bool = False) -> list[nn.Module]:
        """The layers in a module that make outputs of the model: none, unless its last child has one.

        The model itself, `is_whole`, may have a branch in every child.
        """
        if _is_layer(module):
            return [] if self._is_hidden(module) else [module]
        children = _children(module)
        ends = self.ends(children[-1]) if children else []
        if isinstance(module, nn.Sequential) or not (ends or is_whole):
            return ends
        return [
            layer for child in children[:-1] for layer in self.ends(child) if self._ends_branch(layer, child)
        ] + ends

    def _ends_branch(self, layer: nn.Module, branch: nn.Module) -> bool:
        """Whether a layer that is not the last is a head: it comes after others of its branch, or its name says so.

        Sizes alone do not tell a lone layer beside the head from a hidden one, such as fused queries, keys and values.
        """
        inputs = self._steps[self._position[id(layer)]].inputs
        others = (step for step in _steps(branch) if step.module is not layer)
        is_fed = any((step.outputs or step.inputs) == inputs for step in others)
        return is_fed or _HEAD_NAME.search(self._names[id(layer)]) is not None

    def _is_hidden(self, layer: nn.Module) -> bool:
        """Whether other layers may take in the outputs: later ones, or one that takes in as much from another layer.

        An earlier one that takes it from no layer is the model's first, and the outputs are like the inputs.
        """
        index = self._position[id(layer)]
        step = self._steps[index]
        others = [s for s in self._steps if s is not step and s.is_convolution == step.is_convolution]
        is_width = any(other.inputs == step.outputs for other in others) and any(
            other.outputs == step.outputs and other.inputs != step.inputs for other in others
        )
        return is_width or any(self._feeds(step, later) for later in self._steps[index + 1 :])

    def _feeds(self, step: _Step, later: _Step) -> bool:
        if step.outputs != later.inputs and (later.is_convolution, later.inputs) in self._data:
            return False  # the data, which begin another branch, or a model whose head was made first
        return step.may_feed(later) or self._is_joined(step, later)

    def _is_joined(self, step: _Step, later: _Step) -> bool:
        """Whether `later` may take in the outputs beside those of another layer, an embedding, or fewer data."""
        if not (self._is_source(later) and step.is_convolution == later.is_convolution):
            return False
        assert step.outputs is not None
        rest = later.inputs - step.outputs
        if step.outputs < _SMALLEST_PART or rest <= 0:
            return False
        is_data = (later.is_convolution, rest) in self._data and rest < step.outputs
        return is_data or rest in self._tables or self._outputs[rest] > (rest == step.outputs)

    def _is_source(self, step: _Step) -> bool:
        """Whether what it takes in is of a size that no other layer gives out."""
        is_norm = step.outputs is None and not isinstance(step.module, nn.RNNBase)
        return not is_norm and self._outputs[step.inputs] == (step.inputs == step.outputs)


def _steps(module: nn.Module, place: str = "", name: str = "") -> Iterator[_Step]:
    if _is_layer(module):
        sizes = _sizes(module)
        assert sizes is not None
        yield _Step(module, *sizes, place)
        return
    gain = dict(module.named_parameters(recurse=False)).get("weight")
    if gain is not None and gain.ndim == 1:
        yield _Step(module, gain.numel(), None, place)
    elif isinstance(module, nn.RNNBase):
        yield _Step(module, module.input_size, None, place)
    inside = place if isinstance(module, nn.Sequential) else f"{place}.{name}".strip(".")
    for name, child in module.named_children():
        yield from _steps(child, inside, name)
