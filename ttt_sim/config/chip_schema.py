"""What a chip file may say: one table, from which reading, messages and the JSON Schema follow.

Numbers are sourced quantities, structural choices are plain. The descriptions are the reference of the format; docs and
editors get them through :func:`chip_json_schema`.
"""

from __future__ import annotations

from typing import get_args

from ttt_sim.chip import (
    STREAMS,
    Execution,
    Fusion,
    Granularity,
    MemoryScope,
    Packing,
    Scope,
    UnitKind,
    WriteMode,
)
from ttt_sim.config.fields import Choice, Flag, JsonSchema, Number, Text, TextTable, TileList, WholeNumber
from ttt_sim.config.groups import Group, Items, Table, Variants
from ttt_sim.dtypes import DTYPES
from ttt_sim.units import (
    AREA,
    BANDWIDTH,
    CAPACITY,
    COUNT,
    CYCLES,
    DENSITY,
    ENERGY_PER_BYTE,
    ENERGY_PER_FLOP,
    ENERGY_PER_OP,
    FLOP_RATE,
    FRACTION,
    FREQUENCY,
    OP_RATE,
    POWER,
    PRICE,
    PRICE_RATE,
    TIME,
    Dimension,
)

CHIP_KINDS = (
    "gpu", "tpu", "accelerator", "dataflow", "wafer_scale", "npu", "fpga", "pim", "digital_imc", "analog_imc",
    "neuromorphic", "hypothetical", "example",
)  # fmt: skip
DATAFLOWS = ("output_stationary", "weight_stationary", "input_stationary", "in_array", "none")
TOPOLOGIES = ("switch", "ring", "torus", "mesh", "point_to_point", "host")

_NAME = {"pattern": "[a-z][a-z0-9_]*", "pattern_help": "a name of small letters, digits and underscores"}


def _count(doc: str, *, required: bool = False, default: int | None = None, positive: bool = True) -> Number:
    return Number(doc=doc, dimensions=(COUNT,), whole=True, required=required, default=default, positive=positive)


def _amount(doc: str, *dimensions: Dimension, required: bool = False, default: float | None = None) -> Number:
    """A number that may be zero."""
    return Number(doc=doc, dimensions=dimensions, positive=False, required=required, default=default)


def _cycles(doc: str) -> Number:
    return Number(doc=f"{doc} Default 0 cycles.", dimensions=(CYCLES,), whole=True, positive=False, default=0)


def _share(doc: str) -> Number:
    return Number(doc=f"{doc} Default 1.", dimensions=(FRACTION,), maximum=1.0, default=1.0)


def _rate(doc: str, *dimensions: Dimension, required: bool = False) -> Number:
    """A number above zero; None where it is left out."""
    return Number(doc=doc, dimensions=dimensions, required=required)


def _bytes(doc: str, *, required: bool = False, default: int | None = None) -> Number:
    return Number(doc=doc, dimensions=(CAPACITY,), whole=True, required=required, default=default)


_GEOMETRY = Group(
    doc="Matrix units: one instruction or pass of one instance.",
    fields={
        "rows": WholeNumber(
            doc="Output rows; for in_array and weight_stationary dataflow the rows of the array, along the reduction.",
            required=True,
        ),
        "cols": WholeNumber(
            doc="Output columns; for in_array and weight_stationary dataflow the columns of the array.", required=True
        ),
        "depth": WholeNumber(doc="Length of the reduction. Default 1.", default=1),
    },
)

