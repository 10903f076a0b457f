"""What the modules of the architectures have in common. Does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from pipelines.tensors import Tensors


class Architecture(Protocol):
    """A module that converts one of our decoders to an architecture of Hugging Face, and back."""

    PREFIX: str
    """Prefix of the names of all weights but the head's; files of a model without a head have none."""
    BUFFERS: tuple[str, ...]
    """Ends of the names of buffers in old files, which are not weights."""

    def problems_of(self, config: Mapping[str, Any]) -> list[str]:
        """Return one line for each reason why our model cannot represent the configuration."""

    def from_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the keys of our settings for a configuration without problems.

        `vocab_multiple` is the size of the embedding: padding then gives the same size for any tokenizer that fits.
        Dropout is left out: it belongs to a training run.
        """

    def to_config(self, settings: Any, vocab_size: int, end_of_text: int) -> dict[str, Any]:
        """Return the configuration of a model with these settings and an unpadded vocabulary."""

    def sizes_of(self, config: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return shapes of weights, by names without prefix, that together have every size, also of the last layer."""

    def weight_names(self, n_layers: int, tied_head: bool) -> set[str]:
        """Return the names of all weights, without prefix."""

    def from_weights(self, theirs: Tensors, n_layers: int, tied_head: bool) -> Tensors:
        """Return the weights, whose names have no prefix, with our names and layout."""

    def to_weights(self, ours: Tensors, n_layers: int, vocab_size: int) -> Tensors:
        """Return our weights with the architecture's names and layout, without padding rows."""


def common_problems(config: Mapping[str, Any], sizes: tuple[str, ...], must_be: Mapping[str, Any]) -> list[str]:
    """Return one line for each key of a wrong type, or with another value than `must_be`, which is also its default."""
    types = {key: ("a positive whole number", is_size(config.get(key))) for key in sizes}
    types["tie_word_embeddings"] = ("true or false", isinstance(config.get("tie_word_embeddings", False), bool))
    return [
        f"{key} is {config[key]!r}; it must be {type_}" if key in config else f"{key} is missing; it must be {type_}"
        for key, (type_, is_right) in types.items()
        if not is_right
    ] + [
        f"{key} is {config[key]!r}; only {value!r} is supported"
        for key, value in must_be.items()
        if config.get(key, value) != value
    ]


def is_size(value: object) -> bool:
    """Whether a value of a configuration is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
