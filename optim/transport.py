"""How the pieces of a rank get their weights and gradients, and how their new weights reach the model on every rank.

A step calls `begin` of every transport, then `bind` and `send` of each, and then `finish` of every one: what is sent
travels while the next one's pieces are stepped. Nothing here makes the host wait for a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dtensors import is_dtensor
from .pieces import Piece, chunked_rows

BUCKET = 2**20
"""Elements up to which pieces of one owner are sent together; a larger one is sent alone, from where it lies."""


def is_sharded_by_rows(tensor: Tensor, size: int) -> bool:
    """Whether a `DTensor` is sharded as FSDP2 does it by default, over as many ranks."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    return tuple(tensor.placements) == (Shard(0),) and tensor.device_mesh.size() == size


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which is all of it unless it is sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


@dataclass(frozen=True)
class _Parcel:
    """Tensors on their way as one vector, and where they go."""

    work: dist.Work | None
    received: Tensor
    targets: list[Tensor]
    sent: Tensor
    """Held so that its memory is not given away before it has been sent."""

    def unpack(self) -> None:
        assert self.work is not None  # this rank belongs to the process group
        self.work.wait()
        if self.targets:
            parts = torch.split(self.received, [target.numel() for target in self.targets])
            torch._foreach_copy_(
                self.targets, [part.view(target.shape) for part, target in zip(parts, self.targets, strict=True)]
            )


