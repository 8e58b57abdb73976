"""What mappers charge in the same way whatever computes the products: main memory, the shared on-chip level, vector and
special units, links, launches. A mapper adds its products and attention cores to a :data:`Work` in between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ttt_sim.chip import Chip, ComputeUnit, Link, MemoryLevel
from ttt_sim.dtypes import DTYPES
from ttt_sim.errors import UnsupportedError
from ttt_sim.lower.kernels import Kernels, sibling_group
from ttt_sim.lower.spill import part_of
from ttt_sim.lower.tiles import AttentionWork, TileWork, flops_per_cycle
from ttt_sim.lower.traffic import MAIN, Traffic, usable_cache_bytes
from ttt_sim.lower.work import CACHE, FAR, LEVELS, LINK, MATRIX, READ, SPECIAL, VECTOR, WRITE, KernelWork, OpTiles
from ttt_sim.lower.writes import reupload_bytes, reupload_cycles
from ttt_sim.ops import (
    ATTENTION_PRODUCTS,
    KIND,
    OP_KINDS,
    IntArray,
    OpClass,
    Trace,
    element_bits,
    lane_ops,
    op_classes,
    overwritten,
    owners,
    query_bytes,
    scan_chunks,
    scan_products,
    total_by,
)
from ttt_sim.units import ceil_div

#: Bytes of operands that one core streams per pipeline step of a row-wise kernel.
STREAM_STEP_BYTES = 16 * 1024

#: Columns that a mapper adds to, by name: of length ``n_kernels``, and of length ``n_ops`` the tiles of ops (``op_``)
#: and the products that run on vector lanes (``on_lanes``).
Work = dict[str, IntArray]
_COLUMNS = (
    "cache_bytes", "core_bytes", "matrix", "steps", "restream", "items", "waves", "split", "rows", "cols", "extra",
    "link", "staged",
)  # fmt: skip


def no_work(trace: Trace, kernels: Kernels) -> Work:
    """Nothing done yet."""
    work = {name: np.zeros(kernels.n, dtype=np.int64) for name in _COLUMNS}
    work["on_lanes"] = np.zeros(trace.n_ops, dtype=np.int64)
    return work | {f"op_{name}": np.zeros(trace.n_ops, dtype=np.int64) for name in OpTiles.__slots__}


def finish(trace: Trace, chip: Chip, kernels: Kernels, traffic: Traffic, work: Work) -> KernelWork:
    """All levels of every kernel, from its tiled ops (``work``) and what every chip charges in the same way.

    Raises:
        UnsupportedError: the chip lacks a unit or a link that the trace needs.
    """
    n, main = kernels.n, chip.main_memory
    share = stream_share(trace, chip, kernels)
    link_bytes = _collectives(trace, chip, kernels, work)

    # Row-wise ops stream what they exchange with the cache once.
    op_class = op_classes(trace)
    rowwise = np.zeros(n, dtype=np.bool_)
    rowwise[kernels.of_op] = True
    rowwise[kernels.of_op[op_class <= int(OpClass.ATTENTION)]] = False
    streamed = np.where(rowwise, traffic.on_chip_bytes, 0)
    work["cache_bytes"] += streamed
    work["core_bytes"] += streamed
    row_steps = -(-traffic.on_chip_bytes // (chip.cores * STREAM_STEP_BYTES))
    steps = np.maximum(np.where(rowwise, row_steps, work["steps"]), 1)

    once = traffic.main_read_bytes + traffic.far_read_bytes
    work["restream"] += np.where(_rereads(trace, chip, kernels), once, 0)
    far_again = part_of(work["restream"], traffic.far_read_bytes, once)
    lanes, special_ops = (total_by(kernels.of_op, values, n) for values in lane_ops(trace))
    lanes += total_by(kernels.of_op, np.where(work["on_lanes"] > 0, trace.flops // 2, 0), n)  # multiply-adds
    flops = total_by(kernels.of_op, trace.flops, n)
    write_bytes = traffic.main_write_bytes + work["staged"]
    read_bytes = traffic.main_read_bytes + work["restream"] - far_again
    far_read_bytes = traffic.far_read_bytes + far_again
    cycles = np.zeros((n, len(LEVELS)), dtype=np.int64)
    cycles[:, READ] = slower(transfer_cycles(chip, main, read_bytes, write=False), share)
    cycles[:, WRITE] = slower(transfer_cycles(chip, main, write_bytes, write=True), share)
    to_main = traffic.read_place == MAIN, traffic.write_place == MAIN
    moved = trace.read_bytes > traffic.read_far_bytes, trace.write_bytes > traffic.write_far_bytes
    cycles[:, READ] += _transfer_starts(trace, chip, kernels, main, to_main[0] & moved[0], write=False)
    cycles[:, WRITE] += _transfer_starts(trace, chip, kernels, main, to_main[1] & moved[1], write=True)
    if chip.backing is not None:
        cycles[:, FAR] = far_cycles(chip, chip.backing, far_read_bytes, traffic.far_write_bytes)
        for far, write in ((traffic.read_far_bytes, False), (traffic.write_far_bytes, True)):
            cycles[:, FAR] += _transfer_starts(trace, chip, kernels, chip.backing, far > 0, write=write)
    uploaded = reupload_bytes(trace, chip, kernels.of_op, n)
    cycles[:, LINK] = work["link"] + reupload_cycles(chip, uploaded)
    host = next((i for i, link in enumerate(chip.links) if link.topology == "host"), None)
    if host is not None:
        link_bytes[:, host] += uploaded
    if chip.cache is not None and chip.cache is not main:
        cycles[:, CACHE] = transfer_cycles(chip, chip.cache, work["cache_bytes"], write=False)
    cycles[:, MATRIX] = work["matrix"]
    cycles[:, VECTOR], cycles[:, SPECIAL] = _vector_cycles(chip, lanes, special_ops)
    cycles[:, VECTOR] += _append_cycles(trace, chip, kernels)

    launch = np.full(n, chip.cycles(chip.overheads.op_launch_s) + chip.library.kernel_cycles, dtype=np.int64)
    launch += work["extra"]
    if chip.mapping.serial_kernels:  # the first load of a kernel waits for nothing to hide its latency behind
        near = np.where(cycles[:, READ] > 0, chip.cycles(main.latency_s), 0)
        behind = 0 if chip.backing is None else chip.cycles(chip.backing.latency_s)
        launch += np.maximum(near, np.where(far_read_bytes > 0, behind, 0))
    launch += _hop_cycles(trace, chip, kernels, far_read_bytes > 0)
    first_of_step = np.r_[True, np.diff(trace.step[kernels.lead]) != 0]
    launch[first_of_step] += chip.cycles(chip.overheads.call_s)

    return KernelWork(
        cycles=cycles,
        steps=steps,
        main_read_bytes=read_bytes,
        main_write_bytes=write_bytes,
        far_read_bytes=far_read_bytes,
        far_write_bytes=traffic.far_write_bytes,
        restream_bytes=work["restream"],
        far_restream_bytes=far_again,
        staged_bytes=work["staged"],
        cache_bytes=work["cache_bytes"],
        core_bytes=work["core_bytes"],
        flops=flops,
        lane_ops=lanes,
        special_ops=special_ops,
        link_bytes=link_bytes,
        launch_cycles=launch,
        row=_rows(trace, kernels),
        tile_rows=work["rows"],
        tile_cols=work["cols"],
        split=work["split"],
        items=work["items"],
        waves=work["waves"],
        on_lanes=work["on_lanes"] > 0,
        op_tiles=OpTiles(**{name: work[f"op_{name}"] for name in OpTiles.__slots__}),
    )


def _hop_cycles(trace: Trace, chip: Chip, kernels: Kernels, far: npt.NDArray[np.bool_]) -> IntArray:
    """Latency of the hops of walks, each of which waits for what the one before it read; that of a kernel's first load
    may be counted already. ``far`` (n_kernels,): it reads from behind the main memory."""
    hops = total_by(kernels.of_op, np.where(trace.kind == KIND["graph_search"], trace.heads, 0), kernels.n)
    waits = np.maximum(hops - (1 if chip.mapping.serial_kernels else 0), 0)
    latency = chip.cycles(chip.main_memory.latency_s)
    behind = latency if chip.backing is None else max(latency, chip.cycles(chip.backing.latency_s))
    return waits * np.where(far, behind, latency)


def slower(cycles: IntArray, share: npt.NDArray[np.float64]) -> IntArray:
    """Cycles at a share of the bandwidth."""
    return np.ceil(cycles / share).astype(np.int64)


#: Key of ``library.stream_fraction`` by class of op, where that is not the op's own kind.
_STREAM_KEY = {OpClass.MATMUL: "product", OpClass.ATTENTION: "attention", OpClass.SCAN: "delta_rule"}


def stream_share(trace: Trace, chip: Chip, kernels: Kernels) -> npt.NDArray[np.float64]:
    """Share of the achievable main-memory bandwidth by kernel: that of its products, else the least of its ops."""
    rules = chip.library.stream_frac
    by_kind = np.array([rules.get(_STREAM_KEY.get(kind.op_class, kind.name), 1.0) for kind in OP_KINDS])
    tiled = np.isin(op_classes(trace), [int(op_class) for op_class in _STREAM_KEY])
    share = np.ones(kernels.n, dtype=np.float64)
    np.minimum.at(share, kernels.of_op[~tiled], by_kind[trace.kind[~tiled]])
    share[kernels.of_op[tiled]] = by_kind[trace.kind[tiled]]
    return share


#: Row-wise ops that reduce over a row before they can store any of it, and the copies of it that a core holds: norms
#: keep their weights beside it.
_REDUCE_ROWS = {"attn_norm": 2, "mlp_norm": 2, "final_norm": 2, "layernorm": 2, "softmax": 1}


def _rereads(trace: Trace, chip: Chip, kernels: Kernels) -> npt.NDArray[np.bool_]:
    """Kernels that read their rows twice, because a row is longer than a core can hold."""
    copies = np.array([_REDUCE_ROWS.get(kind.name, 0) for kind in OP_KINDS], dtype=np.int64)[trace.kind]
    long = (copies * trace.n * element_bits(trace) > 8 * chip.library.row_bytes) & (chip.library.row_bytes > 0)
    flags = np.zeros(kernels.n, dtype=np.bool_)
    flags[kernels.of_op[long]] = True
    return flags


def _append_cycles(trace: Trace, chip: Chip, kernels: Kernels) -> IntArray:
    """Each row that an append stores holds a core for a while, however narrow it is."""
    rows = np.where(trace.kind == KIND["kv_append"], trace.batch * trace.m, 0) * chip.library.row_cycles
    return -(-total_by(kernels.of_op, rows, kernels.n) // chip.cores)


def _transfer_starts(
    trace: Trace, chip: Chip, kernels: Kernels, memory: MemoryLevel, moved: npt.NDArray[np.bool_], *, write: bool
) -> IntArray:
    """Cycles in which the engines of ``memory`` begin transfers: one for each operand ``moved`` and sequence."""
    op = owners(trace.write_ptr if write else trace.read_ptr)
    transfers = np.where(moved, trace.batch[op], 0)
    rounds: IntArray = -(-total_by(kernels.of_op[op], transfers, kernels.n) // memory.transfer_engines)
    return rounds * chip.cycles(memory.transfer_start_s)


def _collectives(trace: Trace, chip: Chip, kernels: Kernels, work: Work) -> IntArray:
    """Transfers between chips, each over the nearest link that reaches all its partners (:func:`link_to`), or the
    next stage of a pipeline (:func:`stage_link`).

    Returns the bytes that this chip sends, (n_kernels, n_links).

    Raises:
        UnsupportedError: the chip has no link that reaches so many others.
    """
    sent = np.zeros((kernels.n, len(chip.links)), dtype=np.int64)
    ops = np.flatnonzero(op_classes(trace) == int(OpClass.COLLECTIVE))
    stage: dict[int, int] = {}  # that a step is in
    for op in ops:
        ranks, group, step = int(trace.heads[op]), int(trace.kv_heads[op]), int(trace.step[op])
        kind = OP_KINDS[int(trace.kind[op])].name
        if kind == "stage_send":
            link = stage_link(chip, max(group, 1), stage.get(step, 0))
            stage[step] = stage.get(step, 0) + 1
        else:
            link = link_to(chip, max(ranks, group) - 1)
        nbytes = int(trace.read_bytes[trace.read_ptr[op] : trace.read_ptr[op + 1]].sum())
        kernel = kernels.of_op[op]
        work["link"][kernel] += chip.cycles(transfer_seconds(link, kind, nbytes, ranks))
        work["steps"][kernel] += 1
        sent[kernel, chip.links.index(link)] += sent_bytes(kind, nbytes, ranks)
    return sent


def sent_bytes(kind: str, nbytes: int, ranks: int) -> int:
    """Bytes that a chip sends in a transfer to which it gives ``nbytes``; kinds as of :func:`transfer_seconds`."""
    if kind == "allreduce":
        return ceil_div(2 * (ranks - 1) * nbytes, ranks)
    return (ranks - 1) * nbytes if kind == "allgather" else nbytes


def link_to(chip: Chip, partners: int) -> Link:
    """The first link off the chip that reaches ``partners`` other chips.

    Raises:
        UnsupportedError: there is none.
    """
    for link in _links(chip):
        if link.peers is None or link.peers >= partners:
            return link
    raise _no_link(chip, partners)


def stage_link(chip: Chip, stage_chips: int, stage: int) -> Link:
    """The first link off the chip from pipeline stage ``stage`` (0, 1, ...) to the next, of ``stage_chips`` each.

    A link to ``peers`` others joins nodes of one chip more; nodes are filled with whole stages, one after another.

    Raises:
        UnsupportedError: there is none.
    """
    for link in _links(chip):
        if link.peers is None:
            return link
        per_node = (link.peers + 1) // stage_chips
        if per_node and (stage + 1) % per_node:
            return link
    raise _no_link(chip, (stage + 2) * stage_chips - 1)


def _links(chip: Chip) -> list[Link]:
    return [link for link in chip.links if link.scope == "chip" and link.topology != "host"]


def _no_link(chip: Chip, partners: int) -> UnsupportedError:
    links = _links(chip)
    have = f"links to {max(link.peers or 0 for link in links)} others at most" if links else "no link to others"
    return UnsupportedError(f"{chip.name}: the workload needs links to {partners} other chips and the file has {have}")


def transfer_seconds(link: Link, kind: str, nbytes: int, ranks: int) -> float:
    """Time of one transfer of ``nbytes`` that each of ``ranks`` chips gives.

    ``allreduce`` in a ring, 2 (n - 1) steps of an n-th; ``allgather`` n - 1 steps of the whole; ``kv_ring`` and
    ``stage_send`` one step to one partner; ``delta_scan`` passes partial sums on in pieces, so the bytes cross a link
    once and the hops add up. Groups use as many of the links as they have partners (a switch: all of them), one step
    to a partner uses one. Groups use the faster of two protocols (see :class:`ttt_sim.chip.Link`).
    """
    if kind in ("allreduce", "allgather"):
        steps = 2 * (ranks - 1) if kind == "allreduce" else ranks - 1
        share = 1.0 if link.topology == "switch" else min(ranks - 1, link.count) / link.count
        moved = steps * nbytes / ((ranks if kind == "allreduce" else 1) * link.bytes_per_s * share)
    else:
        steps = ranks - 1 if kind == "delta_scan" else 1
        moved = nbytes / (link.bytes_per_s / (1 if link.topology == "switch" else link.count))
    fixed = link.start_s + steps * link.latency_s
    return fixed + min(moved / link.short_frac, link.bulk_start_s + moved / link.bulk_frac)


def transfer_cycles(chip: Chip, memory: MemoryLevel, nbytes: IntArray, *, write: bool) -> IntArray:
    """Cycles in which all channels of ``memory`` together move ``nbytes`` (array), 0 for no bytes.

    Addresses are striped over the channels one interleave unit at a time, so the busiest channel moves
    ceil(units / channels) of them: a short transfer leaves channels idle.
    """
    rate = memory.write_bytes_per_s if write else memory.read_bytes_per_s
    per_cycle = rate * memory.achievable_frac / chip.clock_hz
    unit = memory.interleave_bytes * memory.channels
    rounded = -(-nbytes // memory.interleave_bytes) * memory.interleave_bytes
    busiest = -(-rounded // unit) * memory.interleave_bytes
    return np.ceil(busiest / (per_cycle / memory.channels)).astype(np.int64)


def far_cycles(chip: Chip, backing: MemoryLevel, read_bytes: IntArray, write_bytes: IntArray) -> IntArray:
    """Cycles of the backing memory: both directions in turn on a shared bus, side by side on ports of their own."""
    reads = transfer_cycles(chip, backing, read_bytes, write=False)
    writes = transfer_cycles(chip, backing, write_bytes, write=True)
    return reads + writes if backing.shared_bus else np.maximum(reads, writes)


def add_products(
    trace: Trace,
    kernels: Kernels,
    work: Work,
    by_op: IntArray,
    choose: Callable[[int, int, int, int, str, int], TileWork],
) -> None:
    """Add the GEMMs; neighbouring sibling GEMMs of a kernel are one GEMM.

    ``choose(m, n, k, batch, dtype, value)`` maps one product; ``value`` is that of ``by_op`` (n_ops,).
    """
    matmul = np.flatnonzero(op_classes(trace) == int(OpClass.MATMUL))
    if not matmul.size:
        return
    group, kernel = sibling_group()[trace.kind], kernels.of_op[matmul]
    new = np.r_[True, (np.diff(kernel) != 0) | (np.diff(group[matmul]) != 0) | (np.diff(matmul) != 1)]
    first = matmul[new]
    width = np.add.reduceat(trace.n[matmul], np.flatnonzero(new))
    shapes = np.stack(
        [trace.m[first], width, trace.k[first], trace.batch[first], trace.dtype[first], by_op[first]], axis=1
    )
    unique, inverse = np.unique(shapes, axis=0, return_inverse=True)
    chosen = [choose(int(m), int(w), int(k), int(b), DTYPES[int(t)], int(value)) for m, w, k, b, t, value in unique]
    inverse = inverse.reshape(-1)
    _add(work, kernels.of_op[first], inverse, chosen)
    merged = np.cumsum(new) - 1  # the product that each op is part of
    _note(work, matmul, inverse[merged], chosen)
    before = np.cumsum(trace.n[matmul]) - trace.n[matmul]  # columns of all ops before
    work["op_offset"][matmul] = before - before[new][merged]


def add_scans(
    trace: Trace, kernels: Kernels, work: Work, choose: Callable[[int, int, int, int, str, int], TileWork]
) -> None:
    """Add the scans: chunk after chunk, and every product of a chunk mapped like any other, one after the other.

    ``choose(m, n, k, batch, dtype, over_tokens)`` maps one product of all states.
    """
    for op in np.flatnonzero(op_classes(trace) == int(OpClass.SCAN)):
        kernel, states = kernels.of_op[op], int(trace.batch[op] * trace.heads[op])
        kind, n, k = OP_KINDS[int(trace.kind[op])].name, int(trace.n[op]), int(trace.k[op])
        chosen: list[TileWork] = []
        for size, times in scan_chunks(int(trace.m[op]), int(trace.pairs[op])):
            for part in scan_products(kind, n=n, k=k, chunk=size):
                dtype, over_tokens = DTYPES[int(trace.dtype[op])], int(part.over_tokens)
                tile = choose(part.rows, part.cols, part.depth, states, dtype, over_tokens)
                for column, value in (
                    ("cache_bytes", tile.cache_bytes), ("core_bytes", tile.core_bytes), ("steps", tile.steps),
                    ("matrix", tile.matrix_cycles), ("link", tile.link_cycles), ("extra", tile.extra_cycles),
                ):  # fmt: skip
                    work[column][kernel] += times * (ceil_div(value, 2) if part.half else value)
                chosen.append(tile)
        largest = max(chosen, key=lambda tile: tile.matrix_cycles)
        work["items"][kernel], work["waves"][kernel], work["split"][kernel] = largest.items, largest.waves, 1
        work["rows"][kernel], work["cols"][kernel] = largest.tile


def add_attention(
    trace: Trace,
    chip: Chip,
    kernels: Kernels,
    work: Work,
    choose: Callable[..., AttentionWork],
    *,
    among: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Add the attention cores (``among`` (n_ops,): of these ops), each mapped by ``choose`` (see
    :func:`ttt_sim.lower.tiles.attention`)."""
    chosen = op_classes(trace) == int(OpClass.ATTENTION)
    core = np.flatnonzero(chosen if among is None else chosen & among)
    if not core.size:
        return
    usable = usable_cache_bytes(trace, chip)
    kv_bytes = _kv_bytes(trace)[core]
    products = np.array([ATTENTION_PRODUCTS.get(kind.name, 0) for kind in OP_KINDS], dtype=np.int64)[trace.kind]
    columns = (
        trace.batch,
        trace.m,
        trace.n,
        trace.k,
        trace.heads,
        trace.kv_heads,
        trace.position,
        trace.pairs,
        trace.dtype,
        products,
    )
    shapes = np.stack([*(column[core] for column in columns), kv_bytes], axis=1)
    unique, inverse = np.unique(shapes, axis=0, return_inverse=True)
    streams = [
        _with_products(
            choose(
                chip, batch=int(b), m=int(m), n=int(n), head_dim=int(d), heads=int(h), kv_heads=int(g),
                position=int(p), pairs=int(pairs), dtype=DTYPES[int(t)], kv_bytes=int(kv), usable_cache_bytes=usable,
            ),
            int(c),
        )
        for b, m, n, d, h, g, p, pairs, t, c, kv in unique
    ]  # fmt: skip
    inverse = inverse.reshape(-1)
    _add(work, kernels.of_op[core], inverse, streams)
    _note(work, core, inverse, streams)
    work["op_heads"][core] = np.array([stream.heads_per_tile for stream in streams], dtype=np.int64)[inverse]
    passes = np.array([stream.kv_passes for stream in streams], dtype=np.int64)[inverse]
    np.add.at(work["restream"], kernels.of_op[core], (passes - 1) * kv_bytes)


