"""The command line. One function per command; no logic of its own. Heavy modules are imported inside the commands."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ttt_sim import __version__
from ttt_sim.data_files import did_you_mean
from ttt_sim.errors import ConfigError, TTTSimError

if TYPE_CHECKING:
    from ttt_sim.chip import Chip
    from ttt_sim.model import MethodSettings, Model, TTTSettings

EXIT_ERROR = 2
EXIT_FINDINGS = 1
EXIT_INTERRUPTED = 130

DEFAULT_MODEL = "Qwen3-4B"
DEFAULT_METHODS = "kv,kv_window,ttt,ttt_window"
DEFAULT_CONTEXTS = "1k,2k,4k,8k,16k,32k,64k,128k"
DEFAULT_BATCHES = "1,8,32"
DEFAULT_WINDOW = "1024"
#: A longer prompt makes a trace of tens of millions of ops, which takes more memory than a report is worth.
LONGEST_CONTEXT_TOKENS = 16 << 20

#: Dimensions of an op that ``explain`` takes as options.
SHAPE_OPTIONS = (
    "m", "n", "k", "batch", "seq_q", "seq_kv", "n_heads", "n_kv_heads", "head_dim", "causal", "tp",
)  # fmt: skip

#: What ``run`` takes together with ``--trace``; every other option shapes a workload, and a saved trace is one already.
REPLAY_OPTIONS = frozenset(
    {"command", "function", "chip", "variant", "overrides", "trace", "engine", "detail", "no_overlap", "out"}
)


#: Options of ``serve`` that shape a random stream.
STREAM_OPTIONS = ("rate", "count", "prompt", "output", "lengths", "seed")


class _Parser(argparse.ArgumentParser):
    """Errors name the nearest valid command or option and exit with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"ttt_sim: error: {message}\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            options = [word for word in rest if word.startswith("-")]
            if options:
                name = options[0].partition("=")[0]
                known = [option for action in self._of_command(found)._actions for option in action.option_strings]
                self.error(f"unknown option {name}{did_you_mean(name, known)}")
            self.error(f"unexpected argument {rest[0]!r}")
        return found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(action.choices)
            self.error(f"unknown command {value!r}{did_you_mean(value, known)}; commands: {', '.join(known)}")

    def _of_command(self, found: argparse.Namespace) -> argparse.ArgumentParser:
        """The parser of the command that was given."""
        commands = next(action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        parser: argparse.ArgumentParser = commands.choices[found.command]
        return parser


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ttt_sim",
        allow_abbrev=False,
        description="Hardware cost simulator for test-time training (TTT): In-Place TTT against a KV cache, on a chip "
        "described in YAML.",
    )
    parser.add_argument("--version", action="version", version=f"ttt_sim {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, help_text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)

    run = command("run", "simulate a model with and without test-time training on a chip, and write a report")
    run.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one (see: ttt_sim chips)")
    _workload_options(run)
    run.add_argument(
        "--method", default=DEFAULT_METHODS, metavar="LIST", help="methods to compare (default: %(default)s)"
    )
    run.add_argument(
        "--context", default=DEFAULT_CONTEXTS, metavar="LIST", help="context lengths (default: %(default)s)"
    )
    run.add_argument(
        "--batch", default=DEFAULT_BATCHES, metavar="LIST", help="sequences at once (default: %(default)s)"
    )
    run.add_argument(
        "--chips", type=int, metavar="N", help="chips that work together (default: as few as hold the model)"
    )
    run.add_argument("--tp", type=int, metavar="N", help="chips that share every layer")
    run.add_argument("--pp", type=int, metavar="N", help="pipeline stages")
    run.add_argument("--cp", type=int, metavar="N", help="chips that share a context")
    run.add_argument("--engine", default="compiled", help="compiled (default) or simpy")
    run.add_argument("--out", metavar="DIR", help="folder of the report (default: reports/<chip>)")
    run.add_argument("--detail", type=int, default=16, metavar="N", help="most tasks per op (default: %(default)s)")
    run.add_argument("--no-overlap", action="store_true", help="forbid weight updates to run beside other work")
    run.add_argument(
        "--sensitivity", action="store_true", help="10 %% sensitivities at every point, not only the headline ones"
    )
    run.add_argument("--trace", metavar="FILE", help="replay this saved trace instead of generating workloads")
    run.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    _chip_options(run)
    run.set_defaults(function=_run)

    compare = command("compare", "run one workload on many chips, and write a report that compares them")
    compare.add_argument("chips", metavar="CHIP", nargs="+", help="chip files, or names of built-in chips")
    _workload_options(compare)
    compare.add_argument(
        "--method", default=DEFAULT_METHODS, metavar="LIST", help="methods to compare (default: %(default)s)"
    )
    compare.add_argument("--context", default="32k", metavar="TOKENS", help="context length (default: %(default)s)")
    compare.add_argument("--batch", default="8", metavar="N", help="sequences at once (default: %(default)s)")
    compare.add_argument(
        "--out", default="reports/compare", metavar="DIR", help="folder of the report (default: %(default)s)"
    )
    compare.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    compare.set_defaults(function=_compare)

    approaches = command("approaches", "set every way to adapt a model to a context against the others, on one chip")
    approaches.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one")
    _workload_options(approaches, window=None)
    approaches.add_argument("--method", metavar="LIST", help="methods to compare (default: all that can be asked)")
    approaches.add_argument("--context", default="128k", metavar="TOKENS", help="of a user (default: %(default)s)")
    approaches.add_argument("--question", default="128", metavar="TOKENS", help="of a user (default: %(default)s)")
    approaches.add_argument("--answer", default="256", metavar="TOKENS", help="to a question (default: %(default)s)")
    approaches.add_argument(
        "--batch", type=int, default=8, metavar="N", help="users that decode at once (default: %(default)s)"
    )
    approaches.add_argument(
        "--option", action="append", default=[], metavar="METHOD.NAME=VALUE",
        help="option of a method, e.g. fine_tuning.epochs=3; may be given several times",
    )  # fmt: skip
    approaches.add_argument("--out", metavar="DIR", help="folder of the report (default: reports/<chip>-approaches)")
    approaches.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    _chip_options(approaches)
    approaches.set_defaults(function=_approaches)

    claims = command("claims", "put public claims about test-time training and hardware to the test")
    claims.add_argument("--claim", metavar="LIST", help="names of claims (default: all)")
    claims.add_argument("--out", default="reports/claims.md", metavar="FILE", help="the ledger (default: %(default)s)")
    claims.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    claims.set_defaults(function=_claims)

    lifecycle = command(
        "lifecycle", "cost of checkpoints, rollbacks, audit, swaps, forks, resets and sharing of changing weights"
    )
    lifecycle.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one (see: ttt_sim chips)")
    _workload_options(lifecycle)
    lifecycle.add_argument("--method", default="ttt_window", help="a method with fast weights (default: %(default)s)")
    lifecycle.add_argument("--context", default="32k", metavar="TOKENS", help="context length (default: %(default)s)")
    lifecycle.add_argument("--batch", type=int, default=8, metavar="N", help="sequences at once (default: %(default)s)")
    lifecycle.add_argument(
        "--beams", type=int, default=4, metavar="N", help="sequences that a fork leaves of one (default: %(default)s)"
    )
    lifecycle.add_argument(
        "--draft", type=int, default=8, metavar="TOKENS", help="tokens of a rejected draft (default: %(default)s)"
    )
    lifecycle.add_argument(
        "--chips", type=int, metavar="N", help="chips that work together (default: as few as hold the sequences)"
    )
    lifecycle.add_argument("--tp", type=int, metavar="N", help="chips that share every layer")
    lifecycle.add_argument("--pp", type=int, metavar="N", help="pipeline stages")
    lifecycle.add_argument("--hash", default="blake3", help="of the audit trail: blake3 (default) or xxh3")
    lifecycle.add_argument("--out", metavar="DIR", help="folder of the report (default: reports/<chip>-lifecycle)")
    lifecycle.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    _chip_options(lifecycle)
    lifecycle.set_defaults(function=_lifecycle)

    trace = command("trace", "write the op trace of one workload to a file")
    _workload_options(trace)
    trace.add_argument("--method", default="ttt_window", help="one method (default: %(default)s)")
    trace.add_argument("--context", default="4k", help="prompt tokens, or tokens already held (default: %(default)s)")
    trace.add_argument(
        "--phase", default="prefill", help="prefill (default), decode, or another phase that the method has"
    )
    trace.add_argument("--question", default="128", metavar="TOKENS", help="of phase ask (default: %(default)s)")
    trace.add_argument("--steps", type=int, default=1, metavar="N", help="decode steps (default: %(default)s)")
    trace.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (default: %(default)s)")
    trace.add_argument("-o", "--out", required=True, metavar="FILE", help="ends in .csv, .json or .parquet")
    trace.set_defaults(function=_trace)

    verify = command(
        "verify", "execute the simulated trace of a small model and compare it with the reference, bit for bit"
    )
    verify.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one (see: ttt_sim chips)")
    _workload_options(verify, model="toy", window="64", call="64", ttt="toy")
    verify.add_argument("--method", metavar="LIST", help="methods to verify (default: all)")
    verify.add_argument(
        "--prefill", default="150", metavar="TOKENS", help="tokens of the prompt (default: %(default)s)"
    )
    verify.add_argument(
        "--decode", type=int, default=40, metavar="N", help="tokens decoded after it (default: %(default)s)"
    )
    verify.add_argument("--batch", type=int, default=2, metavar="N", help="sequences at once (default: %(default)s)")
    verify.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of parameters and tokens (default: %(default)s)"
    )
    verify.add_argument(
        "--accumulate", default="exact",
        help="exact (default): products summed exactly and rounded once; hardware: in float32, in the order of the "
        "tiles, to see what that changes",
    )  # fmt: skip
    verify.add_argument("--engine", default="compiled", help="compiled (default) or simpy")
    verify.add_argument("--detail", type=int, default=16, metavar="N", help="most tasks per op (default: %(default)s)")
    verify.add_argument("--no-overlap", action="store_true", help="forbid weight updates to run beside other work")
    _chip_options(verify)
    verify.set_defaults(function=_verify)

    drift = command("drift", "show what number formats do to a fast weight over a long stream")
    drift.add_argument("--tokens", default="256k", help="tokens of the stream, up to 16M (default: %(default)s)")
    drift.add_argument("--width", type=int, default=64, metavar="N", help="width d of the layer (default: %(default)s)")
    drift.add_argument("--ff", type=int, default=192, metavar="N", help="hidden width f (default: %(default)s)")
    drift.add_argument(
        "--chunk", default="1k", metavar="TOKENS", help="tokens per weight update (default: %(default)s)"
    )
    drift.add_argument("--rate", type=float, default=3.0, help="step size of an update (default: %(default)s)")
    drift.add_argument(
        "--clip", default="none,published", metavar="LIST",
        help="largest Frobenius norms of a delta: numbers, none, or published, which is 1e-5 with the same size per "
        "element as at Qwen3-4B (default: %(default)s)",
    )  # fmt: skip
    drift.add_argument("--formats", default="all", metavar="LIST", help="formats of the fast weight (default: all)")
    drift.add_argument("--seed", type=int, default=0, metavar="N", help="of inputs and rounding (default: %(default)s)")
    drift.add_argument("--out", metavar="DIR", default="reports/drift", help="folder of results (default: %(default)s)")
    drift.set_defaults(function=_drift)

    serve = command("serve", "serve a stream of requests on a chip: latencies, load, and what a token costs")
    serve.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one (see: ttt_sim chips)")
    _workload_options(serve)
    serve.add_argument(
        "--method", default="kv,ttt_window", metavar="LIST", help="methods to serve (default: %(default)s)"
    )
    serve.add_argument("--requests", metavar="FILE", help="CSV file of arrival_s,prompt_tokens,output_tokens")
    serve.add_argument(
        "--rate", type=float, metavar="R",
        help="random requests per second (default: 0.8 of what the slowest method sustains)",
    )  # fmt: skip
    serve.add_argument("--count", type=int, metavar="N", help="random requests (default: 1000)")
    serve.add_argument("--prompt", metavar="TOKENS", help="mean prompt of random requests (default: 2k)")
    serve.add_argument("--output", metavar="TOKENS", help="mean output of random requests (default: 256)")
    serve.add_argument("--lengths", help="fixed, uniform or exponential (default) lengths of random requests")
    serve.add_argument("--seed", type=int, metavar="N", help="of random requests (default: 0)")
    serve.add_argument(
        "--batch", type=int, default=256, metavar="N", help="most sequences at once (default: %(default)s)"
    )
    serve.add_argument(
        "--policy", default="prefill_first",
        help="prefill_first (default): prompts before any token; alternate: a prefill call and a decode step in turn",
    )  # fmt: skip
    serve.add_argument("--tp", type=int, metavar="N", help="chips that share the model (default: as few as hold it)")
    serve.add_argument("--out", metavar="DIR", help="folder of the report (default: reports/<chip>-serving)")
    _chip_options(serve)
    serve.set_defaults(function=_serve)

    predict = command("predict", "predict the latency of ops and whole models, row by row of a CSV file")
    predict.add_argument("chip", metavar="CHIP|auto", help="chip, or auto: by the device of each row")
    predict.add_argument("rows", metavar="ROWS.csv", help="rows, see docs/validation.md")
    predict.add_argument("-o", "--out", required=True, metavar="OUT.csv", help="rows with their predictions")
    predict.add_argument("--harness", metavar="NAME", help="how latencies are taken (default: by each row's source)")
    predict.add_argument("--keep-going", action="store_true", help="leave out rows that are wrong, predict the rest")
    _chip_options(predict)
    predict.set_defaults(function=_predict)
    validate = command("validate", "compare predictions with measurements; exit status 1 beyond the tolerances")
    validate.add_argument("--data", metavar="DIR", help="folder of measured rows (default: published figures)")
    validate.add_argument("--out", metavar="DIR", help="folder for the table and scatter figures")
    validate.add_argument("--refit", action="store_true", help="also fit constants anew: held-out and transfer errors")
    validate.set_defaults(function=_validate)
    explain = command("explain", "explain the predicted latency of one op")
    explain.add_argument("chip", metavar="CHIP")
    explain.add_argument("--op", required=True, help="gemm, bmm, attention_prefill, attention_decode, ...")
    explain.add_argument("--dtype", default="bf16", help="operands (default: %(default)s)")
    for name in SHAPE_OPTIONS:
        explain.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N")
    explain.add_argument("--harness", metavar="NAME", help="how the latency is taken (default: graph_replay)")
    _chip_options(explain)
    explain.set_defaults(function=_explain)
    calibrate = command("calibrate", "fit the constants of a chip file to measured rows")
    calibrate.add_argument("chip", metavar="CHIP", help="chip file, or the name of a built-in one")
    calibrate.add_argument("rows", metavar="ROWS.csv", help="operator rows with latency_us, see docs/validation.md")
    calibrate.add_argument("-o", "--out", required=True, metavar="NEW.yaml", help="the chip file with fitted constants")
    _chip_options(calibrate)
    calibrate.set_defaults(function=_calibrate)

    chips = command("chips", "list the built-in chips")
    chips.set_defaults(function=_chips)
    models = command("models", "list the built-in models, methods and TTT presets")
    models.set_defaults(function=_models)
    show = command("show", "print a chip with its derived figures")
    show.add_argument("chip", metavar="CHIP")
    _chip_options(show)
    show.set_defaults(function=_show)
    lint = command("lint", "check the physics of a chip file")
    lint.add_argument("chip", metavar="FILE", help="chip file, or the name of a built-in one")
    lint.set_defaults(function=_lint)
    schema = command("schema", "print the JSON Schema of chip files, for editors")
    schema.set_defaults(function=_schema)
    return parser