_COMPUTE = Group(
    doc="All instances of one kind of unit.",
    fields={
        "name": Text(doc="Name in dotted paths.", required=True, **_NAME),
        "kind": Choice(
            doc="matrix: multiply-accumulate arrays; vector: element-wise lanes; special: exponentials, roots, "
            "divisions. At "
            "most one unit of each kind; special functions run on the vector unit where there is no special one.",
            options=get_args(UnitKind),
            required=True,
        ),
        "count": _count(
            "Instances per core; 0: the unit belongs to the chip as a whole. Default 1.", default=1, positive=False
        ),
        "dataflow": Choice(
            doc="Matrix units: what stays in place while a tile is computed. in_array: weights are stored in the "
            "array itself.",
            options=DATAFLOWS,
        ),
        "geometry": _GEOMETRY,
        "tiles": TileList(
            doc="Matrix units: output tiles a kernel may choose, multiples of the geometry. Default: one geometry tile."
        ),
        "peak": Table(
            doc="Dense peak of the whole chip by dtype. Matrix units: FLOP/s or op/s with a multiply-add counted as "
            "two. Vector "
            "and special units: lane operations per second, op/s, with a fused multiply-add counted as one.",
            keys=DTYPES,
            value=_rate("Peak rate.", FLOP_RATE, OP_RATE),
            required=True,
        ),
        "efficiency": Table(
            doc="Share of the peak that full tiles sustain, by dtype. Default 1.",
            keys=DTYPES,
            value=Number(doc="Share of the peak.", dimensions=(FRACTION,), maximum=1.0),
            default={},
        ),
        "energy": Table(
            doc="Dynamic energy by dtype, per FLOP (matrix) or lane operation. Default 0.",
            keys=DTYPES,
            value=_amount("Energy.", ENERGY_PER_FLOP, ENERGY_PER_OP),
            default={},
        ),
        "ops_per_cycle": Table(
            doc="Multiply-adds (matrix) or lane operations that one instance completes per cycle of the chip's "
            "clock, by dtype; "
            "the linter compares cores x count x this x clock with the peak.",
            keys=DTYPES,
            value=_rate("Operations per cycle.", COUNT),
            default={},
        ),
        "startup": Number(
            doc="Cycles to fill and drain the array once per tile, of a weight-stationary array once per op. Default 0 "
            "cycles.",
            dimensions=(CYCLES,),
            whole=True,
            positive=False,
            default=0,
        ),
        "issue": Number(
            doc="Weight-stationary arrays: least cycles of a pass, however few rows stream; in_array: cycles in which "
            "one input vector passes through an array. Default 1 cycle.",
            dimensions=(CYCLES,),
            whole=True,
            default=1,
        ),
        "load": _cycles("Weight-stationary arrays: loading one stationary tile into the array."),
        "double_buffer": Flag(
            doc="Weight-stationary arrays: the next tile loads while the array still multiplies with the one before. "
            "Default false.",
            default=False,
        ),
        "area": _rate("Silicon of one instance, for the area estimate of hypothetical chips.", AREA),
    },
)

_MEMORY = Group(
    doc="One memory level. Bandwidths are totals over the chip, capacity is that of one instance.",
    fields={
        "name": Text(doc="Name in dotted paths.", required=True, **_NAME),
        "scope": Choice(
            doc="backing: behind the main memory, holds what does not fit there; chip: one instance that all cores "
            "reach; core: one instance in each core.",
            options=get_args(MemoryScope),
            required=True,
        ),
        "capacity": _bytes("Capacity of one instance.", required=True),
        "read_bandwidth": _rate("Read bandwidth, total over the chip.", BANDWIDTH, required=True),
        "write_bandwidth": _rate(
            "Write bandwidth, total over the chip; for program-and-verify cells that of one pulse. Default: "
            "read_bandwidth.",
            BANDWIDTH,
        ),
        "shared_bus": Flag(
            doc="Reads and writes take turns on one bus (DRAM) instead of having ports of their own. Default false.",
            default=False,
        ),
        "channels": _count("Independent channels over which addresses are striped. Default 1.", default=1),
        "channel_groups": WholeNumber(
            doc="Groups of channels that are scheduled separately; divides channels. Default 1.", default=1
        ),
        "banks_per_channel": _count("Banks per channel. Default 1.", default=1),
        "channel_rate": _rate(
            "Bandwidth of one channel; the linter compares channels x this with the total.", BANDWIDTH
        ),
        "interleave": _bytes("Bytes in one channel before the next one follows. Default 256 B.", default=256),
        "row_size": _bytes("Bytes of one open row of one bank. Default: the capacity (no rows)."),
        "row_miss": _amount("Time to close one row and open another. Default 0 s.", TIME, default=0.0),
        "latency": _amount("From request to first byte, unloaded. Default 0 s.", TIME, default=0.0),
        "read_to_write": _amount(
            "Turn-around of a shared bus from reading to writing. Default 0 s.", TIME, default=0.0
        ),
        "write_to_read": _amount(
            "Turn-around of a shared bus from writing to reading. Default 0 s.", TIME, default=0.0
        ),
        "achievable_fraction": Number(
            doc="Share of the bandwidth that long streams reach (refresh, bank conflicts). Default 1.",
            dimensions=(FRACTION,),
            maximum=1.0,
            default=1.0,
        ),
        "read_energy": _amount("Dynamic energy of reading. Default 0 J/byte.", ENERGY_PER_BYTE, default=0.0),
        "write_energy": _amount(
            "Dynamic energy of writing; for program-and-verify cells that of one pulse. Default: read_energy.",
            ENERGY_PER_BYTE,
        ),
        "write_granularity": _bytes(
            "Smallest write; below it a read-modify-write is needed (a row or array for in-memory computing). "
            "Default 1 B.",
            default=1,
        ),
        "write_pulses": Number(
            doc="Mean number of program-and-verify pulses per write, which multiplies write time and energy. "
            "Default 1.",
            dimensions=(COUNT,),
            minimum=1.0,
            positive=False,
            default=1.0,
        ),
        "volatile": Flag(doc="Contents are lost without power. Default true.", default=True),
        "transfer_start": _amount(
            "From the request of a DMA transfer to its first byte, in which its engine does nothing else; one transfer "
            "for each operand and sequence. Default 0 s.",
            TIME,
            default=0.0,
        ),
        "transfer_engines": _count("DMA engines that begin transfers side by side. Default 1.", default=1),
        "endurance": _rate("Writes that a cell survives. Default: wear does not matter.", COUNT),
        "density": _rate("Capacity per area, for the area estimate of hypothetical chips.", DENSITY),
    },
)