def _with_products(core: AttentionWork, products: int) -> AttentionWork:
    """A forward core of the same tiles that computes ``products`` products of them instead of two."""
    if products == ATTENTION_PRODUCTS["attention"]:
        return core
    return replace(
        core, matrix_cycles=ceil_div(products * core.matrix_cycles, 2), cache_bytes=products * core.cache_bytes // 2,
        core_bytes=products * core.core_bytes // 2, link_cycles=ceil_div(products * core.link_cycles, 2),
    )  # fmt: skip


def _add(work: Work, kernel: IntArray, shape: IntArray, chosen: Sequence[TileWork]) -> None:
    """Add the work of each tiled op (``chosen[shape]``) to its kernel; the largest op of a kernel names its tile."""
    for column, values in (
        ("cache_bytes", [t.cache_bytes for t in chosen]),
        ("core_bytes", [t.core_bytes for t in chosen]),
        ("matrix", [t.matrix_cycles for t in chosen]),
        ("steps", [t.steps for t in chosen]),
        ("extra", [t.extra_cycles for t in chosen]),
        ("link", [t.link_cycles for t in chosen]),
    ):
        np.add.at(work[column], kernel, np.array(values, dtype=np.int64)[shape])
    largest = np.argsort(np.array([t.matrix_cycles for t in chosen], dtype=np.int64)[shape], kind="stable")
    for column, values in (
        ("items", [t.items for t in chosen]),
        ("waves", [t.waves for t in chosen]),
        ("split", [t.split for t in chosen]),
        ("rows", [t.tile[0] for t in chosen]),
        ("cols", [t.tile[1] for t in chosen]),
    ):
        work[column][kernel[largest]] = np.array(values, dtype=np.int64)[shape[largest]]


