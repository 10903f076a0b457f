"""The whole state of a sharded optimizer, gathered on one rank, and taken apart again for any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .base import State
from .pieces import Piece

WholeState = dict[str, State]
"""What an unsharded optimizer has in `optimizer.state[param]`, by the name of the parameter."""

_Description = list[list[tuple[str, str, list[int]]]]
"""Key, dtype and shape of each state tensor of each piece of a rank."""


class Wire:
    """Sends tensors between two ranks of a process group, over a device that its backend knows."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group = group
        self._device = device

    def send(self, tensor: Tensor, destination: int) -> None:
        """Returns when the tensor is sent, or its sending queued on a GPU."""
        dist.send(tensor.to(self._device).contiguous(), group=self._group, group_dst=destination)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> Tensor:
        """The next tensor from a rank, which must have this shape and dtype."""
        tensor = torch.empty(shape, dtype=dtype, device=self._device)
        dist.recv(tensor, group=self._group, group_src=source)
        return tensor


def send_state(own: Mapping[Piece, State], wire: Wire, destination: int) -> None:
    """Send the state of this rank's pieces, in their order: first what there is, then tensor by tensor."""
    described = json.dumps(_describe(own)).encode()
    wire.send(torch.tensor(len(described), device="cpu"), destination)
    wire.send(torch.frombuffer(bytearray(described), dtype=torch.uint8), destination)
    for state in own.values():
        for tensor in state.values():
            wire.send(tensor, destination)


def receive_state(pieces: Sequence[Piece], own: Mapping[Piece, State], wire: Wire, rank: int, size: int) -> WholeState:
    """Join the state of all pieces, in host memory that nothing else uses."""
    descriptions: dict[int, Iterator[Any]] = {
        source: iter(_describe(own) if source == rank else _receive_description(wire, source)) for source in range(size)
    }
    whole: WholeState = {}
    for piece in pieces:
        for key, dtype, shape in next(descriptions[piece.owner]):
            is_here = piece.owner == rank
            value = own[piece][key] if is_here else wire.receive(shape, getattr(torch, dtype), piece.owner)
            _join(whole.setdefault(piece.name, {}), piece, key, value)
    return whole


def part_of_state(whole: Mapping[str, Mapping[str, Tensor | float]], piece: Piece) -> dict[str, Any]:
    """A piece's own copy of its part of a whole state; `ValueError` where the shapes are not the parameter's."""
    return {key: _part(piece, key, value) for key, value in whole.get(piece.name, {}).items()}


def _describe(own: Mapping[Piece, State]) -> _Description:
    return [
        [(key, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for key, tensor in state.items()]
        for state in own.values()
    ]


def _receive_description(wire: Wire, source: int) -> _Description:
    length = int(wire.receive((), torch.int64, source))
    described: _Description = json.loads(bytes(wire.receive((length,), torch.uint8, source).tolist()))
    return described


def _join(entries: State, piece: Piece, key: str, value: Tensor) -> None:
    is_part = piece.rows is not None and value.ndim > 0
    if key not in entries:
        entries[key] = torch.empty(piece.param.shape if is_part else value.shape, dtype=value.dtype, device="cpu")
    (piece.of(entries[key]) if is_part else entries[key]).copy_(value)


def _part(piece: Piece, key: str, value: Tensor | float) -> Tensor | float:
    if not isinstance(value, Tensor):
        return value
    if piece.rows is None or value.ndim == 0:
        return value.clone()  # PyTorch's own optimizers would work on the tensor given to them, perhaps a mapped file
    if value.shape != piece.param.shape:
        shapes = f"{tuple(value.shape)} there, {tuple(piece.param.shape)} here"
        raise ValueError(f"the state {key!r} of parameter {piece.name!r} is of another shape: {shapes}")
    return piece.of(value).clone()