def _chip_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", metavar="NAME", help="variant of the chip, by device name")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", dest="overrides",
        help="override a chip parameter, e.g. memories.hbm.read_bandwidth='4.8 TB/s'; may be given several times",
    )  # fmt: skip


def _workload_options(
    parser: argparse.ArgumentParser,
    *,
    model: str = DEFAULT_MODEL,
    window: str | None = DEFAULT_WINDOW,
    call: str = "8k",
    ttt: str = "default",
) -> None:
    parser.add_argument(
        "--model", default=model, help="built-in model or a Hugging Face config.json (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk", metavar="TOKENS", help="tokens per weight update (default: that of the TTT settings)"
    )
    parser.add_argument(
        "--window",
        default=window,
        metavar="TOKENS",
        help=f"window of windowed methods (default: {window or 'that of the method'})",
    )
    parser.add_argument("--dtype", help="operands and activations (default: bf16, or the chip's widest)")
    parser.add_argument("--kv-dtype", metavar="DTYPE", help="stored keys and values (default: that of the method)")
    parser.add_argument(
        "--call", default=call, metavar="TOKENS", help="new tokens per prefill call (default: %(default)s)"
    )
    parser.add_argument("--ttt", default=ttt, metavar="PRESET|FILE", help="TTT settings (default: %(default)s)")
    parser.add_argument("--carry", help="official, ring, keep_z or online")
    parser.add_argument("--weight-write", help="official, fused, resident, master or tile_wise")