def _packed(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class InPlace:
    """Pieces whose weights lie in this rank's memory and that no other rank needs; the base of the others."""

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        self.pieces = pieces
        self.process_group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.own = {piece: nn.Parameter(self.memory(piece)) for piece in pieces if piece.owner == self.rank}

    def memory(self, piece: Piece) -> Tensor:
        """Where the weights of a piece are between steps."""
        return local(piece.param.detach())

    def gradient(self, piece: Piece) -> Tensor | None:
        """The gradient of a piece, `None` where its parameter has none."""
        return None if piece.param.grad is None else local(piece.param.grad)

    def begin(self) -> None:
        """Begin to fetch weights and gradients from other ranks."""

    def bind(self) -> None:
        """Give the own pieces their weights and gradients."""
        for piece, tensor in self.own.items():
            # Anew at each step: moving or loading a model may have put its weights elsewhere.
            tensor.data = self.memory(piece)
            tensor.grad = self.gradient(piece)

    def send(self) -> None:
        """Let go of the gradients, and begin to send the new weights."""
        for tensor in self.own.values():
            tensor.grad = None

    def finish(self) -> None:
        """Have all new weights in the model; on a GPU, before anything that its stream does later."""

    def moving(self) -> list[Piece]:
        """The pieces that this step moves, the same on all ranks."""
        return [piece for piece in self.pieces if piece.param.grad is not None]


class Replicated(InPlace):
    """Pieces of parameters that every rank has wholly, with equal gradients: owners broadcast the new weights."""

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        super().__init__(pieces, group)
        self._sending: list[_Parcel] = []

    def memory(self, piece: Piece) -> Tensor:
        """The piece's rows of the parameter."""
        return piece.of(piece.param.detach())

    def gradient(self, piece: Piece) -> Tensor | None:
        """The piece's rows of the gradient."""
        return None if piece.param.grad is None else piece.of(piece.param.grad)

    def send(self) -> None:
        """Broadcast in buckets, the owners taking turns."""
        super().send()
        moving = self.moving()
        by_owner = [_buckets([piece for piece in moving if piece.owner == owner]) for owner in range(self.size)]
        turns = itertools.chain(*itertools.zip_longest(*by_owner, fillvalue=[]))
        self._sending = [self._broadcast(bucket) for bucket in turns if bucket]

    def _broadcast(self, bucket: list[Piece]) -> _Parcel:
        owner, weights = bucket[0].owner, [self.memory(piece) for piece in bucket]
        targets: list[Tensor] = []
        if len(weights) == 1 and weights[0].is_contiguous():
            vector = weights[0]
        elif owner == self.rank:
            vector = _packed(weights)
        else:
            vector, targets = weights[0].new_empty(sum(piece.numel for piece in bucket)), weights
        work = dist.broadcast(vector, group=self.process_group, group_src=owner, async_op=True)
        return _Parcel(work, vector, targets, vector)

    def finish(self) -> None:
        """Wait for all buckets, and copy out what came packed."""
        for parcel in self._sending:
            parcel.unpack()
        self._sending = []


def _buckets(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces in order, together up to `BUCKET` elements."""
    buckets: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        room -= piece.numel
        if room < 0:
            buckets.append([])
            room = BUCKET - piece.numel
        buckets[-1].append(piece)
    return buckets


class RowSharded(InPlace):
    """Whole parameters whose rows FSDP2 shares out: for a step, an owner fetches all rows of weight and gradient.

    Each row goes to one rank and comes back, so what a rank sends and holds falls as the number of ranks grows.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        super().__init__(pieces, group)
        self._weights: dict[Piece, Tensor] = {}
        self._grads: dict[Piece, Tensor] = {}
        self._parcels: list[_Parcel] = []

    def memory(self, piece: Piece) -> Tensor:
        """A single element in the shape of the parameter: the weights are here during a step alone."""
        return local(piece.param.detach()).new_zeros(()).expand(piece.shape)

    def begin(self) -> None:
        """Begin to fetch all rows of the own pieces, and to send the rows here to the owners of the others."""
        moving = self.moving()
        self._weights = self._fetch({piece: local(piece.param.detach()) for piece in moving})
        self._grads = self._fetch({piece: local(grad) for piece in moving if (grad := piece.param.grad) is not None})

    def _fetch(self, rows: dict[Piece, Tensor]) -> dict[Piece, Tensor]:
        """The own pieces' whole tensors, to be filled with the rows here and on the other ranks."""
        whole = {piece: tensor.new_empty(piece.shape) for piece, tensor in rows.items() if piece.owner == self.rank}
        self._exchange(self._by_owner(rows), self._by_rank(whole))
        return whole

    def bind(self) -> None:
        """Wait for the rows; a piece whose parameter has no gradient stays without memory."""
        self._unpack()
        for piece, weight in self._weights.items():
            self.own[piece].data, self.own[piece].grad = weight, self._grads[piece]
        self._grads = {}

    def send(self) -> None:
        """Begin to send the new rows back, and let go of the whole weights."""
        super().send()
        rows = {piece: local(piece.param.detach()) for piece in self.moving()}
        self._exchange(self._by_rank(self._weights), self._by_owner(rows))
        for piece in self._weights:
            self.own[piece].data = self.memory(piece)
        self._weights = {}

    def finish(self) -> None:
        """Wait for the new rows, and put them where FSDP2 has them."""
        self._unpack()

    def _by_owner(self, rows: dict[Piece, Tensor]) -> list[list[Tensor]]:
        return [[tensor for piece, tensor in rows.items() if piece.owner == owner] for owner in range(self.size)]

    def _by_rank(self, whole: dict[Piece, Tensor]) -> list[list[Tensor]]:
        """The rows of whole tensors that each rank holds."""
        return [
            [tensor[chunked_rows(tensor.shape[0], self.size)[rank]] for tensor in whole.values()]
            for rank in range(self.size)
        ]

    def _exchange(self, to_send: list[list[Tensor]], to_fill: list[list[Tensor]]) -> None:
        """Begin to send `to_send[rank]` to every rank, and to fill `to_fill[rank]` with what comes from there."""
        tensors, targets = list(itertools.chain(*to_send)), list(itertools.chain(*to_fill))
        if not tensors and not targets:
            return  # no parameter has a gradient, here and so everywhere
        sent = _packed(tensors or [targets[0].new_empty(0)])
        counts_out, counts_in = ([sum(map(torch.numel, part)) for part in parts] for parts in (to_send, to_fill))
        received = sent.new_empty(sum(counts_in))
        work = dist.all_to_all_single(received, sent, counts_in, counts_out, group=self.process_group, async_op=True)
        self._parcels.append(_Parcel(work, received, targets, sent))

    def _unpack(self) -> None:
        for parcel in self._parcels:
            parcel.unpack()
        self._parcels = []
