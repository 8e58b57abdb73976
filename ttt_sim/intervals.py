"""How far predictions are from measurements: 80 % intervals by kind of op, size and kinship of the chip.

The tables hold quantiles of measured over predicted time, from residuals on published measurements (see
docs/validation.md); ``ttt_sim validate --data`` prints their coverage on held-out folds. Chips that were never measured
get wider ones, those of a transfer: constants of the A100 predict the H100, and the reverse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ttt_sim.chip import Chip


class Interval(NamedTuple):
    """Factors on a predicted time; between them lie 80 % of measurements."""

    low: float
    high: float


#: Chip files whose kernels were measured; others are predicted from their data sheet and a relative's constants.
MEASURED_CHIPS = ("a100", "h100")
#: Upper ends of size classes in microseconds; the last class has none.
SIZES_US = (10.0, 100.0)


#: Quantiles of measured over predicted time by op and size class, on the measured chips.
RESIDUALS: Mapping[str, tuple[Interval, ...]] = {
    "attention_decode": (Interval(0.916, 1.156), Interval(0.912, 1.156), Interval(0.919, 1.098)),
    "attention_prefill": (Interval(0.887, 1.146), Interval(0.878, 1.106), Interval(0.924, 1.211)),
    "allreduce": (Interval(0.876, 1.2), Interval(0.887, 1.208), Interval(0.742, 1.105)),
    "e2e_decode_step": (Interval(0.871, 1.099), Interval(0.871, 1.099), Interval(0.871, 1.099)),
    "e2e_generate": (Interval(0.881, 1.127), Interval(0.881, 1.127), Interval(0.881, 1.127)),
    "e2e_prefill": (Interval(1.002, 1.157), Interval(1.002, 1.157), Interval(1.002, 1.157)),
    "bmm": (Interval(0.799, 1.483), Interval(0.799, 1.483), Interval(0.803, 1.435)),
    "gemm": (Interval(0.876, 1.146), Interval(0.882, 1.205), Interval(0.883, 1.241)),
    "gdn_chunk_prefill": (Interval(0.935, 1.144), Interval(0.931, 1.164), Interval(0.951, 1.046)),
    "gdn_recurrent_decode": (Interval(0.984, 1.055), Interval(0.882, 1.05), Interval(0.899, 1.049)),
    "elementwise_add": (Interval(0.843, 2.037), Interval(0.914, 1.882), Interval(0.967, 0.994)),
    "gelu": (Interval(0.818, 1.193), Interval(1.02, 1.216), Interval(0.884, 0.955)),
    "layernorm": (Interval(0.915, 1.203), Interval(0.929, 1.254), Interval(0.926, 1.152)),
    "rmsnorm": (Interval(0.652, 1.188), Interval(0.892, 1.273), Interval(0.665, 1.292)),
    "silu_mul": (Interval(0.889, 1.616), Interval(0.913, 1.314), Interval(0.872, 1.029)),
    "softmax": (Interval(0.831, 1.103), Interval(0.831, 1.103), Interval(0.856, 1.148)),
}
#: The same where constants of one measured chip predict another, by op.
TRANSFER: Mapping[str, Interval] = {
    "attention_decode": Interval(0.695, 1.625),
    "attention_prefill": Interval(0.675, 1.514),
    "allreduce": Interval(0.672, 1.603),
    "e2e_decode_step": Interval(0.81, 1.061),
    "e2e_generate": Interval(0.879, 1.133),
    "e2e_prefill": Interval(1.002, 1.164),
    "bmm": Interval(0.8, 1.483),
    "gemm": Interval(0.865, 1.244),
    "gdn_chunk_prefill": Interval(0.935, 1.144),
    "gdn_recurrent_decode": Interval(0.873, 1.095),
    "elementwise_add": Interval(0.914, 1.882),
    "gelu": Interval(0.818, 1.193),
    "layernorm": Interval(0.924, 1.222),
    "rmsnorm": Interval(0.665, 1.292),
    "silu_mul": Interval(0.889, 1.616),
    "softmax": Interval(0.831, 1.103),
}
#: For ops without measurements.
ANY_OP = Interval(0.8, 1.4)
#: Ways of execution of which kernels, or at least whole models on several chips, were compared one by one.
KNOWN_STYLES = ("tile_wave", "systolic")
#: Quantiles (8 and 92 %) of published over predicted time of chips of other styles (spatial arrays, computing in
#: memory, events): figures of models and of single products (docs/published_figures.md) but `unseen-xdna2`.
OTHER_STYLES = Interval(0.742, 2.268)
#: A chip of another maker runs other kernels: twice as far on a logarithmic scale.
MEASURED_VENDOR = "NVIDIA"


def interval(op: str, predicted_us: float, chip: Chip) -> Interval:
    """The 80 % interval of a prediction, as factors on it. ``op`` as in measured rows; others get the widest."""
    size = sum(predicted_us >= edge for edge in SIZES_US)
    bands = RESIDUALS.get(op)
    band = ANY_OP if bands is None else bands[size]
    band = Interval(min(band.low, 1.0), max(band.high, 1.0))
    if chip.name in MEASURED_CHIPS:
        return band
    far = TRANSFER.get(op, ANY_OP)
    low, high = min(band.low, far.low), max(band.high, far.high)
    if chip.vendor != MEASURED_VENDOR:
        low, high = low * low, high * high
    if chip.execution not in KNOWN_STYLES:
        low, high = min(low, OTHER_STYLES.low), max(high, OTHER_STYLES.high)
    return Interval(low, high)
