"""The command line: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import FaultError, InputError

if TYPE_CHECKING:
    from .results import Run

DTYPES = ("auto", "float32", "float16", "bfloat16")
EXAMPLES = """examples:
  refinelens sweep --documents 5,10 --examples 20 --out runs/first
  refinelens sweep --model ./my-model --task questions.jsonl.gz --documents 10 --gold-positions ends-middle
  refinelens sweep --resume runs/first
  refinelens show runs/first --top 1,5
  refinelens fit --model ./my-model --out lenses/mine
  refinelens doctor --model ./my-model
  refinelens bench --rows 416
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 1 for a fault or a benchmark that finds the op wrong or failing, 2 for input that does not fit, 130 and 143 for
    a sweep that SIGINT (Ctrl-C) and SIGTERM stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments, argv)
    except (InputError, FaultError) as error:
        _say(str(error))
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("refinelens: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe went away; pointing stdout elsewhere keeps the exit quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        _say(f"expected files that can be used, got: {error}")
        return 1


def _say(message: str) -> None:
    """One line on stderr."""
    print(f"refinelens: {' '.join(message.split())}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    """Says in one line what does not fit."""

    def error(self, message: str):
        self.exit(2, f"refinelens: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(
        prog="refinelens",
        description="How does where the answer stands in the context change the way a language model, "
        "layer by layer, arrives at it?",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"refinelens {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_sweep(commands)
    _add_fit(commands)
    show = commands.add_parser("show", help="print the table of a run again")
    show.add_argument("folder", metavar="RUN", help="folder of a run")
    show.add_argument("--top", metavar="K[,K]", help="the table at other thresholds, from the ranks the run has")
    show.set_defaults(run=_show)
    _add_export(commands)
    _add_doctor(commands)
    _add_bench(commands)
    return parser


def _add_doctor(commands) -> None:
    doctor = commands.add_parser("doctor", help="say which backend would be used, and what is found in a model")
    add = doctor.add_argument
    add("--model", metavar="NAME", help="find the parts of its lens and prove them, as sweep does (default: no model)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the model (default: as in sweep)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model (default: as in sweep)")
    doctor.set_defaults(run=_doctor)


def _add_sweep(commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="move the gold document through the context and read every layer",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = sweep.add_argument
    add("--model", default="smollm2", help="smollm2, a hub name, a folder or a .gguf file (default: %(default)s)")
    add("--task", default="builtin", help="builtin, nq ($REFINELENS_NQ) or FILE.jsonl[.gz] (default: %(default)s)")
    add("--documents", default="5,10", help="context sizes, the gold document included (default: %(default)s)")
    add("--gold-positions", default="all", help="all, ends-middle or 0-based positions 0,4,9 (default: %(default)s)")
    add("--examples", type=int, metavar="N", help="questions drawn by the seed (default: all)")
    add("--target", choices=("answer", "prediction"), default="answer", help="whose rank (default: %(default)s)")
    add("--answer-tokens", choices=("first", "all"), default="first", help="tokens in tables (default: %(default)s)")
    add("--top", default="1", metavar="K[,K]", help="correct means rank 1 to K, for each K (default: %(default)s)")
    add("--lens", default="plain", metavar="LENS[,LENS]", help="plain, or folders of lenses (default: %(default)s)")
    add(
        "--template",
        metavar="FILE",
        help="text with {documents} and {question}, less one last newline (default: Lost in the Middle's)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA if there is one)")
    add(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="(default: float32 on a CPU, the checkpoint's own on CUDA)",
    )
    add("--batch-size", default="auto", metavar="auto|N", help="contexts per forward pass (default: %(default)s)")
    add(
        "--reuse-prefix",
        choices=("auto", "on", "off"),
        default="auto",
        help="run documents that contexts share once; auto: on a CPU in float32, if proven (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of questions, distractors and intervals (default: %(default)s)")
    add("--out", metavar="FOLDER", help="folder of the run (default: runs/MODEL-TASK-TIME)")
    add("--overwrite", action="store_true", help="replace a run that is there")
    add("--resume", metavar="RUN", help="go on with a run that was interrupted, with its own options and no other")
    sweep.set_defaults(run=_sweep)


def _add_fit(commands) -> None:
    fit = commands.add_parser(
        "fit",
        help="fit a lens that sees what the plain logit lens cannot",
        epilog="example:\n  refinelens fit --model smollm2 --tokens 20000 --out lenses/smollm2\n"
        "  refinelens sweep --model smollm2 --lens plain,lenses/smollm2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = fit.add_argument
    add("--model", default="smollm2", help="as in sweep (default: %(default)s)")
    add(
        "--text", default="builtin", help="builtin (Python's own reference), text or .jsonl[.gz] (default: %(default)s)"
    )
    add(
        "--tokens", type=int, default=200_000, metavar="N", help="read at most, a fifth held out (default: %(default)s)"
    )
    add(
        "--objective",
        choices=("linear", "kl"),
        default="linear",
        help="linear: ridge regression in closed form; kl: trained from there (default: %(default)s)",
    )
    add("--steps", type=int, default=150, metavar="N", help="of training, for kl (default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="(default: float32 on a CPU, the checkpoint's own on CUDA)")
    add("--seed", type=int, default=0, help="of the training (default: %(default)s)")
    add("--out", required=True, metavar="LENS", help="folder of the lens; a fit that was stopped there goes on")
    add("--overwrite", action="store_true", help="replace a lens or a stopped fit that is there")
    fit.set_defaults(run=_fit)


def _add_export(commands) -> None:
    export = commands.add_parser("export", help="write a run's predictions for other programs, a row for every layer")
    export.add_argument("folder", metavar="RUN", help="folder of a run")
    export.add_argument("--format", choices=("csv", "jsonl", "parquet"), default="csv", help="(default: %(default)s)")
    export.add_argument("--out", required=True, metavar="FILE", help="the file to write")
    export.set_defaults(run=_export)


def _add_bench(commands) -> None:
    bench = commands.add_parser("bench", help="measure the op here, beside what people use instead")
    add = bench.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA if there is one)")
    add("--rows", type=int, metavar="N", help="layers x positions (default: 416, on CUDA 13312)")
    add("--d-model", type=int, metavar="N", help="(default: 768)")
    add("--vocab", type=int, metavar="N", help="(default: 50257)")
    add("--model", metavar="NAME", help="its states, norm and unembedding, as in sweep (default: random numbers)")
    add("--dtype", choices=DTYPES, default="auto", help="(default: float32, on CUDA bfloat16)")
    add("--peers", default="all", help="all, none or names such as compiled,row-chunks (default: %(default)s)")
    add("--rounds", type=int, default=7, metavar="N", help="how often all take turns (default: %(default)s)")
    add("--threads", type=int, default=1, metavar="N", help="on a CPU; 1 is timed by CPU time (default: %(default)s)")
    add("--json", metavar="FILE", help="write every number there too")
    bench.set_defaults(run=_bench)


def _sweep(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.resume is not None:
        return _resume(arguments.resume, argv)
    from .options import SweepOptions

    out = arguments.out or _default_out(arguments.model, arguments.task)
    values = {field.name: getattr(arguments, field.name) for field in fields(SweepOptions)}
    values["documents"] = tuple(sorted(_parse_numbers("--documents", arguments.documents, "sizes such as 5,10")))
    values["top"] = _parse_numbers("--top", arguments.top, "numbers such as 1,5,10")
    options = SweepOptions(**values | {"lens": tuple(arguments.lens.split(","))})
    _calm_libraries()
    from .sweep import run_sweep

    return _watch(partial(run_sweep, options, out, arguments.overwrite, ["refinelens", *argv]))


def _resume(path: str, argv: list[str]) -> int:
    others = [word for word in argv[1:] if word.startswith("--") and not "--resume".startswith(word.split("=")[0])]
    if others:
        raise InputError(f"--resume: expected no other option, because the run has its own, got {others[0]}")
    from .resume import Unfinished

    if Unfinished.read(path).is_finished:
        from rich.console import Console

        from .derived import show_run
        from .results import open_run

        print(f"{path}: finished already\n")
        show_run(open_run(path), Console())
        return 0
    _calm_libraries()
    from .sweep import resume_sweep

    return _watch(partial(resume_sweep, path, ["refinelens", *argv], warn=_say))


def _watch(sweep: Callable[..., Run]) -> int:
    """Run a sweep with its progress on the terminal, then print its table."""
    from rich.console import Console

    from .interrupt import SweepInterrupted
    from .progress import sweep_progress
    from .table import print_table

    code, summary = 0, []
    try:
        with sweep_progress(Console(stderr=True)) as report:
            run = sweep(report=report, summary=summary.append)
    except SweepInterrupted as stop:
        code, run = 128 + stop.signum, stop.run
        kept = "no question was finished and nothing was written"
        if run:
            kept = f"the finished questions stay readable, refinelens sweep --resume {run.path} goes on with them"
        _say(f"interrupted; {kept}")
    if summary:  # a second signal leaves no time for it
        print_table(Console(), summary[-1])
        print(f"\n{run.path}: {', '.join(sorted(p.name for p in run.path.iterdir()))}")
    return code


def _fit(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .fit.options import FitOptions
    from .progress import fit_progress

    options = FitOptions(**{field.name: getattr(arguments, field.name) for field in fields(FitOptions)})
    _calm_libraries()
    from .fit.report import print_quality
    from .fit.session import fit_lens

    with fit_progress(Console(stderr=True)) as report:
        fitted = fit_lens(options, arguments.out, arguments.overwrite, ["refinelens", *argv], report)
    print_quality(Console(), fitted.manifest)
    print(f"\n{arguments.out}: {', '.join(sorted(p.name for p in fitted.path.iterdir()))}")
    return 0


def _calm_libraries() -> None:
    """Before torch and Transformers are imported: no spinning threads, no bars or retries between our lines."""
    # A spinning OpenMP thread costs milliseconds per parallel region as soon as another process wants its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def _show(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .derived import show_run
    from .results import open_run

    top = None if arguments.top is None else _parse_numbers("--top", arguments.top, "numbers such as 1,5,10")
    show_run(open_run(arguments.folder), Console(), top)
    return 0


def _export(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .export import export_run
    from .results import open_run

    rows = export_run(open_run(arguments.folder), Path(arguments.out), arguments.format)
    print(f"{arguments.out}: {rows} rows")
    return 0


def _doctor(arguments: argparse.Namespace, argv: list[str]) -> int:
    _calm_libraries()
    from .doctor import findings

    for name, value in findings():
        print(f"{name:<16} {value}")
    if arguments.model is not None:
        from .describe import model_findings
        from .models import load_model

        for name, value in model_findings(load_model(arguments.model, arguments.device, arguments.dtype)):
            print(f"{name:<16} {value}", flush=True)
    return 0


def _bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .bench.options import BenchOptions

    options = BenchOptions(**{field.name: getattr(arguments, field.name) for field in fields(BenchOptions)})
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that is there, got {arguments.json}")
    _calm_libraries()
    from .bench.session import run_bench
    from .bench.table import text_table

    with Console(stderr=True).status("loading torch") as status:
        report = run_bench(options, status.update)
    print(text_table(report))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return 1 if report.failed else 0


def _parse_numbers(option: str, text: str, expected: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise InputError(f"{option}: expected {expected}, got {text!r}") from None


def _default_out(model: str, task: str) -> str:
    words = [re.sub(r"(\.jsonl)?(\.gz)?(\.gguf)?$", "", Path(name).name) for name in (model, task)]
    return str(Path("runs") / f"{'-'.join(words)}-{datetime.now():%Y%m%d-%H%M%S}")


if __name__ == "__main__":
    sys.exit(main())
