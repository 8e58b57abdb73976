"""In-Place TTT and the transformer around it in NumPy, with the same bits on every machine."""

from ttt_sim.reference.checks import InputError
from ttt_sim.reference.decoder import Decoder, DecoderShape, random_parameters, random_tokens
from ttt_sim.reference.exact import dot
from ttt_sim.reference.formats import FORMATS, Format
from ttt_sim.reference.in_place_ttt import (
    MlpWeights,
    StreamingMlp,
    TTTOptions,
    by_document,
    context_parallel,
    parallel,
)
from ttt_sim.reference.official import official_mlp

__all__ = [
    "FORMATS",
    "Decoder",
    "DecoderShape",
    "Format",
    "InputError",
    "MlpWeights",
    "StreamingMlp",
    "TTTOptions",
    "by_document",
    "context_parallel",
    "dot",
    "official_mlp",
    "parallel",
    "random_parameters",
    "random_tokens",
]
