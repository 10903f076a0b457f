"""Detection of a model's output heads, to which the matrix rule does not apply."""

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
"""Parts of typical names of output layers."""

_CONCATENATED = 4
"""A layer's input may be the concatenation of up to this many outputs of one size."""

_CHUNKED = 16
"""A layer's output may be split into up to this many inputs of one size: queries, keys and values, or gates."""

_SMALLEST_PART = 4
"""Fewer features are not a part of another layer's inputs or outputs: they are actions or colours."""


def unwrapped(model: nn.Module) -> list[nn.Module]:
    """Return the model and the models that it wraps, outermost first. A wrapper (DDP, PEFT, ...) has one child."""
    chain = [model]
    while not _is_layer(chain[-1]) and len(children := _children(chain[-1])) == 1:
        chain += children
    return chain


def output_heads(model: nn.Module) -> list[nn.Module]:
    """Return the layers that compute the model's outputs; none if the outputs are hidden features.

    These are the results of `get_output_embeddings()` (Hugging Face) and `get_classifier()` (timm), and the layers at
    the ends of the model and of its branches whose outputs no other layer takes as input, judged by sizes and the order
    of the modules. A single layer next to the last one must also have a typical name. If there is none, the head is the
    model's last module if that is a layer, or a `nn.Sequential` that ends in one. Wrappers make no difference.
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
        except (AttributeError, NotImplementedError):  # a model without head may raise either in the method
            continue
        yield from (each for each in (heads if isinstance(heads, Iterable) else [heads]) if isinstance(each, nn.Module))


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters."""
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def _last_step(module: nn.Module) -> list[nn.Module]:
    """Return the last layer, if only the model itself and `nn.Sequential` modules contain it."""
    children = _children(module)
    last = module if _is_layer(module) or not children else children[-1]
    while isinstance(last, nn.Sequential) and _children(last):
        last = _children(last)[-1]
    return [last] if _is_layer(last) else []


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is a linear map or a convolution, also with a parametrization or a PEFT adapter."""
    has_weight = next(module.parameters(recurse=False), None) is not None
    return (has_weight or parametrize.is_parametrized(module) or hasattr(module, "base_layer")) and bool(_sizes(module))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the numbers of input and output features or channels; None for a module without both."""
    for names in (("in_features", "out_features"), ("in_channels", "out_channels"), ("in1_features", "out_features")):
        sizes = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(size, int) for size in sizes):
            return cast("tuple[int, int]", sizes)
    return None


@dataclass(frozen=True)
class _Step:
    """A layer, or a module without `outputs`: a normalization or recurrent module."""

    module: nn.Module
    inputs: int
    outputs: int | None
    place: str
    """Path of the module that contains it, without `nn.Sequential` modules."""

    @property
    def is_convolution(self) -> bool:
        return hasattr(self.module, "in_channels")

    def may_feed(self, later: _Step) -> bool:
        """Whether the outputs may be the inputs of `later`: whole, concatenated, split, flattened or unflattened."""
        assert self.outputs is not None
        if self.outputs == later.inputs or later.outputs is None:
            return self.outputs == later.inputs
        if self.inputs == later.inputs and f"{later.place}.".startswith(f"{self.place}." if self.place else ""):
            return False  # parallel to it, like the predictions of classes and of boxes
        part, whole = sorted((self.outputs, later.inputs))
        if whole % part:
            return False
        if part == self.outputs:
            is_flattened = self.is_convolution and not later.is_convolution
            return is_flattened or (part >= _SMALLEST_PART and whole <= _CONCATENATED * part)
        is_unflattened = later.is_convolution and not self.is_convolution
        return part >= _SMALLEST_PART and (is_unflattened or whole <= _CHUNKED * part)


class _Layout:
    """The layers and norms of a model in definition order, which usually is about the order of execution."""

    def __init__(self, model: nn.Module) -> None:
        self._steps = list(_steps(model))
        self._position = {id(step.module): index for index, step in enumerate(self._steps)}
        self._names = {id(module): name.lower() for name, module in model.named_modules()}
        self._outputs = Counter(step.outputs for step in self._steps)
        self._tables = {each.embedding_dim for each in model.modules() if isinstance(each, nn.Embedding)}
        self._data = self._data_sizes()

    def _data_sizes(self) -> set[tuple[bool, int]]:
        """Return kind and input size of the layers that read the data: the first one, or the only source."""
        sizes = [(step.is_convolution, step.inputs) for step in self._steps]
        sources = {size for size, step in zip(sizes, self._steps, strict=True) if self._is_source(step)}
        if not sizes or sizes[0] in sources or self._reconstructs(self._steps[0]):
            return set(sizes[:1])
        return sources if len(sources) == 1 else set()

    def _reconstructs(self, first: _Step) -> bool:
        """Whether the model's outputs have the size of its inputs, which no layer before them has: an autoencoder."""
        takes = [index for index, step in enumerate(self._steps) if step.inputs == first.inputs]
        gives = [index for index, step in enumerate(self._steps) if step.outputs == first.inputs]
        is_fed = any(step.inputs == first.outputs for step in self._steps[1:])
        return is_fed and gives[0] >= takes[-1]

    def ends(self, module: nn.Module, is_whole: bool = False) -> list[nn.Module]:
        """Return the layers in a module that compute outputs of the model: none unless its last child has one.

        If the module is the model itself (`is_whole`), every child may be a branch.
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
        """Whether a layer that is not the last is a head: another layer of its branch feeds it, or its name is typical.

        Sizes alone cannot distinguish a single layer next to the head from a hidden one, such as fused queries, keys
        and values.
        """
        inputs = self._steps[self._position[id(layer)]].inputs
        others = (step for step in _steps(branch) if step.module is not layer)
        is_fed = any((step.outputs or step.inputs) == inputs for step in others)
        return is_fed or _HEAD_NAME.search(self._names[id(layer)]) is not None

    def _is_hidden(self, layer: nn.Module) -> bool:
        """Whether other layers may use the outputs: later ones, or any with this input size that another layer feeds.

        An earlier layer that no layer feeds is the model's first: then the outputs have the size of the inputs.
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
            return False  # `later` reads the data: it begins another branch, or the head was defined first
        return step.may_feed(later) or self._is_joined(step, later)

    def _is_joined(self, step: _Step, later: _Step) -> bool:
        """Whether `later` may read the outputs concatenated with another layer's, an embedding, or smaller data."""
        if not (self._is_source(later) and step.is_convolution == later.is_convolution):
            return False
        assert step.outputs is not None
        rest = later.inputs - step.outputs
        if step.outputs < _SMALLEST_PART or rest <= 0:
            return False
        is_data = (later.is_convolution, rest) in self._data and rest < step.outputs
        return is_data or rest in self._tables or self._outputs[rest] > (rest == step.outputs)

    def _is_source(self, step: _Step) -> bool:
        """Whether no other layer has the outputs that it needs as inputs, by size."""
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
