"""What each kernel costs on each level of the chip, in integer cycles and bytes, before it is cut into tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ttt_sim.ops import IntArray

#: Levels of a kernel in the order in which data passes them; the task chain of one pipeline step.
#: ``far`` is the backing memory, in both directions.
LEVELS: tuple[str, ...] = ("far", "read", "cache", "matrix", "vector", "special", "link", "write")
FAR, READ, CACHE, MATRIX, VECTOR, SPECIAL, LINK, WRITE = range(len(LEVELS))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OpTiles:
    """The tile that each op runs in, columns of length ``n_ops``, 0 for ops that are not tiled.

    ``rows`` x ``cols`` of the output; ``split`` parts of the reduction; ``depth`` elements of it per pipeline step;
    ``offset`` first column of the op where sibling products run as one, side by side. Attention: query rows of
    ``heads`` heads, keys of a block, split of the keys, keys of a block.
    """

    rows: IntArray
    cols: IntArray
    split: IntArray
    depth: IntArray
    offset: IntArray
    heads: IntArray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KernelWork:
    """Columns of length ``n_kernels``.

    ``cycles`` (n_kernels, 8) service per level, 0 where the level is not used; ``steps`` pipeline steps that the kernel
    takes (the head and the tail of the pipeline last one each); ``main_read_bytes, main_write_bytes`` with
    re-streaming; ``far_read_bytes, far_write_bytes`` of the backing memory likewise; ``restream_bytes`` of the reads of
    both, beyond one pass, and ``far_restream_bytes`` of those of the backing memory alone; ``cache_bytes`` through the
    shared cache; ``staged_bytes`` of the writes, operands put into arrays for one product;
    ``core_bytes`` inside scratchpads; ``flops``; ``lane_ops`` without the special ones; ``special_ops``;
    ``link_bytes`` (n_kernels, n_links) that this chip sends over each link of its file, or is sent by the host;
    ``launch_cycles`` before the kernel; ``row`` DRAM row that stands for its operands;
    ``tile_rows, tile_cols, split, items, waves`` of its largest tiled op, 0 without one; ``on_lanes``
    (n_ops,) products that run on vector lanes; ``op_tiles`` of every op.
    """

    cycles: IntArray
    steps: IntArray
    main_read_bytes: IntArray
    main_write_bytes: IntArray
    far_read_bytes: IntArray
    far_write_bytes: IntArray
    restream_bytes: IntArray
    staged_bytes: IntArray
    far_restream_bytes: IntArray
    cache_bytes: IntArray
    core_bytes: IntArray
    flops: IntArray
    lane_ops: IntArray
    special_ops: IntArray
    link_bytes: IntArray
    launch_cycles: IntArray
    row: IntArray
    tile_rows: IntArray
    tile_cols: IntArray
    split: IntArray
    items: IntArray
    waves: IntArray
    on_lanes: npt.NDArray[np.bool_]
    op_tiles: OpTiles


def busiest_level(cycles: IntArray) -> IntArray:
    """Level with most cycles in each row of ``cycles`` (n, levels); of equals the first, the backing memory last."""
    inner = cycles[:, READ:]
    return np.where(cycles[:, FAR] > inner.max(axis=1), FAR, READ + inner.argmax(axis=1))
