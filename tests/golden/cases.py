"""The simulations whose cycle counts are held fixed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

from ttt_sim.config import load_chip
from ttt_sim.data_files import names
from ttt_sim.grid import make_point
from ttt_sim.lower import MAPPERS
from ttt_sim.model import Carry, Parallel, TTTSettings, WeightWrite
from ttt_sim.model_config import load_ttt
from ttt_sim.simulation import PHASES, Point
from ttt_sim.workload import CONTEXT_METHODS, METHODS

#: Chips on which ``toy`` runs with every method, at two contexts and two batches.
THOROUGH = (
    "h100", "tiny_cim", "tiny_dataflow", "tiny_gpu", "tiny_neuro", "tiny_pcm", "tiny_spatial", "tiny_systolic",
    "tiny_tiers", "tiny_turnaround",
)  # fmt: skip
#: Where other methods than those of a context run; one chip of each style whose memory holds a step of training.
OTHER_METHODS_ON = ("h100", "tiny_gpu", "tiny_spatial", "tiny_systolic")
#: Their options, where defaults are too large for the tiny chips.
OTHER_OPTIONS = {
    "rag": {
        "passage_tokens": 32, "dimension": 64, "code_bytes": 8, "top_k": 2, "encoder_layers": 2, "encoder_width": 64,
        "encoder_ff": 192, "encoder_heads": 4, "encoder_vocab": 256,
    },
    "ttt_e2e": {"mini_batch": 32},
}  # fmt: skip


def cases() -> dict[str, Point]:
    """Every case by name: ``toy`` on each chip that has a mapper, Qwen3-4B on h100, and the options one at a time.

    Chips outside :data:`THOROUGH` run little code that those inside do not: two methods at one context and one batch
    pin what follows from their files, and keep the golden files and the time of their test small.
    """
    points: list[tuple[Point, str]] = []
    for chip_name in names("hw_configs", ".yaml"):
        chip = load_chip(chip_name)
        if chip.execution in MAPPERS:
            # 150 tokens end in an open chunk, 320 do not; a call of 64 tokens holds two chunks.
            shapes = (
                product(CONTEXT_METHODS, PHASES, (150, 320), (1, 2))
                if chip_name in THOROUGH
                else product(("kv", "ttt_window"), PHASES, (150,), (2,))
            )
            for method, phase, context, batch in shapes:
                point = make_point(
                    chip, "toy", method, phase=phase, context=context, batch=batch, window=64, ttt="toy", call_tokens=64
                )
                points.append((point, ""))

    others = [other for name, other in METHODS.items() if name not in CONTEXT_METHODS]
    for chip_name, other in product((*OTHER_METHODS_ON, "tiny_tiers"), others):
        if (chip_name == "tiny_tiers") != ("a memory behind the main one" in other.needs):
            continue
        for phase in other.phases:
            point = make_point(
                chip_name, "toy", other.name, phase=phase, context=150, batch=2, window=64, ttt="toy", call_tokens=64,
                question=7, options=OTHER_OPTIONS.get(other.name),
            )  # fmt: skip
            points.append((point, ""))

    h100 = load_chip("h100")

    def qwen(method: str, phase: str, context: str, *, batch: int = 1, ttt: TTTSettings | None = None) -> Point:
        return make_point(
            h100, "Qwen3-4B", method, phase=phase, context=context, batch=batch, window=1024, ttt=ttt  # type: ignore[arg-type]
        )  # fmt: skip

    points += [
        (qwen(method, phase, context), "") for method, phase, context in product(CONTEXT_METHODS, PHASES, ("4k", "32k"))
    ]
    points += [(qwen(method, phase, "4k", batch=8), "") for method, phase in product(CONTEXT_METHODS, PHASES)]
    usual = load_ttt("default")
    for write, phase in product(get_args(WeightWrite), PHASES):
        if write == "resident":  # the fast weights of Qwen3-4B do not fit on chip, those of toy do
            ttt = load_ttt("toy", weight_write=write)
            point = make_point(
                "tiny_gpu", "toy", "ttt_window", phase=phase, context=320, window=64, ttt=ttt, call_tokens=64
            )
            points.append((point, f"weight_write={write}"))
        elif write != usual.weight_write:
            ttt = replace(usual, weight_write=write)
            points.append((qwen("ttt_window", phase, "4k", ttt=ttt), f"weight_write={write}"))
    for carry, phase in product(get_args(Carry), PHASES):
        if carry != usual.carry:
            ttt = replace(usual, carry=carry)
            points.append((qwen("ttt_window", phase, "4k", ttt=ttt), f"carry={carry}"))
    for method in ("kv_paged", "kv_mla", "gated_deltanet", "mamba2"):
        points.append((replace(qwen(method, "prefill", "4k"), parallel=Parallel(cp=2)), "cp=2"))
    for phase in PHASES:
        ttt = replace(usual, update_rows=256)
        points.append((qwen("ttt_window", phase, "4k", ttt=ttt), "update_rows=256"))
    systems = (Parallel(tp=4), Parallel(pp=4), Parallel(cp=2), Parallel(tp=2, pp=2, cp=2))
    for parallel, method, phase in product(systems, ("kv", "ttt_window"), PHASES):
        name = " ".join(
            f"{way}={n}" for way, n in (("tp", parallel.tp), ("pp", parallel.pp), ("cp", parallel.cp)) if n > 1
        )
        points.append((replace(qwen(method, phase, "4k", batch=4), parallel=parallel), name))
    for method, phase in product(("ttt", "ttt_window"), PHASES):
        points.append((replace(qwen(method, phase, "4k"), overlap=False), "overlap=no"))
        points.append((replace(qwen(method, phase, "4k"), detail=64), "detail=64"))

    found = {_name(point, option): point for point, option in points}
    assert len(found) == len(points), "two cases have the same name"
    return found


def _name(point: Point, option: str) -> str:
    words = (point.chip.name, point.model.name, point.method.name, point.phase, point.context_tokens, f"b{point.batch}")
    return " ".join([*map(str, words), *([option] if option else [])])
