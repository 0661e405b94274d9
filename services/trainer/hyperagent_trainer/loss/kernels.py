"""Triton kernels of the loss: a pass over one slab of the vocabulary, folding it into running sums, and the gradient.

Legend of shape suffixes: M rows of a block, X ids of a slab, T tiles of the slab, J gathered ids, D hidden size,
V vocabulary. Rows are axis 0 of every grid, the only axis that may have more than 65,535 programs.

Each tile of exponentials is relative to its own reference, the larger of the row's maximum so far and the tile's
maximum, so nothing overflows whatever the logits are. `fold_slab` brings the tiles to one reference afterwards, and
touches memory only for the rows whose maximum has risen. There are no atomics, so results are the same in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exponentiate_slab(
    hidden_MD,
    head_VD,
    sorted_ids_MJ,
    first_MT1,
    running_max_M,
    z_MJ,
    exp_MX,
    tile_max_MT,
    tile_sum_MT,
    num_rows,
    vocab_size,
    slab_start,
    hidden_size,
    num_gathered,
    num_tiles,
    first_stride,
    inverse_temperature,
    hidden_stride,
    head_stride,
    exp_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute one tile: float32 logits, moving out those of gathered ids, then exponentials of the others and their sum.

    first_MT1 holds, for each tile of the whole vocabulary, where a row's gathered ids begin in `sorted_ids_MJ`.
    """
    tile = tl.program_id(1)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    columns = tile * BLOCK_X + tl.arange(0, BLOCK_X)
    ids = slab_start + columns
    is_row = rows < num_rows
    is_id = ids < vocab_size

    z = tl.zeros((BLOCK_M, BLOCK_X), dtype=tl.float32)
    for start in range(0, hidden_size, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        is_d = d < hidden_size
        hidden = tl.load(
            hidden_MD + rows[:, None] * hidden_stride + d[None, :], mask=is_row[:, None] & is_d[None, :], other=0.0
        )
        head = tl.load(
            head_VD + ids.to(tl.int64)[:, None] * head_stride + d[None, :],
            mask=is_id[:, None] & is_d[None, :],
            other=0.0,
        )
        z = tl.dot(hidden, tl.trans(head), z, input_precision="ieee")

    first_tile = slab_start // BLOCK_X + tile
    first = tl.load(first_MT1 + rows * first_stride + first_tile, mask=is_row, other=0)
    end = tl.load(first_MT1 + rows * first_stride + first_tile + 1, mask=is_row, other=0)
    # One tile holds the logits and then the rest: two would not fit into registers.
    z = tl.where(is_id[None, :], z, float("-inf"))
    for j in range(tl.max(end - first, axis=0)):
        slot = first + j
        is_slot = slot < end
        gathered = tl.load(sorted_ids_MJ + rows * num_gathered + slot, mask=is_slot, other=-1)
        is_hit = ids[None, :] == gathered[:, None]
        tl.store(z_MJ + rows * num_gathered + slot, tl.sum(tl.where(is_hit, z, 0.0), axis=1), mask=is_slot)
        z = tl.where(is_hit, float("-inf"), z)

    reference = tl.maximum(tl.load(running_max_M + rows, mask=is_row, other=float("-inf")), tl.max(z, axis=1))
    # While only gathered ids have been seen, exp(-inf - 0) gives the correct 0.
    finite = tl.where(reference == float("-inf"), 0.0, reference)
    exponentials = tl.exp((z - finite[:, None]) * inverse_temperature)
    tl.store(tile_max_MT + rows * num_tiles + tile, reference, mask=is_row)
    tl.store(tile_sum_MT + rows * num_tiles + tile, tl.sum(exponentials, axis=1), mask=is_row)
    tl.store(
        exp_MX + rows[:, None] * exp_stride + columns[None, :],
        exponentials.to(exp_MX.dtype.element_ty),
        mask=is_row[:, None] & is_id[None, :],
    )


@triton.jit
def fold_slab(
    running_max_M,
    running_sum_M,
    tile_max_MT,
    tile_sum_MT,
    exp_MX,
    out_MD,
    num_tiles,
    slab_size,
    hidden_size,
    inverse_temperature,
    exp_stride,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Bring one row's tiles and its running sums to the larger of their references."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, BLOCK_T)
    is_tile = tiles < num_tiles
    tile_max = tl.load(tile_max_MT + row * num_tiles + tiles, mask=is_tile, other=float("-inf"))
    tile_sum = tl.load(tile_sum_MT + row * num_tiles + tiles, mask=is_tile, other=0.0)
    old_max = tl.load(running_max_M + row)
    new_max = tl.maximum(old_max, tl.max(tile_max, axis=0))
    finite = tl.where(new_max == float("-inf"), 0.0, new_max)
    tile_factor = tl.exp((tile_max - finite) * inverse_temperature)
    old_factor = tl.exp((old_max - finite) * inverse_temperature)
    total = tl.load(running_sum_M + row) * old_factor + tl.sum(tile_sum * tile_factor, axis=0)
    tl.store(running_max_M + row, new_max)
    tl.store(running_sum_M + row, total)
    if new_max != old_max:
        for start in range(0, hidden_size, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            out = out_MD + row * hidden_size + d
            tl.store(out, tl.load(out, mask=d < hidden_size) * old_factor, mask=d < hidden_size)
        for tile in range(num_tiles):
            factor = tl.sum(tl.where(tiles == tile, tile_factor, 0.0), axis=0)
            if factor != 1.0:
                x = tile * BLOCK_X + tl.arange(0, BLOCK_X)
                exponentials = exp_MX + row * exp_stride + x
                scaled = tl.load(exponentials, mask=x < slab_size).to(tl.float32) * factor
                tl.store(exponentials, scaled.to(exp_MX.dtype.element_ty), mask=x < slab_size)


@triton.jit
def add_gathered(
    grad_MD,
    dense_MD,
    weights_MJ,
    ids_MJ,
    head_VD,
    num_gathered,
    hidden_size,
    grad_stride,
    head_stride,
    BLOCK_D: tl.constexpr,
):
    """Write some columns of one row's gradient: the part from the rest plus the weighted head rows of the gathered ids."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_d = d < hidden_size
    total = tl.load(dense_MD + row * hidden_size + d, mask=is_d, other=0.0)
    for j in range(num_gathered):
        weight = tl.load(weights_MJ + row * num_gathered + j)
        gathered = tl.load(ids_MJ + row * num_gathered + j)
        total += weight * tl.load(head_VD + gathered * head_stride + d, mask=is_d, other=0.0).to(tl.float32)
    tl.store(grad_MD + row * grad_stride + d, total.to(grad_MD.dtype.element_ty), mask=is_d)
