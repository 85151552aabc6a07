"""The command line: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from .config import check_utf8
from .errors import FaultError, InputError
from .parser import build_parser, check_idle, check_values, options_given

if TYPE_CHECKING:
    from .store.results import Run


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0, 1 for a fault or a benchmark that finds the op wrong or failing, 2 for input that does not fit, 130 and 143 for
    a sweep, an analysis or a fit that SIGINT (Ctrl-C) and SIGTERM stopped.
    """
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a text that the terminal's encoding lacks is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    arguments = build_parser().parse_args(argv)
    try:
        for word in argv:
            check_utf8("command line", word)
        check_values(arguments)
        return COMMANDS[arguments.command](arguments, argv)
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


def _sweep(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.resume is not None:
        return _resume(arguments, argv)
    from .config import SweepOptions, default_task, parse_documents

    arguments.task = arguments.task or default_task(arguments.model)
    values = options_given(arguments, SweepOptions)
    values["documents"] = parse_documents(arguments.documents)
    values["top"] = _parse_numbers("--top", arguments.top, "numbers such as 1,5,10")
    options = SweepOptions(**values | {"lens": tuple(arguments.lens.split(","))})
    _calm_libraries()
    from .sweeping.sweep import run_sweep

    with _folder_of_its_own(arguments) as out:
        return _watch(partial(run_sweep, options, out, arguments.overwrite, ["refinelens", *argv], arguments.workers))


def _resume(arguments: argparse.Namespace, argv: list[str]) -> int:
    path, words = arguments.resume, [word.split("=")[0] for word in argv[1:] if word.startswith("--")]
    others = [word for word in words if not any(o.startswith(word) for o in ("--resume", "--workers"))]
    if others:
        raise InputError(f"--resume: expected no other option but --workers: the run has its own, got {others[0]}")
    from .store.results import open_run

    run = open_run(path)
    if run.is_finished:
        from rich.console import Console

        from .report.tables import show_run

        print(f"{path}: finished already\n")
        show_run(run, Console())
        return 0
    _calm_libraries()
    from .sweeping.sweep import resume_sweep

    return _watch(partial(resume_sweep, path, ["refinelens", *argv], arguments.workers))


def _watch(sweep: Callable[..., Run]) -> int:
    """Run a sweep with its progress on the terminal, then print its table."""
    from rich.console import Console

    from .progress import sweep_progress
    from .report.tables import print_table
    from .store.process import Interrupted

    code, summary = 0, []
    try:
        with sweep_progress(Console(stderr=True)) as report:
            run = sweep(report=report, summary=summary.append, warn=_say)
    except Interrupted as stop:
        code, run = 128 + stop.signum, stop.folder
        kept = "no question was finished and nothing was written"
        if run:
            kept = f"the finished questions stay readable, refinelens sweep --resume {run.path} goes on with them"
        _say(f"interrupted; {kept}")
    if summary:  # a second signal leaves no time for it
        print_table(Console(), summary[-1])
        print(f"\n{run.path}: {', '.join(sorted(p.name for p in run.path.iterdir()))}")
    return code


def _layers(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .config import LayerOptions, parse_interventions

    names = parse_interventions(arguments.interventions)
    options = LayerOptions(names, arguments.at, arguments.examples, arguments.lens)
    _calm_libraries()
    from .layers.analysis import how_to_resume, run_layers
    from .progress import fit_progress
    from .report.tables import print_layers
    from .store.process import Interrupted

    given = (arguments.folder, options, arguments.out, arguments.overwrite, ["refinelens", *argv])
    try:
        with fit_progress(Console(stderr=True)) as report:
            folder, found = run_layers(*given, report, _say)
    except Interrupted as stop:
        _say(f"interrupted; {how_to_resume(arguments.overwrite)}")
        return 128 + stop.signum
    print_layers(Console(), found)
    print(f"\n{folder.path}: {', '.join(sorted(p.name for p in folder.path.iterdir()))}")
    return 0


def _fit(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .config import TRAINING, FitOptions, default_task
    from .progress import fit_progress

    arguments.text = arguments.text or default_task(arguments.model)
    values = options_given(arguments, FitOptions)
    options = FitOptions(**values)
    if options.objective != "kl":
        check_idle(values, TRAINING, "--objective kl", options.objective)
    _calm_libraries()
    from .fitting.fit import HOW_TO_RESUME, fit_lens
    from .report.tables import print_quality
    from .store.process import Interrupted

    try:
        with fit_progress(Console(stderr=True)) as report:
            fitted = fit_lens(options, arguments.out, arguments.overwrite, ["refinelens", *argv], report)
    except Interrupted as stop:
        _say(f"interrupted; {HOW_TO_RESUME}")
        return 128 + stop.signum
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

    from .report.tables import show_run
    from .store.results import open_run

    top = None if arguments.top is None else _parse_numbers("--top", arguments.top, "numbers such as 1,5,10")
    show_run(open_run(arguments.folder), Console(), top)
    return 0


def _export(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .store.frames import Choice, check_new_file, export_run
    from .store.results import open_run

    run, out = open_run(arguments.folder), Path(arguments.out)
    values = options_given(arguments, Choice)
    if arguments.format != "lens-json":
        check_idle(values, values.keys(), "--format lens-json", arguments.format)
        print(f"{out}: {export_run(run, out, arguments.format)} rows")
        return 0
    choice = Choice(**values)
    check_new_file(out)
    _calm_libraries()
    from .lens_json import export_lens_json

    print(f"{out}: {export_lens_json(run, out, choice)}")
    return 0


def _doctor(arguments: argparse.Namespace, argv: list[str]) -> int:
    _calm_libraries()
    from .doctor import findings

    for name, value in findings():
        print(f"{name:<16} {value}")
    if arguments.model is not None:
        from .doctor import model_findings
        from .model.loading import load_model

        given = (arguments.model, arguments.device, arguments.dtype, arguments.trust_remote_code)
        for name, value in model_findings(load_model(*given)):
            print(f"{name:<16} {value}", flush=True)
    return 0


def _bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    from .config import BenchOptions

    options = BenchOptions(**options_given(arguments, BenchOptions))
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that is there, got {arguments.json}")
    _calm_libraries()
    from .bench.bench import run_bench
    from .bench.table import text_table

    with Console(stderr=True).status("loading torch") as status:
        report = run_bench(options, status.update)
    print(text_table(report))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return 1 if report.failed else 0


def _parse_numbers(option: str, text: str, expected: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"{option}: expected {expected}, got {text!r}") from None


@contextmanager
def _folder_of_its_own(arguments: argparse.Namespace) -> Iterator[str]:
    """The folder of a sweep: the one asked for, or one made here, that no other sweep of this second has."""
    if arguments.out:
        yield arguments.out
        return
    names = (arguments.model, arguments.task)
    words = [re.sub(r"(\.jsonl)?(\.gz)?(\.gguf)?$", "", Path(name).name) for name in names]
    name = f"{'-'.join(words)}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in count(1):
        out = Path("runs") / (name if number == 1 else f"{name}-{number}")
        try:
            out.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            from .store.files import disk_error

            raise disk_error(out, error, begun=False) from None
    try:
        yield str(out)
    finally:
        with suppress(OSError):  # it holds something now
            out.rmdir()


COMMANDS = {
    "sweep": _sweep,
    "fit": _fit,
    "show": _show,
    "layers": _layers,
    "export": _export,
    "doctor": _doctor,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