_LINK = Group(
    doc="A connection to other chips, to the host, or between the cores of this chip.",
    fields={
        "name": Text(doc="Name in dotted paths.", required=True, **_NAME),
        "topology": Choice(doc="How the partners are connected.", options=TOPOLOGIES, required=True),
        "scope": Choice(
            doc="chip: leads off the chip; core: the network between the cores of this chip. Default chip.",
            options=get_args(Scope),
            default="chip",
        ),
        "bandwidth": _rate("One direction of all lanes together.", BANDWIDTH, required=True),
        "latency": _amount("One hop. Default 0 s.", TIME, default=0.0),
        "count": _count("Links that the bandwidth is spread over. Default 1.", default=1),
        "peers": Number(
            doc="Other chips that the link reaches; the next link in the list leads further. Default: any number.",
            dimensions=(COUNT,),
            whole=True,
        ),
        "energy": _amount("Dynamic energy of moving data. Default 0 J/byte.", ENERGY_PER_BYTE, default=0.0),
        "start": _amount("Fixed time of a collective over this link. Default 0 s.", TIME, default=0.0),
        "short_fraction": _share("Share of the bandwidth that collectives reach with the protocol for short messages."),
        "bulk_fraction": _share("Share that they reach with the protocol for long messages."),
        "bulk_start": _amount("Time that the protocol for long messages adds. Default 0 s.", TIME, default=0.0),
    },
)