def _note(work: Work, ops: IntArray, shape: IntArray, chosen: Sequence[TileWork]) -> None:
    """Write down the tile of each op of ``ops``, ``chosen[shape]``."""
    for column, values in (
        ("op_rows", [t.tile[0] for t in chosen]),
        ("op_cols", [t.tile[1] for t in chosen]),
        ("op_split", [t.reduction_parts for t in chosen]),
        ("op_depth", [t.depth for t in chosen]),
    ):
        work[column][ops] = np.array(values, dtype=np.int64)[shape]


def _kv_bytes(trace: Trace) -> IntArray:
    """Bytes of keys and values that each attention core reads, from a cache or as fresh rows: all but its queries, and
    the output so far that a core over further keys goes on with."""
    read = total_by(owners(trace.read_ptr), np.where(overwritten(trace), 0, trace.read_bytes), trace.n_ops)
    kept: IntArray = np.maximum(read - query_bytes(trace), 0)
    return kept


def _lane_rate(chip: Chip, unit: ComputeUnit) -> float:
    """Lane operations per cycle; element-wise work is done in fp32 whatever the operands' dtype."""
    dtype = "fp32" if "fp32" in unit.peak_per_s else next(iter(unit.peak_per_s))
    return flops_per_cycle(chip, unit, dtype)