# --- commands
# -------------------------------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    chip = _chip(args)
    if args.trace is not None:
        return _replay(args, chip)
    from ttt_sim.engine import check_engine
    from ttt_sim.model_config import load_model
    from ttt_sim.report.folder import check_out

    model, ttt, methods = load_model(args.model), _ttt(args), _words("--method", args.method)
    window = _tokens("--window", args.window)
    dtype = _check_workload(args, model, methods, window, ttt, chip)
    check_engine(args.engine)
    contexts, batches = _token_list("--context", args.context), _counts("--batch", args.batch)
    call_tokens = _tokens("--call", args.call)
    detail = _at_least("--detail", args.detail, 16)
    workers = None if args.workers is None else _at_least("--workers", args.workers, 1)
    out = Path(args.out) if args.out else Path("reports") / chip.name
    check_out(out)
    from ttt_sim.experiment import Experiment, run_experiment
    from ttt_sim.grid import method_on, progress_bar
    from ttt_sim.model import ONE_CHIP
    from ttt_sim.report.build import build
    from ttt_sim.report.terminal import print_summary
    from ttt_sim.system import arrange, least_system

    sizes = {name: getattr(args, name) for name in ("chips", "tp", "pp", "cp")}
    if any(size is not None for size in sizes.values()):
        try:
            parallel = arrange(model, **sizes)
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None
    else:
        settings = [
            method_on(chip, name, window_tokens=window, kv_dtype=args.kv_dtype, ttt=ttt, dtype=dtype)
            for name in methods
        ]
        least = least_system(
            chip, model, settings, context_tokens=min(contexts) + ttt.chunk_tokens, batch=min(batches),
            rows=min(*contexts, call_tokens), dtype=dtype,
        )  # fmt: skip
        parallel = least or ONE_CHIP
    experiment = Experiment(
        chip=chip,
        model=model,
        methods=methods,
        contexts=contexts,
        batches=batches,
        ttt=ttt,
        window=window,
        dtype=dtype,
        kv_dtype=args.kv_dtype,
        call_tokens=call_tokens,
        engine=args.engine,
        detail=detail,
        overlap=not args.no_overlap,
        sensitivity=args.sensitivity,
        workers=workers,
        parallel=parallel,
    )
    data = run_experiment(experiment, command=_command_line(), version=__version__, progress=progress_bar)
    build(data, out, workers=args.workers)
    print_summary(data, out)
    return 0