_LIBRARY = Group(
    doc="Habits and fixed costs of the kernels that the chip is run with. Default: none.",
    fields={
        "kernel": _cycles("Start, first loads and drain of any kernel, beyond the gap before it."),
        "reduction": _cycles("The kernel that adds the parts of a split reduction."),
        "small_tile_loss": _amount(
            "A product tile of area a takes 1 + loss (sqrt(128 128 / a) - 1) times its share of the peak: small tiles "
            "reuse operands less. Default 0.",
            COUNT,
            default=0.0,
        ),
        "drain_fraction": _share("Share of the scratchpad bandwidth at which result tiles leave a core."),
        "warm_fraction": _share("Share of the shared cache in which a kernel that is repeated finds operands again."),
        "stream_fraction": Table(
            doc="Share of the achievable main-memory bandwidth that kernels reach: product, attention, delta_rule, or "
            "the kind of a row-wise op. Default 1.",
            keys=STREAMS,
            value=Number(doc="Share of the bandwidth.", dimensions=(FRACTION,), maximum=1.0),
            default={},
        ),
        "row": _cycles("Time that each row of an append holds a core."),
        "row_capacity": Number(
            doc="Longest row that a kernel which reduces over rows holds in a core; it reads longer ones twice. "
            "Default: any.",
            dimensions=(CAPACITY,),
            whole=True,
        ),
        "attention_rows": WholeNumber(doc="Query rows of an attention tile. Default 128.", default=128),
        "attention_short_rows": WholeNumber(doc="Those of the tile for few rows. Default 64.", default=64),
        "attention_packing": Choice(
            doc="When query heads that share a KV head share tiles. always; padding: if that saves padding; single: "
            "if each has one query. Default always.",
            options=get_args(Packing),
            default="always",
        ),
        "attention_setup": _cycles("Kernels that prepare an attention core: schedules and tables."),
        "attention_start": _cycles("Fixed time of an attention tile."),
        "decode_start": _cycles("Fixed time of an attention tile with one query per head."),
        "decode_row": _cycles("What each query row of such a tile adds, as it is gathered on its own."),
        "attention_tail": Number(
            doc="Share of the longest tile that runs alone at the end. Default 0: longest tiles first, greedily.",
            dimensions=(FRACTION,),
            positive=False,
            maximum=1.0,
            default=0.0,
        ),
        "softmax_exposed": Number(
            doc="Share of the exponentials of a block that its products do not hide. Default 0.",
            dimensions=(FRACTION,),
            positive=False,
            maximum=1.0,
            default=0.0,
        ),
        "core_fetch": _amount(
            "Bytes per cycle that one core can pull from main memory: bytes in flight over latency. Default 0: no "
            "limit.",
            COUNT,
            default=0.0,
        ),
        "split_fill": _share("Keys are split over cores while tiles fill less than this share of them."),
        "max_split": WholeNumber(doc="Most parts that keys are split into. Default 1048576.", default=1 << 20),
        "combine": _cycles("The kernel that joins the parts of split keys."),
        "combine_split": _cycles("What each part adds to it."),
        "regroup": _cycles("Copies around a decode core of grouped queries with several KV heads."),
        "scan_setup": _cycles("Kernels that prepare a recurrent step."),
        "scan_start": _cycles("Fixed time of a recurrent chain."),
        "scan_chunk": _cycles("Each chunk of a recurrent chain."),
        "scan_fetch": _amount(
            "Bytes per cycle that one core moves of the states of a recurrent step. Default 0: no limit.",
            COUNT,
            default=0.0,
        ),
        "scan_chunk_tokens": WholeNumber(doc="Tokens of such a chunk. Default 64.", default=64),
    },
)

