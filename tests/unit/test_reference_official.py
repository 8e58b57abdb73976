"""The door for outside checks: what it returns, and what it says to bad input."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.unit.reference_tools import BF16, Array, Case, mlp_case, options, same_bits
from ttt_sim.reference import FORMATS, InputError, StreamingMlp, official_mlp
from ttt_sim.reference.formats import is_in

D, F, N = 6, 10, 23
DTYPES = ("float64", "float32", "bfloat16")
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def params_of(case: Case) -> dict[str, Any]:
    w = case.weights
    return {
        "gate_proj": w.gate,
        "up_proj": w.up,
        "down_proj": w.down,
        "ttt_conv": w.conv[:, None, :],
        "ttt_proj": w.projection,
    }


def arguments(dtype: str = "float64", **changes: Any) -> dict[str, Any]:
    """A call that works, as keyword arguments, with some of them replaced; dotted names reach into ``params``."""
    case = mlp_case(FORMATS[dtype], d=D, f=F, n=N)
    kind = np.float64 if dtype == "float64" else np.float32
    call: dict[str, Any] = {
        "params": {name: None if v is None else v.astype(kind) for name, v in params_of(case).items()},
        "x": case.x[0].astype(kind),
        "t": case.t[0].astype(kind),
        "chunk": 5,
        "lr": 0.5,
        "pieces": (7, 1, 15),
        "dtype": dtype,
    }
    for name, value in changes.items():
        if name in call:
            call[name] = value
        else:
            call["params"][name] = value
    return call


def run(call: dict[str, Any]) -> tuple[Array, Array]:
    return official_mlp(**call)


@every_dtype
@pytest.mark.parametrize("projection", [True, False])
def test_shapes_types_and_values(dtype, projection):
    case = mlp_case(FORMATS[dtype], d=D, f=F, n=N, projection=projection)
    call = arguments(dtype) | {"params": params_of(case)}
    y, w = run(call)
    kind = np.float64 if dtype == "float64" else np.float32
    assert y.dtype == np.dtype(kind)
    assert w.dtype == np.dtype(kind)
    assert (y.shape, w.shape) == ((N, D), (D, F))
    assert is_in(y.astype(np.float64), FORMATS[dtype])
    assert is_in(w.astype(np.float64), FORMATS[dtype])
    mlp = StreamingMlp(case.weights, options(FORMATS[dtype]))
    assert same_bits(y.astype(np.float64), mlp(case.x, case.t)[0])
    assert same_bits(w.astype(np.float64), mlp.weight[0])


@every_dtype
def test_against_plain_numpy(dtype):
    """Chunk by chunk in float64, without a rounding point in between."""
    call = arguments(dtype)
    p = {name: np.asarray(v, dtype=np.float64) for name, v in call["params"].items()}
    x, t = call["x"].astype(np.float64), call["t"].astype(np.float64)
    gate, w = x @ p["gate_proj"].T, p["down_proj"].copy()
    z = gate / (1 + np.exp(-gate)) * (x @ p["up_proj"].T)
    rows = []
    for begin in range(0, N, 5):
        part = slice(begin, begin + 5)
        rows.append(z[part] @ w.T)
        if begin + 5 <= N:
            padded = np.pad(t[part], ((2, 2), (0, 0)))
            a = sum((padded[q : q + 5] * p["ttt_conv"][:, 0, q] for q in range(5)), np.zeros((5, D)))
            w += 0.5 * (a @ p["ttt_proj"]).T @ z[part]
    y, weight = run(call)
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 0.04}[dtype]
    assert np.abs(y - np.concatenate(rows)).max() <= tolerance * np.abs(y).max()
    assert np.abs(weight - w).max() <= tolerance * np.abs(weight).max()


@every_dtype
def test_pieces_do_not_matter(dtype):
    want = run(arguments(dtype))
    for pieces in ((N,), (1,) * N, [5, 18], [4, 1, 18], (22, 1), range(23, 24), (np.int64(20), np.int32(3))):
        got = run(arguments(dtype, pieces=pieces))
        assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_one_token():
    call = arguments()
    y, w = run(call | {"x": call["x"][:1], "t": call["t"][:1], "pieces": (1,)})
    assert y.shape == (1, D)
    assert same_bits(w, call["params"]["down_proj"])
    run(call | {"x": call["x"][:1], "t": call["t"][:1], "pieces": (1,), "chunk": 1})


def test_longer_chunk_than_anything():
    y, w = run(arguments(chunk=10**9))
    assert y.shape == (N, D)
    assert same_bits(w, arguments()["params"]["down_proj"])


def test_lists_and_other_number_types():
    call = arguments()
    want = run(call)
    listed = {name: v.tolist() for name, v in call["params"].items()}
    got = run(call | {"params": listed, "x": call["x"].tolist(), "t": [tuple(row) for row in call["t"].tolist()]})
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))
    narrow = arguments("bfloat16")
    packed = {name: v.astype(ml_dtypes.bfloat16) for name, v in narrow["params"].items()}
    got = run(narrow | {"params": packed, "x": narrow["x"].astype(ml_dtypes.bfloat16)})
    assert all(same_bits(a, b) for a, b in zip(got, run(narrow), strict=True))
    whole = np.ones((N, D), dtype=np.int8)
    assert all(
        same_bits(a, b) for a, b in zip(run(call | {"x": whole}), run(call | {"x": whole.astype(float)}), strict=True)
    )
    for same in (np.float32(0.5), np.array(0.5)):
        assert all(same_bits(a, b) for a, b in zip(run(call | {"lr": same}), want, strict=True))
    assert run(call | {"chunk": np.int32(5)})[0].shape == (N, D)


@every_dtype
def test_inputs_stay(dtype):
    call = arguments(dtype)
    arrays = [call["x"], call["t"], *call["params"].values()]
    copies = [array.copy() for array in arrays]
    names = list(call["params"])
    for array in arrays:
        array.flags.writeable = False
    y, w = run(call)
    assert list(call["params"]) == names
    for array, copy in zip(arrays, copies, strict=True):
        assert same_bits(array, copy)
        assert not np.shares_memory(array, y)
        assert not np.shares_memory(array, w)
    y[:] = w[:] = 0  # the results are the caller's
    again = run(call)
    assert not same_bits(again[0], y)


@every_dtype
def test_layout_in_memory_is_irrelevant(dtype):
    call = arguments(dtype)
    want = run(call)
    odd = {name: np.asfortranarray(v) for name, v in call["params"].items()}
    x = np.repeat(call["x"], 2, axis=0)[::2]
    t = np.ascontiguousarray(call["t"][::-1])[::-1]
    got = run(call | {"params": odd, "x": x, "t": t})
    assert all(same_bits(a, b) for a, b in zip(got, want, strict=True))


# --- bad input --------------------------------------------------------------------------------------------------------

ARRAYS = (
    "params['gate_proj']",
    "params['up_proj']",
    "params['down_proj']",
    "params['ttt_conv']",
    "params['ttt_proj']",
    "x",
    "t",
)
SHAPES = ((F, D), (F, D), (D, F), (D, 1, 5), (D, D), (N, D), (N, D))


def replaced(argument: str, value: Any, dtype: str = "float64") -> dict[str, Any]:
    return arguments(dtype, **{argument.removeprefix("params['").removesuffix("']"): value})


def refused(call: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        run(call)
    assert isinstance(error.value, ValueError)
    return str(error.value)


@pytest.mark.parametrize(("argument", "shape"), list(zip(ARRAYS, SHAPES, strict=True)), ids=ARRAYS)
def test_wrong_shapes(argument, shape):
    rows_follow = argument in ("params['gate_proj']", "x")  # the first to say d, f or n; then another argument differs
    wrong = [shape[::-1], shape[:-1], (*shape, 1), (), (*shape[:-1], shape[-1] + 1), (1, *shape)]
    if not rows_follow:
        wrong.append((shape[0] + 1, *shape[1:]))
    for bad in wrong:
        if bad == shape:
            continue
        message = refused(replaced(argument, np.ones(bad)))
        if argument == "params['gate_proj']" and len(bad) == 2:
            assert message.startswith("params['up_proj']: shape is (10, 6), expected (")
        else:
            assert message.startswith(f"{argument}: shape is {bad}, expected (")
    empty = refused(replaced(argument, np.ones((0, *shape[1:]))))
    assert empty.startswith(f"{argument}: shape is (0, ")
    assert "expected" in empty
    if rows_follow:
        assert "no empty dimension" in empty


def test_expected_shapes_are_named():
    assert refused(replaced("params['down_proj']", np.ones((F, D)))).endswith("expected (6, 10)")
    assert refused(replaced("params['ttt_conv']", np.ones((D, 5)))).endswith("expected (6, 1, 5)")
    assert refused(replaced("params['ttt_proj']", np.ones((F, F)))).endswith("expected (6, 6)")
    assert refused(replaced("x", np.ones(D))).endswith("expected (any, 6)")
    assert refused(replaced("t", np.ones((N - 1, D)))).endswith("expected (23, 6)")
    assert refused(arguments(x=np.ones((N + 1, D)))).startswith("t: shape is (23, 6), expected (24, 6)")


@every_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("argument", "shape"), list(zip(ARRAYS, SHAPES, strict=True)), ids=ARRAYS)
def test_values_that_are_not_finite(dtype, bad, argument, shape):
    value = np.ones(shape)
    where = tuple(n - 1 for n in shape)
    value[where] = bad
    message = refused(replaced(argument, value, dtype))
    assert message == f"{argument}: element {where} is {bad}, expected finite numbers"


@pytest.mark.parametrize("argument", ARRAYS)
@pytest.mark.parametrize(
    "value",
    [
        "text",
        "1.0",
        b"1",
        [["a", "b"]],
        [["1.0", "2.0"]],
        [[1.0, 2.0], [3.0]],
        np.array([["1.5"]]),
        np.array([[1 + 0j]]),
        np.array([["2020-01-01"]], dtype="datetime64[D]"),
        np.array([["2.5", 1.0]], dtype=object),
        {"a": 1},
        object(),
        [[10**400]],
        iter([1.0]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_array_of_numbers(argument, value):
    assert refused(replaced(argument, value)).startswith(f"{argument}: expected an array of numbers, got ")


@pytest.mark.parametrize("argument", [name for name in ARRAYS if name != "params['ttt_proj']"])
def test_none_stands_for_the_projection_only(argument):
    assert refused(replaced(argument, None)).startswith(f"{argument}: ")
    run(replaced("params['ttt_proj']", None))


@pytest.mark.parametrize(("argument", "shape"), list(zip(ARRAYS, SHAPES, strict=True)), ids=ARRAYS)
def test_values_that_the_dtype_does_not_hold(argument, shape):
    for dtype, value in (("bfloat16", 1 + 2.0**-8), ("bfloat16", 3.4e38), ("float32", 1 + 2.0**-24), ("float32", 1e39)):
        array = np.ones(shape)
        array[(0,) * len(shape)] = value
        assert refused(replaced(argument, array, dtype)) == (
            f"{argument}: holds numbers that {dtype} cannot represent; round them first"
        )


@pytest.mark.parametrize(
    ("dtype", "hint"),
    [
        ("bfloat61", ", did you mean bfloat16?"),
        ("bf16", ", did you mean bfloat16?"),
        ("Float32", ", did you mean float32?"),
        ("float16", None),
        ("float8_e4m3fn", None),
        ("", ""),
        (None, None),
        (np.float32, None),
        (32, None),
        (["float32"], None),
    ],
)
def test_unknown_dtypes(dtype, hint):
    message = refused(arguments() | {"dtype": dtype})
    assert message.startswith(f"dtype: {dtype!r} is unknown")
    assert message.endswith("; expected one of float64, float32, bfloat16")
    if hint is not None:
        assert f"is unknown{hint};" in message


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((7, 1, 14), "pieces: (7, 1, 14) add up to 22, expected 23"),
        ((23, 1), "pieces: (23, 1) add up to 24, expected 23"),
        ((), "pieces: () add up to 0, expected 23"),
        ([], "pieces: () add up to 0, expected 23"),
        ((0, 23), "pieces[0]: is 0, expected a whole number of at least 1"),
        ((24, -1), "pieces[1]: is -1, expected"),
        ((22, True), "pieces[1]: is True, expected"),
        ((22, 1.0), "pieces[1]: is 1.0, expected"),
        ((22, "1"), "pieces[1]: is '1', expected"),
        ((22, None), "pieces[1]: is None, expected"),
        (((23,),), "pieces[0]: is (23,), expected"),
        (23, "pieces: is 23, expected a tuple of call lengths that add up to 23"),
        (None, "pieces: is None, expected a tuple"),
        ("23", "pieces: is '23', expected a tuple"),
        (b"\x17", "pieces: is b'\\x17', expected a tuple"),
        ({23}, "pieces: is {23}, expected a tuple"),
        (iter([23]), "pieces: is <list_iterator"),
        (np.array(23), "pieces: is array(23), expected a tuple"),
        (np.array([[23]]), "pieces[0]: is [23], expected"),
        (np.array([22.0, 1.0]), "pieces[0]: is 22.0, expected"),
    ],
)
def test_pieces_that_cannot_be(pieces, text):
    assert refused(arguments(pieces=pieces)).startswith(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"chunk": 0}, "chunk: is 0, expected a whole number of at least 1"),
        ({"chunk": -5}, "chunk: is -5, expected"),
        ({"chunk": True}, "chunk: is True, expected"),
        ({"chunk": 5.0}, "chunk: is 5.0, expected"),
        ({"chunk": "5"}, "chunk: is '5', expected"),
        ({"chunk": None}, "chunk: is None, expected"),
        ({"lr": float("nan")}, "lr: element () is nan, expected finite numbers"),
        ({"lr": float("inf")}, "lr: element () is inf, expected finite numbers"),
        ({"lr": "0.5"}, "lr: expected an array of numbers, got str"),
        ({"lr": [0.5]}, "lr: shape is (1,), expected ()"),
        ({"lr": 1j}, "lr: expected an array of numbers, got complex"),
        ({"lr": None}, "lr: "),
    ],
)
def test_chunk_and_rate_that_cannot_be(changes, text):
    assert refused(arguments(**changes)).startswith(text)


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj", "ttt_conv", "ttt_proj"])
def test_missing_parameters(name):
    call = arguments()
    del call["params"][name]
    message = refused(call)
    assert message.startswith("params: got ")
    assert message.endswith("expected a mapping with gate_proj, up_proj, down_proj, ttt_conv, ttt_proj")
    assert name not in message.partition(", expected")[0]


def test_parameters_that_are_too_many_or_none():
    assert "gate_proj.weight" in refused(replaced("gate_proj.weight", np.ones((F, D))))
    kinds: list[tuple[Any, str]] = [({}, ","), (None, "NoneType"), ([1], "list"), ("x", "str")]
    for params, got in kinds:
        assert refused(arguments() | {"params": params}).startswith(f"params: got {got}")


@pytest.mark.parametrize(
    ("dtype", "changes", "name"),
    [
        ("float32", {"lr": 1e39}, "delta_scale"),
        ("bfloat16", {"lr": 1e39}, "delta_scale"),
        ("float64", {"lr": 1.7e308}, "delta_scale"),
        ("float32", {"gate_proj": np.full((F, D), 2.0**127)}, "gate_proj"),
        ("bfloat16", {"up_proj": np.full((F, D), 2.0**127), "x": np.full((N, D), 2.0)}, "up_proj"),
        ("float64", {"up_proj": np.full((F, D), 2.0**1023), "x": np.full((N, D), 2.0)}, "up_proj"),
        ("float32", {"gate_proj": np.full((F, D), 2.0**90), "up_proj": np.full((F, D), 2.0**90), "x": np.ones((N, D))},
         "silu_mul"),
        ("float64", {"gate_proj": np.full((F, D), 2.0**600), "up_proj": np.full((F, D), 2.0**600),
                     "x": np.ones((N, D))}, "silu_mul"),
        ("float32", {"gate_proj": np.full((F, D), 2.0**60), "up_proj": np.full((F, D), 2.0**60), "x": np.ones((N, D)),
                     "down_proj": np.full((D, F), 2.0**20)}, "fast_apply"),
        ("bfloat16", {"ttt_conv": np.full((D, 1, 5), 2.0**127), "t": np.full((N, D), 2.0)}, "target_conv"),
        ("float32", {"ttt_proj": np.full((D, D), 2.0**127), "t": np.full((N, D), 16.0),
                     "ttt_conv": np.ones((D, 1, 5))}, "target_proj"),
        ("float32", {"ttt_conv": np.full((D, 1, 5), 2.0**100), "t": np.ones((N, D)),
                     "ttt_proj": np.full((D, D), 2.0**20), "gate_proj": np.full((F, D), 16.0),
                     "x": np.ones((N, D)), "up_proj": np.full((F, D), 2.0**10)},
         "delta_gemm"),
    ],
)  # fmt: skip
def test_overflow_on_the_way(dtype, changes, name):
    """A message, no infinity and no warning."""
    message = refused(arguments(dtype, **changes))
    assert message.startswith(f"{name}: element (")
    assert "expected at most" in message
    assert message.endswith(f"the largest number of {dtype}")


def test_bfloat16_results_are_held_in_float32():
    y, w = run(arguments("bfloat16"))
    for array in (y, w):
        assert array.dtype == np.float32
        assert not (array.view(np.uint32) & 0xFFFF).any()
    assert is_in(y.astype(np.float64), BF16)