def _replay(args: argparse.Namespace, chip: Chip) -> int:
    usual = vars(_parser().parse_args(["run", args.chip]))
    for name, value in vars(args).items():
        if name not in REPLAY_OPTIONS and value != usual[name]:
            raise ConfigError(f"--{name.replace('_', '-')}: does not apply to a saved trace")
    from ttt_sim.engine import check_engine
    from ttt_sim.report.folder import check_out
    from ttt_sim.trace_io import load

    check_engine(args.engine)
    detail = _at_least("--detail", args.detail, 16)
    trace = load(Path(args.trace))
    if args.out:
        check_out(Path(args.out))
    from ttt_sim.report.replay import print_replay, write_replay
    from ttt_sim.simulation import simulate_trace

    result = simulate_trace(chip, trace, engine=args.engine, detail=detail, overlap=not args.no_overlap)
    print_replay(result)
    if args.out:
        write_replay(result, Path(args.out), command=_command_line(), version=__version__)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from ttt_sim.model_config import load_model
    from ttt_sim.report.folder import check_out
    from ttt_sim.workload import find_method

    model, ttt, methods = load_model(args.model), _ttt(args), _words("--method", args.method)
    window = _tokens("--window", args.window)
    if args.dtype is not None:
        _check_dtype(args.dtype)
    for name in methods:
        _check_phases(name, ("prefill", "decode"))
        _check_method(find_method(name).settings(window, args.kv_dtype, ttt), model)
    contexts, batches = _token_list("--context", args.context), _counts("--batch", args.batch)
    for option, values in (("--context", contexts), ("--batch", batches)):
        if len(values) > 1:
            raise ConfigError(f"{option}: chips are compared at one value, and {len(values)} are given")
    call_tokens = _tokens("--call", args.call)
    workers = None if args.workers is None else _at_least("--workers", args.workers, 1)
    out = Path(args.out)
    check_out(out)
    from ttt_sim.comparison import Comparison, choose_chips, compare

    chosen = choose_chips(args.chips)
    from ttt_sim.grid import progress_bar
    from ttt_sim.report.compare import print_compared, write_compared

    settings = Comparison(
        chips=chosen.chips,
        model=model,
        methods=methods,
        context=contexts[0],
        batch=batches[0],
        ttt=ttt,
        window=window,
        dtype=args.dtype,
        kv_dtype=args.kv_dtype,
        call_tokens=call_tokens,
        workers=workers,
    )
    data = compare(settings, left_out=chosen.left_out, progress=progress_bar)
    write_compared(data, out, command=_command_line(), version=__version__, workers=workers)
    print_compared(data, out)
    return 0