CHIP = Group(
    doc="A chip for ttt_sim. Every number is {value, source, certainty}; sources are defined once at the end.",
    fields={
        "name": Text(doc="The name of the file without .yaml.", required=True, **_NAME),
        "title": Text(doc="Name for people.", required=True),
        "vendor": Text(doc="Who makes it.", required=True),
        "kind": Choice(doc="Family of hardware, for grouping in tables.", options=CHIP_KINDS, required=True),
        "execution": Choice(
            doc="How kernels run: tile_wave (GPU), systolic (TPU), static_dataflow (compiled schedule), in_memory "
            "(compute at the "
            "cells), event_driven (neuromorphic).",
            options=get_args(Execution),
            required=True,
        ),
        "clock": _rate("The clock in which all cycles are counted.", FREQUENCY, required=True),
        "cores": _count("Cores that work independently (SM, TensorCore, tile, ...).", required=True),
        "process": Text(doc="Manufacturing process.", default=""),
        "die_area": _rate("Silicon area.", AREA),
        "area_overhead": Number(
            doc="Share of the silicon that is neither compute unit nor memory (wiring, controllers, I/O), for the area "
            "estimate of hypothetical chips. Default 0.",
            dimensions=(FRACTION,),
            positive=False,
            maximum=0.9,
            default=0.0,
        ),
        "compute": Items(doc="Compute units, at least a matrix or a vector unit.", item=_COMPUTE, required=True),
        "memories": Items(doc="Memory levels, outermost first.", item=_MEMORY, required=True),
        "links": Items(doc="Links. Default none.", item=_LINK, default=[]),
        "mapping": Group(
            doc="How kernels are formed and placed.",
            fields={
                "fusion": Choice(
                    doc="none: every op a kernel; vector: chains of row-wise ops merge, GEMMs with the same input "
                    "merge; epilogue: "
                    "also element-wise ops into the GEMM before them; layer: a whole layer is one kernel.",
                    options=get_args(Fusion),
                    required=True,
                ),
                "serial_kernels": Flag(
                    doc="A kernel starts only when the one before it in its stream has ended.", required=True
                ),
                "persistent": Flag(
                    doc="Tiles are handed to cores continuously, not in whole waves. Default false.", default=False
                ),
                "max_split_k": WholeNumber(
                    doc="Largest number of parts of a reduction computed by different cores. Default 1.", default=1
                ),
                "multicast": WholeNumber(
                    doc="Neighbouring cores that load a shared operand tile once. Default 1.", default=1
                ),
                "attention_efficiency": Number(
                    doc="Share of the matrix peak that attention sustains at most, as its softmax stands between its "
                    "products. Default 1: as efficient as GEMM.",
                    dimensions=(FRACTION,),
                    maximum=1.0,
                    default=1.0,
                ),
                "cache_fraction": Number(
                    doc="Share of the on-chip levels that data reused between kernels may count on. Default 1.",
                    dimensions=(FRACTION,),
                    positive=False,
                    maximum=1.0,
                    default=1.0,
                ),
            },
            required=True,
        ),
        "library": _LIBRARY,
        "overheads": Group(
            doc="Time that no unit works. Default: none.",
            fields={
                "op_launch": _amount("Gap before each dependent kernel. Default 0 s.", TIME, default=0.0),
                "call": _amount("Host time per model call. Default 0 s.", TIME, default=0.0),
            },
        ),
        "power": Group(
            doc="Power of the whole device.",
            fields={
                "limit": _rate("Board or device limit (TDP).", POWER, required=True),
                "idle": _amount("Drawn while nothing runs.", POWER, required=True),
            },
            required=True,
        ),
        "price": Group(
            doc="What the device costs, as far as it is known.",
            fields={
                "per_hour": _rate("Rent.", PRICE_RATE),
                "purchase": _rate("Purchase.", PRICE),
                "as_of": Text(
                    doc="Date of the prices, YYYY, YYYY-MM or YYYY-MM-DD.",
                    pattern="[0-9]{4}(-[0-9]{2}){0,2}",
                    pattern_help="a date YYYY, YYYY-MM or YYYY-MM-DD",
                    default="",
                ),
            },
        ),
        "writability": Group(
            doc="How weights can change at run time.",
            fields={
                "mode": Choice(
                    doc="free: ordinary stores; static_schedule: only if compiled into the program; reupload: "
                    "through the host; "
                    "local_rule: only by a local learning rule; program_verify: pulses with verification; none: never.",
                    options=get_args(WriteMode),
                    required=True,
                ),
                "overlap": Flag(
                    doc="A weight may be written while other weights are being read. Default false.", default=False
                ),
                "shadow_bank": Flag(
                    doc="A new version can be written while the old one is still read. Default false.", default=False
                ),
                "transposed_read": Flag(
                    doc="The array can be read along either axis without a separate pass. Default false.", default=False
                ),
                "accumulate": Flag(
                    doc="The memory adds a delta to what it holds, so the old weight is not read out for an update. "
                    "Default false.",
                    default=False,
                ),
                "granularity": Choice(
                    doc="Least that one write replaces: a word; a row (write_granularity of the memory); a tile, one "
                    "array; everything on the device. Default word.",
                    options=get_args(Granularity),
                    default="word",
                ),
                "reupload_time": _amount("Fixed time of a re-upload (mode reupload). Default 0 s.", TIME, default=0.0),
                "reupload_bandwidth": _rate("Bandwidth of a re-upload (mode reupload).", BANDWIDTH),
            },
            required=True,
        ),
        "variants": Variants(
            doc="Sold versions by device name: {dotted.path: value} where fields differ. Default none.", default={}
        ),
        "sources": TextTable(doc="Public references by the key that numbers use.", required=True),
    },
)  # fmt: skip


def chip_json_schema() -> JsonSchema:
    """JSON Schema (draft 2020-12) of a chip file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "ttt_sim chip"} | CHIP.json_schema()
