"""Transports: bring weights and gradients to the owners of the pieces, and the new weights back to all ranks.

A step calls `begin` of every transport, then `bind` and `send` of each, then `finish` of every one. New weights are
sent while the pieces of the next transport are stepped. Nothing here synchronizes the host with a GPU.
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


def is_sharded_by_rows(tensor: Tensor, size: int) -> bool:
    """Whether a `DTensor` has FSDP2's default sharding, by rows over `size` ranks."""
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    return tuple(tensor.placements) == (Shard(0),) and tensor.device_mesh.size() == size


def local(tensor: Tensor) -> Tensor:
    """Return the local shard of a `DTensor`; any other tensor is returned as is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


# The second name is that before torch 2.14, which warns of it.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class _Transfer:
    """An asynchronous transfer of tensors, packed into one vector, and the tensors to copy it to."""

    work: dist.Work | None
    received: Tensor
    targets: list[Tensor]
    sent: Tensor
    """Kept alive: PyTorch could reuse its memory before it is sent."""

    def unpack(self) -> None:
        assert self.work is not None  # this rank belongs to the process group
        self.work.wait()
        if self.targets:
            vectors = torch.split(self.received, [target.numel() for target in self.targets])
            torch._foreach_copy_(
                self.targets, [vector.view(target.shape) for vector, target in zip(vectors, self.targets, strict=True)]
            )


def _packed(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


class InPlace:
    """Pieces that no other rank needs, stepped in local memory; base class of the other transports."""

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        self.pieces = pieces
        self.process_group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.own = {piece: nn.Parameter(self.memory(piece)) for piece in pieces if piece.owner == self.rank}

    def memory(self, piece: Piece) -> Tensor:
        """Return the tensor that holds the weights of a piece between steps."""
        return local(piece.param.detach())

    def gradient(self, piece: Piece) -> Tensor | None:
        """Return the gradient of a piece; None if its parameter has none."""
        return None if piece.param.grad is None else local(piece.param.grad)

    def begin(self) -> None:
        """Start fetching weights and gradients from other ranks."""

    def bind(self) -> None:
        """Set weights and gradients of this rank's pieces."""
        for piece, tensor in self.own.items():
            # At each step: moving or loading a model may replace the storage of its weights.
            tensor.data = self.memory(piece)
            tensor.grad = self.gradient(piece)

    def send(self) -> None:
        """Release the gradients, and start sending the new weights."""
        for tensor in self.own.values():
            tensor.grad = None

    def finish(self) -> None:
        """Wait until all new weights are in the model; on a GPU, make the current stream wait."""

    def moving(self) -> list[Piece]:
        """Return the pieces with a gradient, which this step updates; the same on all ranks."""
        return [piece for piece in self.pieces if piece.param.grad is not None]


class Replicated(InPlace):
    """Pieces of replicated parameters with equal gradients: all ranks get the new weights from their owners."""

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        super().__init__(pieces, group)
        self._sending: list[_Transfer] = []

    def memory(self, piece: Piece) -> Tensor:
        """Return the piece's rows of the parameter."""
        return piece.of(piece.param.detach())

    def gradient(self, piece: Piece) -> Tensor | None:
        """Return the piece's rows of the gradient."""
        return None if piece.param.grad is None else piece.of(piece.param.grad)

    def send(self) -> None:
        """Start one all-gather of all pieces; many broadcasts would take longer.

        All ranks send as many elements as the one with most. Memory for a copy of the weights is taken until `finish`.
        """
        super().send()
        of_ranks: list[list[Piece]] = [[] for _ in range(self.size)]
        for piece in self.moving():
            of_ranks[piece.owner].append(piece)
        counts = [sum(piece.numel for piece in pieces) for pieces in of_ranks]
        if self.size == 1 or not any(counts):
            return
        sent = self.memory(next(itertools.chain(*of_ranks))).new_empty(max(counts))
        if counts[self.rank]:
            torch.cat([self.memory(piece).reshape(-1) for piece in of_ranks[self.rank]], out=sent[: counts[self.rank]])
        received = sent.new_empty(self.size * len(sent))
        work = _all_gather(received, sent, group=self.process_group, async_op=True)
        vectors = torch.split(received, len(sent))
        self._sending = [
            _Transfer(work, vectors[rank][: counts[rank]], [self.memory(piece) for piece in pieces], sent)
            for rank, pieces in enumerate(of_ranks)
            if rank != self.rank
        ]

    def finish(self) -> None:
        """Wait for the pieces of the other ranks, and copy them to the parameters."""
        for transfer in self._sending:
            transfer.unpack()
        self._sending = []