def _vector_cycles(chip: Chip, lane_ops: IntArray, special_ops: IntArray) -> tuple[IntArray, IntArray]:
    """Cycles on the vector and special-function units; without the latter, transcendentals take vector lanes."""
    if not chip.has_unit("vector"):
        if (lane_ops + special_ops).any():
            raise UnsupportedError(f"{chip.name}: the workload needs a vector unit and the chip has none")
        return lane_ops, special_ops
    rate = _lane_rate(chip, chip.unit("vector"))
    if not chip.has_unit("special"):
        return _ceil(lane_ops + special_ops, rate), np.zeros_like(special_ops)
    return _ceil(lane_ops, rate), _ceil(special_ops, _lane_rate(chip, chip.unit("special")))


def _ceil(work: IntArray, rate: float) -> IntArray:
    return np.ceil(work / rate).astype(np.int64)


def _rows(trace: Trace, kernels: Kernels) -> IntArray:
    """The tensor that a kernel reads most of (or writes, if it reads none) stands for the DRAM row it has open."""
    rows: npt.NDArray[np.int64] = np.zeros(kernels.n, dtype=np.int64)
    for ptr, nbytes, tensor in (
        (trace.write_ptr, trace.write_bytes, trace.write_tensor),
        (trace.read_ptr, trace.read_bytes, trace.read_tensor),
    ):
        kernel = kernels.of_op[owners(ptr)]
        order = np.lexsort((nbytes, kernel))
        rows[kernel[order]] = tensor[order]
    return rows
