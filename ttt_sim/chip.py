"""A chip as the simulator sees it: base units, no strings, every number traceable to its line in the chip file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Execution = Literal["tile_wave", "systolic", "static_dataflow", "in_memory", "event_driven"]
UnitKind = Literal["matrix", "vector", "special"]
Scope = Literal["chip", "core"]
MemoryScope = Literal["backing", "chip", "core"]
Granularity = Literal["word", "row", "tile", "device"]
Fusion = Literal["none", "vector", "epilogue", "layer"]
Packing = Literal["always", "padding", "single"]
WriteMode = Literal["free", "static_schedule", "reupload", "local_rule", "program_verify", "none"]
#: Kernels with a share of the main-memory bandwidth of their own, the keys of ``library.stream_fraction``: all matrix
#: products, attention cores, recurrent scans, and row-wise ops by kind.
STREAMS: tuple[str, ...] = (
    "product", "attention", "delta_rule",
    "attn_norm", "qk_norm", "rope", "kv_append", "attn_residual", "mlp_norm", "carry_append", "silu_mul",
    "mlp_residual", "final_norm", "target_conv", "delta_norm", "delta_scale", "weight_write", "layernorm", "softmax",
    "gelu", "quantise",
)  # fmt: skip
Certainty = Literal["high", "medium", "low"]
#: Formats by preference: what models are trained in, then what serves in its place.
PREFERRED_DTYPES: tuple[str, ...] = ("bf16", "fp16", "fp32", "fp8", "int8", "fp4", "int4")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where one number of a chip file comes from."""

    text: str  # as written, e.g. "3.35 TB/s"
    source: str  # the reference itself, not its key
    certainty: Certainty
    line: int  # line in the chip file, 0 for an override
    note: str = ""
    calibration: Mapping[str, str] = field(default_factory=dict)  # data, rows, error, date of a calibrated value


