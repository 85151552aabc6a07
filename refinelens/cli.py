"""The command line: parse, call, print. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config, view_config
from .errors import FaultError, InputError, resume_call
from .machine import calm_libraries
from .options import check_idle, check_utf8
from .parser import build_parser, check_values, config_of, known_options, option_of

if TYPE_CHECKING:
    from rich.console import Console

    from .store.results import Run

MARK = re.compile(r"``(?:(\w+)\()?(\w+)(?:='?(.*?)'?)?\)?``")  # as `refinelens.errors` has it


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
        calm_libraries()
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
    print(f"refinelens: {' '.join(in_options(message).split())}", file=sys.stderr)


def in_options(message: str) -> str:
    """A message of the library with the options of the command line in place of its parameters."""

    def option(mark: re.Match) -> str:
        command, name, value = mark.groups()
        if option_of(name) not in known_options():
            return mark.group()
        words = (command and f"refinelens {command}", option_of(name), value if value != "True" else None)
        return " ".join(filter(None, words))

    return MARK.sub(option, message)


def _sweep(arguments: argparse.Namespace, argv: list[str]) -> int:
    if arguments.resume is not None:
        return _resume(arguments, argv)
    options = config_of(arguments, config.SweepConfig)
    from .sweeping.sweep import run_sweep

    with _folder_of_its_own(arguments.out, options) as out:
        given = (options, out, arguments.overwrite, ["refinelens", *argv], config_of(arguments, config.EngineConfig))
        return _watch(partial(run_sweep, *given, shard=arguments.shard), not arguments.no_report)


def _prompts(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, config.SweepConfig)
    from .sweeping.prompt_file import write_prompts

    print(write_prompts(options, arguments.out))
    return 0


def _resume(arguments: argparse.Namespace, argv: list[str]) -> int:
    path, words = arguments.resume, [word.split("=")[0] for word in argv[1:] if word.startswith("--")]
    engine = [option_of(field.name) for field in fields(config.EngineConfig)]
    others = [word for word in words if not any(o.startswith(word) for o in ("--resume", *engine, "--no-report"))]
    if others:
        allowed = ", ".join(engine)
        raise InputError(f"--resume: expected no other option but {allowed}: the run has its own, got {others[0]}")
    from .store.results import PAGE, open_run

    run = open_run(path)
    if run.is_finished:
        from .report.tables import show_run

        print(f"{path}: finished already\n")
        show_run(run, _console(), in_words=in_options)
        if not arguments.no_report and not (run.path / PAGE).exists():  # killed while it was written
            _write_page(run)
        return 0
    from .sweeping.sweep import resume_sweep

    sweep = partial(resume_sweep, path, argv=["refinelens", *argv], engine=config_of(arguments, config.EngineConfig))
    return _watch(sweep, not arguments.no_report)


def _watch(sweep: Callable[..., Run], page: bool) -> int:
    """Run a sweep with its progress on the terminal, then print its table and write its page."""
    from .report.tables import print_table

    def how_to_resume(run: Run | None) -> str:
        if run is None:
            return "no question was finished and nothing was written"
        return f"the finished questions stay readable, {resume_call(run.path)} goes on with them"

    summary: list = []
    run, code = _work(partial(sweep, summary=summary.append, warn=_say), how_to_resume)
    if summary:  # a second signal leaves no time for it
        print_table(_console(), summary[-1], in_options)
        if page and code == 0:
            _write_page(run)
        _list_files(run.path)
    return code


def _write_page(run: Run) -> None:
    """The page of a run that is finished; without it the run is whole all the same."""
    from .run_page import write_run_page

    try:
        print(f"\n{write_run_page(run)}")
    except (InputError, FaultError) as error:
        _say(f"no page: {error}")


def _layers(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, config.LayersConfig)
    from .layers.analysis import how_to_resume, run_layers
    from .report.tables import print_layers

    given = (arguments.folder, options, arguments.out, arguments.overwrite, ["refinelens", *argv])
    done, code = _work(partial(run_layers, *given, warn=_say), lambda _: how_to_resume(arguments.overwrite))
    if code == 0:
        folder, found = done
        print_layers(_console(), found)
        _list_files(folder.path)
    return code


def _fit(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, config.FitConfig)
    config.check_objective(arguments, options.objective)
    from .fitting.fit import HOW_TO_RESUME, fit_lens
    from .report.quality import print_quality

    given = (options, arguments.out, arguments.overwrite, ["refinelens", *argv])
    fitted, code = _work(partial(fit_lens, *given), lambda _: HOW_TO_RESUME)
    if code == 0:
        print_quality(_console(), fitted.manifest)
        _list_files(arguments.out)
    return code


def _merge_lenses(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .fitting.merge import merge_lenses

    print(merge_lenses(arguments.folders, arguments.out, arguments.overwrite, ["refinelens", *argv]))
    _list_files(arguments.out)
    return 0


def _merge(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .report.tables import show_run
    from .sweeping.shards import merge_runs

    run = merge_runs(arguments.folders, arguments.out, arguments.overwrite, ["refinelens", *argv], _say)
    show_run(run, _console(), in_words=in_options)
    if not arguments.no_report:
        _write_page(run)
    _list_files(run.path)
    return 0


def _recipe(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, config.RecipeConfig)
    from .claims.conduct import run_recipe
    from .report.claim import claim_lines
    from .run_page import write_report_page
    from .store.results import PAGE

    name = arguments.recipe
    out = Path(arguments.out or f"runs/{Path(name).stem}-{Path(options.model).stem}")
    own = {"model": options.model, **options.loading}
    words = {option_of(option): value for option, value in own.items() if value not in ("auto", None, False)}
    given = " ".join(option if value is True else f"{option} {value}" for option, value in words.items())
    again = f"refinelens recipe {name} {given} --out {out} --resume goes on with what is finished"

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    asked = (options, name, out, arguments.resume, ["refinelens", *argv], config_of(arguments, config.EngineConfig))
    done, code = _work(partial(run_recipe, *asked, say=say), lambda _: again)
    if code == 0:
        claim, run = done
        print("\n".join(claim_lines(claim)))
        print(f"\n{out / PAGE}: {write_report_page([run], out / PAGE, claim)}")
        _list_files(out)
    return code


def _recipes(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .claims.recipe import built_in, load_recipe

    for name in built_in():
        recipe = load_recipe(name)
        print(f"{name:<20} {recipe.claim} ({recipe.source})")
    return 0


def _work(work: Callable[..., Any], how_to_resume: Callable[[Any], str]) -> tuple[Any, int]:
    """What some work gives and 0, its progress on the terminal; or what a signal left of it, and its exit code."""
    from .progress import progress_bar
    from .store.process import Interrupted

    try:
        with progress_bar() as progress:
            return work(progress=progress), 0
    except Interrupted as stop:
        _say(f"interrupted; {how_to_resume(stop.folder)}")
        return stop.folder, 128 + stop.signum


def _console() -> Console:
    from rich.console import Console

    return Console()


def _list_files(folder: str | Path) -> None:
    print(f"\n{folder}: {', '.join(sorted(path.name for path in Path(folder).iterdir()))}")


def _show(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .report.tables import show_run
    from .store.results import open_run

    options = config_of(arguments, view_config.ShowConfig)
    show_run(open_run(arguments.folder), _console(), options.top, in_options)
    return 0


def _report(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .run_page import write_report_page, write_run_page
    from .store.frames import check_new_file
    from .store.results import open_run

    runs = [open_run(folder) for folder in arguments.folders]
    if not arguments.out and len(runs) == 1:
        print(write_run_page(runs[0]))
        return 0
    out = Path(arguments.out or "report.html")
    check_new_file(out)
    print(f"{out}: {write_report_page(runs, out)}")
    return 0


def _read(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, view_config.ReadConfig)
    from .store.frames import check_new_file

    files = {kind: getattr(arguments, kind) for kind in ("html", "png", "json")}
    for kind, path in files.items():
        if path is not None:
            check_new_file(Path(path), kind)
    from .store.folder import MANIFEST
    from .store.results import open_run

    if os.path.isfile(os.path.join(arguments.text, MANIFEST)):  # False also for a text too long for a path
        run = open_run(arguments.text)
        from .read import read_context, show

        map = read_context(run, options, arguments, ["refinelens", *argv])
    elif os.path.isdir(arguments.text):
        raise InputError(f"{arguments.text}: expected a text or the folder of a run, got another folder")
    else:
        from .read import read_text, show

        map = read_text(arguments.text, options, arguments, ["refinelens", *argv])
    show(map, options, files, _console())
    return 0


def _convert(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .data.convert import convert

    print(convert(arguments.file, from_=arguments.from_, out=arguments.out))
    return 0


def _export(arguments: argparse.Namespace, argv: list[str]) -> int:
    from .store.frames import check_new_file, export_run
    from .store.results import open_run

    run, out = open_run(arguments.folder), Path(arguments.out)
    if arguments.format != "lens-json":
        names = [field.name for field in fields(view_config.WidgetConfig)]
        check_idle(arguments, names, "format='lens-json'", arguments.format)
        print(f"{out}: {export_run(run, out, arguments.format)} rows")
        return 0
    choice = config_of(arguments, view_config.WidgetConfig)
    check_new_file(out)
    from .lens_json import export_lens_json

    print(f"{out}: {export_lens_json(run, out, choice)}")
    return 0


def _drift(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, view_config.DriftConfig)
    from .store.frames import check_new_file

    for kind in ("html", "csv"):
        if getattr(arguments, kind) is not None:
            check_new_file(Path(getattr(arguments, kind)), kind)
    if arguments.html is not None and arguments.html == arguments.csv:
        raise InputError(f"--csv: expected another file than --html, got {arguments.csv}")
    from .model_drift import print_drift, run_drift
    from .progress import progress_bar

    with progress_bar() as progress:
        drift = run_drift(options, progress)
    print_drift(drift, _console())
    if arguments.html is not None:
        drift.to_html(arguments.html, ["refinelens", *argv])
    if arguments.csv is not None:
        drift.to_csv(arguments.csv)
    return 0


def _doctor(arguments: argparse.Namespace, argv: list[str]) -> int:
    options = config_of(arguments, view_config.DoctorConfig)
    from .doctor import findings

    for name, value in findings(options):
        print(f"{name:<16} {in_options(value)}", flush=True)
    return 0


def _bench(arguments: argparse.Namespace, argv: list[str]) -> int:
    from rich.console import Console

    options = config_of(arguments, view_config.BenchConfig)
    if arguments.json and not Path(arguments.json).absolute().parent.is_dir():
        raise InputError(f"--json: expected a file in a folder that is there, got {arguments.json}")
    from .bench.bench import run_bench
    from .bench.table import text_table

    with Console(stderr=True).status("loading torch") as status:
        report = run_bench(options, status.update)
    print(text_table(report))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    return 1 if report.failed else 0


@contextmanager
def _folder_of_its_own(wanted: str | None, options: config.SweepConfig) -> Iterator[str]:
    """The folder of a sweep: the one asked for, or one made here, that no other sweep of this second has."""
    if wanted:
        yield wanted
        return
    words = [re.sub(r"(\.jsonl)?(\.gz)?(\.gguf)?$", "", Path(name).name) for name in (options.model, options.task)]
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
    "prompts": _prompts,
    "fit": _fit,
    "merge": _merge,
    "merge-lenses": _merge_lenses,
    "recipe": _recipe,
    "recipes": _recipes,
    "show": _show,
    "layers": _layers,
    "read": _read,
    "report": _report,
    "convert": _convert,
    "export": _export,
    "drift": _drift,
    "doctor": _doctor,
    "bench": _bench,
}


if __name__ == "__main__":
    sys.exit(main())