class RowSharded(InPlace):
    """Whole parameters that FSDP2 shards by rows: for a step, the owner fetches all rows of weight and gradient.

    Each row is sent to one rank and back, so traffic and memory per rank decrease with the number of ranks.
    """

    def __init__(self, pieces: Sequence[Piece], group: dist.ProcessGroup | None) -> None:
        super().__init__(pieces, group)
        self._weights: dict[Piece, Tensor] = {}
        self._grads: dict[Piece, Tensor] = {}
        self._transfers: list[_Transfer] = []

    def memory(self, piece: Piece) -> Tensor:
        """Return one zero expanded to the shape of the parameter: the weights are present only during a step."""
        return local(piece.param.detach()).new_zeros(()).expand(piece.shape)

    def begin(self) -> None:
        """Start fetching all rows of this rank's pieces, and sending the local rows of the others to their owners."""
        moving = self.moving()
        self._weights = self._fetch({piece: local(piece.param.detach()) for piece in moving})
        self._grads = self._fetch({piece: local(grad) for piece in moving if (grad := piece.param.grad) is not None})

    def _fetch(self, rows: dict[Piece, Tensor]) -> dict[Piece, Tensor]:
        """Return tensors for all rows of this rank's pieces, which the started exchange fills."""
        whole = {piece: tensor.new_empty(piece.shape) for piece, tensor in rows.items() if piece.owner == self.rank}
        self._exchange(self._by_owner(rows), self._by_rank(whole))
        return whole

    def bind(self) -> None:
        """Wait for the rows, and set weights and gradients of this rank's pieces that have a gradient."""
        self._unpack()
        for piece, weight in self._weights.items():
            self.own[piece].data, self.own[piece].grad = weight, self._grads[piece]
        self._grads = {}

    def send(self) -> None:
        """Start sending the new rows back, and release the whole weights."""
        super().send()
        rows = {piece: local(piece.param.detach()) for piece in self.moving()}
        self._exchange(self._by_rank(self._weights), self._by_owner(rows))
        for piece in self._weights:
            self.own[piece].data = self.memory(piece)
        self._weights = {}

    def finish(self) -> None:
        """Wait for the new rows, and copy them to FSDP2's shards."""
        self._unpack()

    def _by_owner(self, rows: dict[Piece, Tensor]) -> list[list[Tensor]]:
        return [[tensor for piece, tensor in rows.items() if piece.owner == owner] for owner in range(self.size)]

    def _by_rank(self, whole: dict[Piece, Tensor]) -> list[list[Tensor]]:
        """Return, for each rank, its rows of whole tensors."""
        return [
            [tensor[chunked_rows(tensor.shape[0], self.size)[rank]] for tensor in whole.values()]
            for rank in range(self.size)
        ]

    def _exchange(self, to_send: list[list[Tensor]], to_fill: list[list[Tensor]]) -> None:
        """Start sending `to_send[rank]` to each rank, and filling `to_fill[rank]` with the tensors received from it."""
        tensors, targets = list(itertools.chain(*to_send)), list(itertools.chain(*to_fill))
        if not tensors and not targets:
            return  # no parameter has a gradient, on this rank and so on all
        sent = _packed(tensors or [targets[0].new_empty(0)])
        counts_out, counts_in = ([sum(map(torch.numel, each)) for each in lists] for lists in (to_send, to_fill))
        received = sent.new_empty(sum(counts_in))
        work = dist.all_to_all_single(received, sent, counts_in, counts_out, group=self.process_group, async_op=True)
        self._transfers.append(_Transfer(work, received, targets, sent))

    def _unpack(self) -> None:
        for transfer in self._transfers:
            transfer.unpack()
        self._transfers = []