def _approaches(args: argparse.Namespace) -> int:
    from ttt_sim.approaches import Approaches, methods_of
    from ttt_sim.grid import progress_bar
    from ttt_sim.model_config import load_model
    from ttt_sim.report.folder import check_out

    chip, model, ttt = _chip(args), load_model(args.model), _ttt(args)
    try:
        methods = methods_of(None if args.method is None else _words("--method", args.method))
    except ConfigError as error:
        raise ConfigError(f"--method: {error}") from None
    window = None if args.window is None else _tokens("--window", args.window)
    contexts = _token_list("--context", args.context)
    if len(contexts) > 1:
        raise ConfigError(f"--context: approaches are compared at one value, and {len(contexts)} are given")
    workers = None if args.workers is None else _at_least("--workers", args.workers, 1)
    options = _method_options(args.option, methods)
    dtype = _check_workload(args, model, methods, window, ttt, chip, phases=("ask", "decode"))
    out = Path(args.out or f"reports/{chip.name}-approaches")
    settings = Approaches(
        chip=chip, model=model, methods=methods, context=contexts[0], question=_tokens("--question", args.question),
        answer=_tokens("--answer", args.answer), batch=_at_least("--batch", args.batch, 1), ttt=ttt, window=window,
        dtype=dtype, kv_dtype=args.kv_dtype, call_tokens=_tokens("--call", args.call), options=options, workers=workers,
    )  # fmt: skip
    check_out(out)
    from ttt_sim.approaches import approach
    from ttt_sim.report.approaches import print_approached, write_approached

    data = approach(settings, progress=progress_bar)
    write_approached(data, out, command=_command_line(), version=__version__, workers=workers)
    print_approached(data, out)
    return 0


def _claims(args: argparse.Namespace) -> int:
    from ttt_sim.claims import judge_claims
    from ttt_sim.grid import progress_bar
    from ttt_sim.report.claims import print_claims, write_claims

    workers = None if args.workers is None else _at_least("--workers", args.workers, 1)
    names = None if args.claim is None else _words("--claim", args.claim)
    out = Path(args.out)
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder, expected a file")
    try:
        judged = judge_claims(names, workers=workers, progress=progress_bar)
    except ConfigError as error:
        raise ConfigError(f"--claim: {error}") from None
    write_claims(judged, out, command=_command_line(), version=__version__)
    print_claims(judged, out)
    return 0