@dataclass(frozen=True, slots=True, kw_only=True)
class ComputeUnit:
    """All instances of one kind of unit on the chip, taken together.

    ``peak_per_s``  dense peak by dtype: FLOP/s for a matrix unit (one multiply-add = 2), lane operations per second for
                    vector and special units
    ``efficiency``  share of that peak which full tiles sustain, by dtype (1 where unknown)
    ``energy_j_per_op``  dynamic energy by dtype per FLOP or lane operation
    ``count``       instances per core; 0 when the unit belongs to the chip as a whole
    ``rows, cols, depth``  one instruction or pass: output rows x output columns x reduction depth (matrix units); of a
                    weight-stationary array, ``rows`` is the reduction and ``cols`` the columns of the tile that stays
    ``tiles``       output tiles a kernel may choose (matrix units), largest first
    ``startup_cycles`` filling and draining the array once per tile (output-stationary) or op (weight-stationary)
    ``issue_cycles``  least time between two passes of a weight-stationary array, however few rows stream; of an array
                    that computes in its cells (``in_array``) the time of one input vector
    ``load_cycles``   loading one stationary tile; ``double_buffer``: while the array still multiplies with the last one
    ``ops_per_cycle``  multiply-adds (matrix) or lane operations of one instance per cycle, by dtype; empty: not stated
    ``area_mm2``       silicon of one instance, for the area estimate of hypothetical chips; None when not stated
    """

    name: str
    kind: UnitKind
    count: int
    peak_per_s: Mapping[str, float]
    efficiency: Mapping[str, float]
    energy_j_per_op: Mapping[str, float]
    dataflow: str = "none"
    rows: int = 1
    cols: int = 1
    depth: int = 1
    tiles: tuple[tuple[int, int], ...] = ()
    startup_cycles: int = 0
    issue_cycles: int = 1
    load_cycles: int = 0
    double_buffer: bool = False
    ops_per_cycle: Mapping[str, float] = field(default_factory=dict)
    area_mm2: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLevel:
    """One level, outermost first in :attr:`Chip.memories`. Bandwidths are totals over the chip.

    ``capacity_bytes``     of one instance: the whole chip's for scope ``chip``, one core's for scope ``core``; scope
                           ``backing`` lies behind the main memory and holds what does not fit there
    ``shared_bus``         reads and writes take turns on one bus (DRAM) instead of having ports of their own
    ``channels``           independent channels that addresses are striped over, ``interleave_bytes`` at a time
    ``channel_groups``     groups of channels that the engine schedules separately
    ``achievable_frac``    share of the peak bandwidth that long streams reach (refresh, bank conflicts)
    ``transfer_start_s``   from the request of a DMA transfer to its first byte, in which its engine does nothing else;
                           ``transfer_engines`` begin transfers side by side
    ``endurance_writes``   writes a cell survives; None when wear does not matter
    ``write_pulses``       mean program-and-verify pulses per write; already in the write bandwidth and energy
    ``channel_bytes_per_s`` stated bandwidth of one channel, for checking; None when not stated
    ``density_bytes_per_mm2`` for the area estimate of hypothetical chips; None when not stated
    """

    name: str
    scope: MemoryScope
    capacity_bytes: int
    read_bytes_per_s: float
    write_bytes_per_s: float
    shared_bus: bool
    channels: int
    channel_groups: int
    banks_per_channel: int
    interleave_bytes: int
    row_bytes: int
    row_miss_s: float
    latency_s: float
    read_to_write_s: float
    write_to_read_s: float
    achievable_frac: float
    read_energy_j_per_byte: float
    write_energy_j_per_byte: float
    write_granularity_bytes: int
    volatile: bool
    endurance_writes: float | None
    write_pulses: float = 1.0
    channel_bytes_per_s: float | None = None
    transfer_start_s: float = 0.0
    transfer_engines: int = 1
    density_bytes_per_mm2: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A connection to other chips or the host (scope ``chip``) or between the cores of this one (scope ``core``).

    ``bytes_per_s`` is one direction of all its lanes together. Collectives use one of two protocols: short messages go
    in packets that carry their own flag (``short_frac`` of the bandwidth), long ones in bulk (``bulk_frac``) after
    ``bulk_start_s`` more; either after ``start_s`` and ``latency_s`` for each step around the ring.
    ``count`` links share the bandwidth; ``peers`` is how many other chips it reaches (None: any number).
    """

    name: str
    topology: Literal["switch", "ring", "torus", "mesh", "point_to_point", "host"]
    bytes_per_s: float
    latency_s: float
    count: int = 1
    scope: Scope = "chip"
    energy_j_per_byte: float = 0.0
    start_s: float = 0.0
    short_frac: float = 1.0
    bulk_frac: float = 1.0
    bulk_start_s: float = 0.0
    peers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingRules:
    """How kernels are formed and placed on this chip (see docs/hardware_model.md).

    ``fusion``            none: every op a kernel; vector: chains of row-wise ops merge, GEMMs with the same input
                          merge; epilogue: also element-wise ops into the GEMM before them; layer: a whole layer is
                          one kernel
    ``serial_kernels``    a kernel starts only when the one before it in its stream has ended
    ``persistent``        tiles are handed to cores continuously (no rounding up to whole waves)
    ``multicast``         neighbouring cores that load a shared operand tile once
    ``attention_efficiency`` share of the matrix peak that attention sustains at most: softmax stands between products
    ``max_split_k``       largest number of parts of a reduction computed by different cores
    ``cache_frac``        share of an on-chip level that data reused between kernels may count on
    """

    fusion: Fusion
    serial_kernels: bool
    persistent: bool
    max_split_k: int
    multicast: int
    attention_efficiency: float
    cache_frac: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """Habits and fixed costs of the kernel library that a chip is run with; the defaults cost nothing.

    ``kernel_cycles``        start, first loads and drain of any kernel, beyond the gap before it
    ``reduction_cycles``     the second kernel, which adds the parts of a split reduction
    ``small_tile_loss``      a tile of area a takes 1 + loss (sqrt(128 128 / a) - 1) times its share of the peak
    ``drain_frac``           share of the scratchpad bandwidth at which result tiles leave a core
    ``warm_frac``            share of the shared cache that operands of a repeated kernel find again
    ``stream_frac``          share of the achievable main-memory bandwidth by kernel (:data:`STREAMS`), else 1
    ``row_cycles``           a core is held by each row that an append stores
    ``row_bytes``            longest row that a kernel which reduces over rows holds in a core; longer ones are read
                             twice; 0: any
    ``attention_rows, attention_short_rows``  query rows of an attention tile, and of the one for few rows
    ``attention_packing``    query heads that share a KV head share tiles: always, to save padding, or only if one
                             query row is left to each of them (``single``)
    ``attention_setup_cycles``  kernels that prepare an attention core (schedules, tables)
    ``attention_start_cycles, decode_start_cycles``  fixed time of a tile that has many rows, or a single query
    ``decode_row_cycles``    what each query row of a tile with a single query per head adds: it is gathered on its own
    ``attention_tail``       share of the longest tile that runs exposed at the end (0: longest first, greedily)
    ``softmax_exposed``      share of the exponentials of a block that do not hide behind its products
    ``core_fetch_bytes_per_cycle``  what one core can pull from main memory (bytes in flight over latency); 0: no limit
    ``split_fill``           keys are split over cores while tiles fill less than this share of them
    ``max_split``            most parts that keys are split into
    ``combine_cycles, combine_split_cycles``  the kernel that joins the parts: fixed, and per part
    ``regroup_cycles``       copies of grouped queries before and after a decode core with several KV heads
    ``scan_setup_cycles``    kernels that prepare a recurrent step
    ``scan_start_cycles, scan_chunk_cycles, scan_chunk_tokens``  a recurrent chain: start, and each chunk of tokens
    ``scan_fetch_bytes_per_cycle``  what one core moves of the states of a recurrent step; 0: no limit
    """

    kernel_cycles: int = 0
    reduction_cycles: int = 0
    small_tile_loss: float = 0.0
    drain_frac: float = 1.0
    warm_frac: float = 1.0
    stream_frac: Mapping[str, float] = field(default_factory=dict)
    row_cycles: int = 0
    row_bytes: int = 0
    attention_rows: int = 128
    attention_short_rows: int = 64
    attention_packing: Packing = "always"
    attention_setup_cycles: int = 0
    attention_start_cycles: int = 0
    decode_start_cycles: int = 0
    decode_row_cycles: int = 0
    attention_tail: float = 0.0
    softmax_exposed: float = 0.0
    core_fetch_bytes_per_cycle: float = 0.0
    split_fill: float = 1.0
    max_split: int = 1 << 20
    combine_cycles: int = 0
    combine_split_cycles: int = 0
    regroup_cycles: int = 0
    scan_setup_cycles: int = 0
    scan_start_cycles: int = 0
    scan_chunk_cycles: int = 0
    scan_chunk_tokens: int = 64
    scan_fetch_bytes_per_cycle: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """``op_launch_s``: gap before each kernel that depends on the one before. ``call_s``: host time per model call."""

    op_launch_s: float
    call_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    limit_w: float
    idle_w: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Any field None when unknown. ``as_of`` is the date of the hourly price."""

    per_hour_usd: float | None
    purchase_usd: float | None
    as_of: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Writability:
    """How weights can change at run time.

    ``mode``          free: ordinary stores; static_schedule: only if compiled into the program; reupload: through the
                      host; local_rule: only by a local learning rule; program_verify: pulses with verification; none
    ``overlap``       a weight may be written while other weights are being read
    ``shadow_bank``   a new version can be written while the old one is still read (no write-after-read wait)
    ``transposed_read`` the array can be read along either axis without a separate pass
    ``accumulate``    the memory adds a delta to what it holds: the old weight is not read out
    ``granularity``   least that one write replaces: a word, a row (``write_granularity`` of the memory), a tile (one
                      array) or everything on the device
    ``reupload_s, reupload_bytes_per_s``  cost of one re-upload (mode reupload)
    """

    mode: WriteMode
    overlap: bool
    shadow_bank: bool
    transposed_read: bool
    accumulate: bool = False
    granularity: Granularity = "word"
    reupload_s: float = 0.0
    reupload_bytes_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One device. ``clock_hz`` is the clock in which all cycles are counted."""

    name: str
    title: str
    vendor: str
    kind: str
    execution: Execution
    clock_hz: float
    cores: int
    units: tuple[ComputeUnit, ...]
    memories: tuple[MemoryLevel, ...]
    links: tuple[Link, ...]
    mapping: MappingRules
    overheads: Overheads
    power: Power
    price: Price
    writability: Writability
    library: Library = Library()
    process: str = ""
    die_area_mm2: float | None = None
    area_overhead: float = 0.0
    variant: str = ""
    file_sha256: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Provenance] = field(default_factory=dict)

    def unit(self, kind: UnitKind) -> ComputeUnit:
        """The unit of this kind; a chip has at most one of each."""
        for unit in self.units:
            if unit.kind == kind:
                return unit
        raise KeyError(kind)

    def has_unit(self, kind: UnitKind) -> bool:
        return any(unit.kind == kind for unit in self.units)

    @property
    def main_memory(self) -> MemoryLevel:
        """The outermost level on the chip's own bus: where weights, state and large activations live."""
        return next(level for level in self.memories if level.scope != "backing")

    @property
    def backing(self) -> MemoryLevel | None:
        """The memory behind the main memory, which holds what does not fit there; None where there is none."""
        return self.memories[0] if self.memories[0].scope == "backing" else None

    @property
    def capacity_bytes(self) -> int:
        """Main memory and what lies behind it."""
        return self.main_memory.capacity_bytes + (self.backing.capacity_bytes if self.backing is not None else 0)

    @property
    def default_dtype(self) -> str:
        """The format in which workloads run unless another is asked for: the widest common one of the matrix unit."""
        peaks = next((unit for unit in self.units if unit.kind == "matrix"), self.units[0]).peak_per_s
        return next((dtype for dtype in PREFERRED_DTYPES if dtype in peaks), next(iter(peaks)))

    @property
    def cache(self) -> MemoryLevel | None:
        """The innermost level that all cores share, inside the main memory; None where there is none."""
        inner = [level for level in self.memories if level.scope == "chip"][1:]
        return inner[-1] if inner else None

    @property
    def core_memory(self) -> MemoryLevel | None:
        """The scratchpad of one core; None where there is none."""
        inner = [level for level in self.memories if level.scope == "core"]
        return inner[-1] if inner else None

    def runs(self, dtype: str) -> bool:
        """Whether products of this format run here."""
        return any(dtype in unit.peak_per_s for unit in self.units if unit.kind == "matrix")

    def cycles(self, seconds: float) -> int:
        """Seconds in whole cycles, rounded up."""
        value = seconds * self.clock_hz
        nearest = round(value)
        # 61 ns at 1 GHz is 61.00000000000001 in binary: a last-digit excess is not another cycle
        return nearest if abs(value - nearest) <= 1e-12 * nearest else math.ceil(value)
