"""Which rank takes what: every row once, and about the same work for all."""

from __future__ import annotations

import pytest
import torch

from optim.pieces import Piece, chunked_rows, even_rows, matrix_cost, owners, split

ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 50257]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_even_rows_cover_all_and_differ_by_one_at_most(rows, size):
    slices = even_rows(rows, size)
    counts = [part.stop - part.start for part in slices]
    assert torch.cat([torch.arange(rows)[part] for part in slices]).tolist() == list(range(rows))
    assert len(slices) == size
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_chunked_rows_are_those_of_torch_chunk(rows, size):
    """As FSDP2 shards; `torch.chunk` leaves out the empty ones."""
    chunks = [chunk.tolist() for chunk in torch.chunk(torch.arange(rows), size)]
    mine = [torch.arange(rows)[part].tolist() for part in chunked_rows(rows, size)]
    assert mine == chunks + [[]] * (size - len(chunks))


def test_a_rank_without_rows_has_no_piece():
    pieces = split("w", torch.zeros(2, 5), even_rows(2, 4))
    assert [piece.shape for piece in pieces] == [(1, 5), (1, 5)]
    assert len({piece.owner for piece in pieces}) == 2


def test_a_piece_is_a_view_of_its_rows():
    whole = torch.arange(12.0).view(4, 3)
    piece = Piece("w", whole, 0, slice(1, 3))
    piece.of(whole).zero_()
    assert whole[:, 0].tolist() == [0, 0, 0, 9]
    assert (piece.shape, piece.numel) == ((2, 3), 6)


def test_the_cost_counts_products_and_roots_of_every_block_on_every_side():
    group = {"row_blocks": None, "batch_dims": 0}
    wide = matrix_cost((8, 32), group, sides=1)
    assert matrix_cost((32, 8), group, sides=1) == wide
    assert matrix_cost((8, 4, 4, 2), group, sides=1) == wide
    assert matrix_cost((16, 32), {**group, "row_blocks": 2}, sides=1) == 2 * wide
    narrow = matrix_cost((4, 32), group, sides=1)
    assert matrix_cost((12, 32), {**group, "row_blocks": (8, 4)}, sides=1) == wide + narrow
    assert matrix_cost((3, 8, 32), {**group, "batch_dims": 1}, sides=1) == 3 * wide
    assert matrix_cost((3, 16, 32), {"row_blocks": 2, "batch_dims": 1}, sides=1) == 6 * wide
    assert matrix_cost((8, 32), group, sides=2) > 10 * wide  # a root of the long side, too


@pytest.mark.parametrize("size", [2, 4, 8])
def test_owners_of_a_gpts_matrices_have_about_the_same_work_and_state(size):
    shapes = [(64, 64)] * 4 * 12 + [(256, 64), (64, 256)] * 12
    params = [torch.empty(shape) for shape in shapes]
    costs = {param: matrix_cost(tuple(param.shape), {"row_blocks": None, "batch_dims": 0}, 1) for param in params}
    owner = owners(costs, size)
    assert list(owners(costs, size).values()) == list(owner.values())
    for measure in (costs.__getitem__, torch.numel):
        loads = [sum(measure(param) for param in params if owner[param] == rank) for rank in range(size)]
        assert max(loads) <= 1.1 * sum(loads) / size


def test_parameters_of_equal_cost_go_around():
    params = [torch.empty(3) for _ in range(8)]
    owner = owners(dict.fromkeys(params, 3), 4)
    assert sorted(owner.values()) == [0, 0, 1, 1, 2, 2, 3, 3]