def _lifecycle(args: argparse.Namespace) -> int:
    from ttt_sim.lifecycle import Lifecycle
    from ttt_sim.model_config import load_model
    from ttt_sim.report.folder import check_out

    chip, model, ttt = _chip(args), load_model(args.model), _ttt(args)
    window, contexts = _tokens("--window", args.window), _token_list("--context", args.context)
    if len(contexts) > 1:
        raise ConfigError(f"--context: one value is simulated, and {len(contexts)} are given")
    dtype = _check_workload(args, model, [args.method], window, ttt, chip)
    workers = None if args.workers is None else _at_least("--workers", args.workers, 1)
    call_tokens = _tokens("--call", args.call)
    from ttt_sim.system import arrange

    sizes = {name: getattr(args, name) for name in ("chips", "tp", "pp")}
    try:
        parallel = arrange(model, **sizes) if any(size is not None for size in sizes.values()) else None
        settings = Lifecycle(
            chip=chip, model=model, method=args.method, ttt=ttt, window=window, context=contexts[0], batch=args.batch,
            dtype=dtype, kv_dtype=args.kv_dtype, beams=args.beams, draft=args.draft, hash_function=args.hash,
            call_tokens=call_tokens, workers=workers, parallel=parallel,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    out = Path(args.out or f"reports/{chip.name}-lifecycle")
    check_out(out)
    from ttt_sim.grid import progress_bar
    from ttt_sim.lifecycle import run_lifecycle
    from ttt_sim.report.lifecycle import print_lifecycle, write_lifecycle

    data = run_lifecycle(settings, progress=progress_bar)
    write_lifecycle(data, out, command=_command_line(), version=__version__)
    print_lifecycle(data, out)
    return 0


def _method_options(texts: Sequence[str], methods: Sequence[str]) -> dict[str, dict[str, str]]:
    """``METHOD.NAME=VALUE`` by method, each read once to see that it can be."""
    from ttt_sim.workload import find_method
    from ttt_sim.workload.method import set_options

    found: dict[str, dict[str, str]] = {}
    for text in texts:
        path, sign, value = text.partition("=")
        method, dot, name = path.strip().partition(".")
        if not sign or not dot or not name or not value.strip():
            raise ConfigError(f"--option: {text!r} is not of the form METHOD.NAME=VALUE, e.g. fine_tuning.epochs=3")
        try:
            settings = find_method(method).settings(None, None, None)
            if method not in methods:
                raise ConfigError(f"method {method} is not one of those compared")
            if name in found.setdefault(method, {}):
                raise ConfigError(f"{path.strip()} is given twice")
            found[method][name] = value.strip()
            set_options(settings, found[method])
        except ConfigError as error:
            raise ConfigError(f"--option: {error}") from None
    return found


def _trace(args: argparse.Namespace) -> int:
    from ttt_sim.model import Scenario
    from ttt_sim.model_config import load_model
    from ttt_sim.trace_io import save
    from ttt_sim.workload import build_trace, find_method

    tokens, batch = _tokens("--context", args.context), _at_least("--batch", args.batch, 1)
    method = find_method(args.method).settings(_tokens("--window", args.window), args.kv_dtype, _ttt(args))
    dtype, known = args.dtype or "bf16", find_method(args.method).phases
    if args.phase not in known:
        raise ConfigError(
            f"--phase: {args.phase!r} is not one that {args.method} has: {', '.join(known)}"
            f"{did_you_mean(args.phase, known)}"
        )
    if args.phase == "decode":
        steps = _at_least("--steps", args.steps, 1)
        scenario = Scenario.decode(range(tokens, tokens + steps), batch=batch, dtype=dtype)
    elif args.phase == "ask":
        scenario = Scenario.ask(tokens, _tokens("--question", args.question), batch=batch, dtype=dtype)
    elif args.phase == "train":
        scenario = Scenario.train(tokens, batch=batch, dtype=dtype)
    else:
        scenario = Scenario.prefill(tokens, batch=batch, dtype=dtype, call_tokens=_tokens("--call", args.call))
        scenario = replace(scenario, task="index" if args.phase == "index" else "infer")
    trace = build_trace(load_model(args.model), method, scenario)
    save(trace, Path(args.out))
    print(f"{args.out}: {trace.n_ops} ops, {len(trace.tensors)} tensors")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from ttt_sim.engine import check_engine
    from ttt_sim.model_config import load_model
    from ttt_sim.workload import CONTEXT_METHODS

    chip, model, ttt = _chip(args), load_model(args.model), _ttt(args)
    methods = CONTEXT_METHODS if args.method is None else _words("--method", args.method)
    window = _tokens("--window", args.window)
    dtype = _check_workload(args, model, methods, window, ttt, chip)
    check_engine(args.engine)
    prefill, call = _tokens("--prefill", args.prefill), _tokens("--call", args.call)
    decode, batch = _at_least("--decode", args.decode, 0), _at_least("--batch", args.batch, 1)
    seed, detail = _at_least("--seed", args.seed, 0), _at_least("--detail", args.detail, 16)
    from ttt_sim.grid import method_on
    from ttt_sim.replay.describe import describe, heading
    from ttt_sim.replay.verify import Plan, verify

    passed = True
    for i, name in enumerate(methods):
        plan = Plan(
            chip=chip,
            model=model,
            method=method_on(chip, name, window_tokens=window, kv_dtype=args.kv_dtype, ttt=ttt, dtype=dtype),
            prefill_tokens=prefill,
            call_tokens=call,
            decode_tokens=decode,
            batch=batch,
            dtype=dtype,
            seed=seed,
            accumulate=args.accumulate,
            engine=args.engine,
            detail=detail,
            overlap=not args.no_overlap,
        )
        verdict = verify(plan)
        print(f"{heading(plan)}\n{describe(verdict)}" if i == 0 else describe(verdict), flush=True)
        passed &= verdict.passed
    return 0 if passed else EXIT_FINDINGS


def _drift(args: argparse.Namespace) -> int:
    from ttt_sim.drift import DriftSettings, parse_clips, parse_formats, run_drift
    from ttt_sim.report.folder import check_out

    try:
        settings = DriftSettings(
            tokens=_tokens("tokens", args.tokens),
            width=args.width,
            ff=args.ff,
            chunk=_tokens("chunk", args.chunk),
            rate=args.rate,
            clips=parse_clips(args.clip, args.width, args.ff),
            formats=parse_formats(args.formats),
            seed=args.seed,
        )
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    out = Path(args.out)
    check_out(out)
    from ttt_sim.grid import progress_bar
    from ttt_sim.report.drift import print_drift, write_drift

    drift = run_drift(settings, progress=progress_bar)
    write_drift(drift, out, command=_command_line(), version=__version__)
    print_drift(drift, out)
    return 0


def _serve(args: argparse.Namespace) -> int:
    from ttt_sim.model_config import load_model
    from ttt_sim.report.folder import check_out

    chip, model, ttt = _chip(args), load_model(args.model), _ttt(args)
    methods, window = _words("--method", args.method), _tokens("--window", args.window)
    dtype = _check_workload(args, model, methods, window, ttt, chip)
    out = Path(args.out or f"reports/{chip.name}-serving")
    check_out(out)
    from ttt_sim.serving.requests import read_requests
    from ttt_sim.serving.serve import Serving, Stream, serve
    from ttt_sim.system import arrange

    given = {n: v for n in STREAM_OPTIONS if (v := getattr(args, n)) is not None}
    stream: Any
    if args.requests is not None:
        if given:
            raise ConfigError(f"--{next(iter(given))}: does not apply to requests of a file")
        stream = read_requests(Path(args.requests))
    else:
        given |= {name: _tokens(f"--{name}", given[name]) for name in ("prompt", "output") if name in given}
        if "rate" in given:
            given["rate_per_s"] = given.pop("rate")
        stream = Stream(**given)
    try:
        if args.tp is not None:
            arrange(model, tp=args.tp)
        settings = Serving(
            chip=chip, model=model, methods=methods, stream=stream, ttt=ttt, window=window, dtype=dtype,
            kv_dtype=args.kv_dtype, call_tokens=_tokens("call", args.call), most_sequences=args.batch,
            policy=args.policy, tp=args.tp,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(f"--{error}") from None
    run = serve(settings)
    from ttt_sim.report.serving import print_served, write_served

    write_served(run, out, command=_command_line(), version=__version__)
    print_served(run, out)
    return 0


def _predict(args: argparse.Namespace) -> int:
    from ttt_sim.report.predictions import predict_file

    auto = args.chip == "auto"
    if auto and (args.variant or args.overrides):
        raise ConfigError("--variant and --set need a chip; auto chooses chip and variant by the device of each row")
    chip = None if auto else _chip(args)
    return predict_file(chip, Path(args.rows), Path(args.out), harness=args.harness, keep_going=args.keep_going)


def _validate(args: argparse.Namespace) -> int:
    from ttt_sim.report.predictions import validate_command

    data, out = (None if path is None else Path(path) for path in (args.data, args.out))
    return validate_command(data, out, refit=args.refit)


def _explain(args: argparse.Namespace) -> int:
    from ttt_sim.report.predictions import explain_command

    numbers = {name: getattr(args, name) for name in SHAPE_OPTIONS}
    return explain_command(_chip(args), args.op, args.dtype, numbers, args.harness)


def _calibrate(args: argparse.Namespace) -> int:
    from ttt_sim.report.predictions import calibrate_command

    return calibrate_command(args.chip, _chip(args), Path(args.rows), Path(args.out))


def _chips(_args: argparse.Namespace) -> int:
    from ttt_sim.config import chip_names, load_chip

    for name in chip_names():
        chip = load_chip(name)
        print(f"{name:20} {chip.kind:12} {chip.title}")
    return 0


def _models(_args: argparse.Namespace) -> int:
    from ttt_sim.model_config import PRESETS, load_model, model_names
    from ttt_sim.workload import METHODS

    for name in model_names():
        model = load_model(name)
        print(
            f"{name:16} {model.n_layers} layers, d_model {model.d_model}, d_ff {model.d_ff}, "
            f"{model.parameters / 1e6:,.1f} M parameters"
        )
    print("\nMethods:")
    for name, method in METHODS.items():
        print(f"  {name:14} {method.title}")
    print("\nTTT presets:", ", ".join(PRESETS))
    return 0


def _show(args: argparse.Namespace) -> int:
    from ttt_sim.show import describe
    from ttt_sim.writing import describe_writing

    chip = _chip(args)
    print(describe(chip, {"Writing weights": describe_writing(chip)}))
    return 0


def _lint(args: argparse.Namespace) -> int:
    from ttt_sim.lint import lint_file

    findings = lint_file(args.chip)
    for finding in findings:
        print(f"{args.chip}:{finding.line}: {finding.severity}: {finding.path}: {finding.message}")
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{args.chip}: {errors} errors, {len(findings) - errors} hints")
    return EXIT_FINDINGS if errors else 0


def _schema(_args: argparse.Namespace) -> int:
    import json

    from ttt_sim.config import chip_json_schema

    print(json.dumps(chip_json_schema(), indent=2))
    return 0


# --- values of options
# -----------------------------------------------------------------------------------------------------


def _chip(args: argparse.Namespace) -> Chip:
    from ttt_sim.config import load_chip

    overrides: dict[str, str | float | int] = {}
    for text in args.overrides:
        path, sign, value = text.partition("=")
        if not sign or not path.strip() or not value.strip():
            raise ConfigError(
                f"--set: {text!r} is not of the form PATH=VALUE, e.g. memories.hbm.read_bandwidth='4.8 TB/s'"
            )
        if path.strip() in overrides:
            raise ConfigError(f"--set: {path.strip()} is given twice")
        overrides[path.strip()] = value.strip()
    return load_chip(args.chip, variant=args.variant, overrides=overrides)


def _ttt(args: argparse.Namespace) -> TTTSettings:
    from ttt_sim.model_config import load_ttt

    overrides: dict[str, object] = {}
    if args.chunk is not None:
        overrides["chunk_tokens"] = _tokens("--chunk", args.chunk)
    if args.carry is not None:
        overrides["carry"] = args.carry
    if args.weight_write is not None:
        overrides["weight_write"] = args.weight_write
    return load_ttt(args.ttt, **overrides)


def _check_workload(
    args: argparse.Namespace,
    model: Model,
    methods: Sequence[str],
    window: int | None,
    ttt: TTTSettings,
    chip: Chip,
    *,
    phases: Sequence[str] = ("prefill", "decode"),
) -> str:
    """Refuse what no simulation could use, before any starts. Returns the format of operands and activations."""
    from ttt_sim.grid import method_on
    from ttt_sim.lower.tiles import product_rate

    dtype: str = args.dtype or chip.default_dtype
    _check_dtype(dtype)
    if args.dtype is not None and chip.has_unit("matrix"):
        product_rate(chip, dtype)
    for name in methods:
        _check_phases(name, phases)
        settings = method_on(chip, name, window_tokens=window, kv_dtype=args.kv_dtype, ttt=ttt, dtype=dtype)
        _check_method(settings, model)
    return dtype


def _check_phases(name: str, wanted: Sequence[str]) -> None:
    """Refuse a method without one of the ``wanted`` phases."""
    from ttt_sim.workload import find_method

    phases = find_method(name).phases
    lacking = [phase for phase in wanted if phase not in phases]
    if lacking:
        raise ConfigError(f"--method: {name} has no phase {' or '.join(lacking)}; it has {', '.join(phases)}")


def _check_dtype(dtype: str) -> None:
    from ttt_sim.dtypes import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"--dtype: {dtype!r} is not one of {', '.join(DTYPES)}{did_you_mean(dtype, DTYPES)}")


def _check_method(settings: MethodSettings, model: Model) -> None:
    from ttt_sim.model_config import check_ttt
    from ttt_sim.workload.attention import check_kv

    check_kv(settings.kv)
    if settings.ttt is not None:
        check_ttt(settings.ttt, model)


def _words(option: str, text: str) -> tuple[str, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"{option}: {text!r} has an empty item")
    return tuple(dict.fromkeys(words))


def _tokens(option: str, text: str) -> int:
    from ttt_sim.units import parse_tokens

    try:
        return parse_tokens(text)
    except TTTSimError as error:
        raise ConfigError(f"{option}: {error}") from None


def _token_list(option: str, text: str) -> tuple[int, ...]:
    tokens = tuple(sorted({_tokens(option, word) for word in _words(option, text)}))
    if tokens[-1] > LONGEST_CONTEXT_TOKENS:
        raise ConfigError(f"{option}: {tokens[-1]} is more than {LONGEST_CONTEXT_TOKENS} tokens (16M)")
    return tokens


def _counts(option: str, text: str) -> tuple[int, ...]:
    counts = set()
    for word in _words(option, text):
        if not word.isdecimal():
            raise ConfigError(f"{option}: {word!r} is not a whole number of at least 1")
        counts.add(_at_least(option, int(word), 1))
    return tuple(sorted(counts))


def _at_least(option: str, value: int, least: int) -> int:
    if value < least:
        raise ConfigError(f"{option}: {value} must be at least {least}")
    return value


def _command_line() -> str:
    return shlex.join(["python", "-m", "ttt_sim", *sys.argv[1:]])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        args = _parser().parse_args(arguments)
        status: int = args.function(args)
        sys.stdout.flush()
        return status
    except TTTSimError as error:
        print(f"ttt_sim: error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("ttt_sim: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
