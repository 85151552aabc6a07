"""What the command line takes: commands, examples, and what is no option of a config.

All else is made from the fields of the configs in `refinelens.config`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import cache
from typing import TypeVar

from . import config, view_config
from .errors import InputError
from .machine import __version__
from .options import FLAG, NUMBER, Config, kind_of, options_of

EXAMPLES = """examples:
  refinelens sweep --model tiny --documents 5,10,20
  refinelens sweep --documents 5,10 --examples 20 --out runs/first
  refinelens sweep --model ./my-model --task questions.jsonl.gz --documents 10 --gold-positions ends-middle
  refinelens sweep --task kv --documents 10,50 --examples 100 --template query-aware
  refinelens sweep --task nq --documents closed-book,oracle,10 --alias best --chat
  refinelens sweep --resume runs/first
  refinelens prompts --model ./my-model --documents 5 --out prompts.jsonl
  refinelens sweep --model ./my-model --documents 5 --states states
  refinelens convert dev-v2.0.json --from squad --out squad.jsonl.gz
  refinelens show runs/first --top 1,5
  refinelens layers runs/first --interventions skip,attn --examples 10
  refinelens fit --model ./my-model --out lenses/mine
  refinelens read "The capital of France is" --html france.html
  refinelens doctor --model ./my-model
  refinelens bench --rows 416
"""


FIT_EXAMPLE = """examples:
  refinelens fit --model smollm2 --tokens 20000 --out lenses/smollm2
  refinelens sweep --model smollm2 --lens plain,lenses/smollm2
  refinelens fit --model smollm2 --objective jacobian --prompts 12 --from-layer 24 --out lenses/jacobian
"""
READ_EXAMPLES = """examples:
  refinelens read "The capital of France is"
  refinelens read "The capital of France is" --target " Paris" --html france.html
  refinelens read runs/first --question 17 --gold-position 4 --html context.html
"""
Kind = TypeVar("Kind", bound=Config)


class _Parser(argparse.ArgumentParser):
    """Says in one line what does not fit."""

    def error(self, message: str):
        self.exit(2, f"refinelens: {message}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what was not given of a config's options is not in its namespace."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="refinelens",
        description="How does where the answer stands in the context change the way a language model, "
        "layer by layer, arrives at it?",
        epilog=EXAMPLES,
        formatter_class=as_written,
    )
    parser.add_argument("--version", action="version", version=f"refinelens {__version__}")
    add_command = parser.add_subparsers(required=True, metavar="COMMAND", dest="command").add_parser

    words = {"epilog": EXAMPLES, "formatter_class": as_written}
    sweep = add_command("sweep", help="move the gold document through the context and read every layer", **words)
    _add_config(sweep, config.SweepConfig)
    _add_config(sweep, config.EngineConfig)
    add = sweep.add_argument_group("the run").add_argument
    add("--out", metavar="FOLDER", help="folder of the run (default: runs/MODEL-TASK-TIME)")
    add("--overwrite", action="store_true", help="replace a run that is there")
    add("--no-report", action="store_true", help="write no page of the run")
    add("--shard", metavar="I/N", help="one of N shards of the run, made side by side; merge makes a run of them")
    add("--resume", metavar="RUN", help="go on with a run that was interrupted, with its own options but for who asks")

    prompts = add_command(
        "prompts",
        help="write the contexts of a sweep as token ids, for another engine to run",
        description="A JSON object a line, for every context that refinelens sweep with these options would run. The "
        "model is not run, and its weights are not loaded. With --states contexts that have a file there are left out.",
    )
    _add_config(prompts, config.SweepConfig)
    prompts.add_argument("--out", required=True, metavar="FILE.jsonl[.gz]", help="the file to write, a new one")

    words = {"epilog": FIT_EXAMPLE, "formatter_class": as_written}
    fit = add_command("fit", help="fit a lens that sees what the plain logit lens cannot", **words)
    _add_config(fit, config.FitConfig)
    add = fit.add_argument
    add("--out", required=True, metavar="LENS", help="folder of the lens; a fit that was stopped there goes on")
    add("--overwrite", action="store_true", help="replace a lens or a stopped fit that is there")

    merge = add_command(
        "merge-lenses",
        help="average Jacobian lenses of different prompts",
        description="Jacobian lenses of one model, fitted to prompts of which none is in two of them, as the one of "
        "all of them; each counts by its number of prompts.",
    )
    merge.add_argument("folders", metavar="LENS", nargs="+", help="two or more that fit --objective jacobian made")
    merge.add_argument("--out", required=True, metavar="LENS", help="folder of the lens")
    merge.add_argument("--overwrite", action="store_true", help="replace a lens that is there")

    recipe = add_command(
        "recipe",
        help="test the claim of a paper: fits, a sweep, a verdict",
        description="A recipe says what is run and what is concluded, before it is run; refinelens recipes lists those "
        "that come with the package.",
    )
    recipe.add_argument("recipe", metavar="NAME|FILE.toml", help="a recipe of the package, or a file of your own")
    _add_config(recipe, config.RecipeConfig)
    recipe.add_argument("--out", metavar="FOLDER", help="of all that is made (default: runs/RECIPE-MODEL)")
    recipe.add_argument("--resume", action="store_true", help="go on with a recipe that was stopped there")
    _add_config(recipe, config.EngineConfig)
    add_command("recipes", help="list the recipes of the package, each with its claim and source")

    merge = add_command(
        "merge",
        help="make one run of its shards",
        description="The run that one process would have made, of all shards that sweep --shard I/N made, on any "
        "machine; they stay as they are.",
    )
    merge.add_argument("folders", metavar="SHARD", nargs="+", help="folders of all shards, in any order")
    merge.add_argument("--out", required=True, metavar="RUN", help="folder of the run")
    merge.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    merge.add_argument("--no-report", action="store_true", help="write no page of the run")

    show = add_command("show", help="print the table of a run again")
    show.add_argument("folder", metavar="RUN", help="folder of a run")
    _add_config(show, view_config.ShowConfig)

    report = add_command("report", help="write the page of a run, or of several to compare")
    report.add_argument("folders", metavar="RUN", nargs="+", help="a run; with several the page also compares them")
    report.add_argument("--out", metavar="FILE", help="the page (default: report.html in the run; of several, here)")

    layers = add_command(
        "layers",
        help="which layers are essential: by the lens, and by taking them away",
        description="What the lens says of every layer of a finished sweep, and what the answer loses when the model "
        "has to do without it. An analysis that was stopped goes on with the same command.",
    )
    add = layers.add_argument
    add("folder", metavar="RUN", help="folder of a finished run")
    _add_config(layers, config.LayersConfig)
    add("--out", metavar="FOLDER", help="folder of the analysis (default: RUN/layers)")
    add("--overwrite", action="store_true", help="replace an analysis that is there")

    read = add_command(
        "read",
        help="look at every layer of one text, or of one context of a run",
        description="The best token of every layer and token, as a table in the terminal, or as a page, a picture or "
        "numbers in a file.",
        epilog=READ_EXAMPLES,
        formatter_class=as_written,
    )
    add = read.add_argument
    add("text", metavar="TEXT|RUN", help="a text, or the folder of a run")
    _add_config(read, view_config.ReadConfig)
    add("--html", metavar="FILE", help="write an interactive page")
    add("--png", metavar="FILE", help="write a picture of the last tokens")
    add("--json", metavar="FILE", help="write every number")

    convert = add_command(
        "convert",
        help="make a task of a file of SQuAD, HotpotQA or TriviaQA",
        description="A question a line, with one gold document that holds an answer. What is left out is counted by "
        "reason. Files are read gzip or not, as their authors publish them or as the package datasets exports them to "
        "JSON.",
    )
    add = convert.add_argument
    add("file", metavar="FILE", help="a file of that data set")
    add("--from", required=True, dest="from_", choices=config.DATA_SETS, help="the data set")
    add("--out", required=True, metavar="TASK.jsonl[.gz]", help="the task to write, a new file")

    export = add_command(
        "export",
        help="write a run's predictions for other programs",
        description="csv, jsonl and parquet: all predictions, a row for every layer. lens-json: one context for "
        "logit-lens widgets (version 2 of their format), for which the model runs again.",
    )
    add = export.add_argument
    add("folder", metavar="RUN", help="folder of a run")
    add("--format", choices=("csv", "jsonl", "parquet", "lens-json"), default="csv", help="(default: %(default)s)")
    add("--out", required=True, metavar="FILE", help="the file to write")
    _add_config(export.add_argument_group("of lens-json"), view_config.WidgetConfig)

    drift = add_command(
        "drift",
        help="how far a quantised model's layers are from its original's",
        description="Two models of the same layers and tokenizer read one text, and their readouts are compared layer "
        "by layer: divergence, best token, rank of the next token, and where predictions settle. Both are in memory.",
    )
    _add_config(drift, view_config.DriftConfig)
    drift.add_argument("--html", metavar="FILE", help="write a page of it")
    drift.add_argument("--csv", metavar="FILE", help="write every number")

    doctor = add_command("doctor", help="say which backend would be used, and what is found in a model")
    _add_config(doctor, view_config.DoctorConfig)
    bench = add_command("bench", help="measure the op here, beside what people use instead")
    bench.add_argument("--peers", dest="baselines", default=argparse.SUPPRESS, help=argparse.SUPPRESS)  # its older name
    _add_config(bench, view_config.BenchConfig)
    bench.add_argument("--json", metavar="FILE", help="write every number there too")
    return parser


def _add_config(parser: argparse._ActionsContainer, kind: type[Config]) -> None:
    """The options of a config; what is not given stays out of the namespace, so that the config's defaults hold."""
    for field in options_of(kind):
        takes, help, default = kind_of(field), field.metadata["help"], field.default
        if takes is not FLAG and default is not None and "(default: " not in help:
            help += f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"
        words = {name: field.metadata[name] for name in ("metavar", "choices")}
        if takes is NUMBER:
            words |= {"type": int, "metavar": words["metavar"] or "N"}
        words = {"action": "store_true"} if takes is FLAG else words
        group = _group(parser, field.metadata["group"])
        group.add_argument(option_of(field.name), default=argparse.SUPPRESS, help=help, **words)


def _group(parser: argparse._ActionsContainer, title: str | None) -> argparse._ActionsContainer:
    if title is None:
        return parser
    return next((g for g in parser._action_groups if g.title == title), None) or parser.add_argument_group(title)


@cache
def known_options() -> set[str]:
    """Every ``--option`` of every command."""
    (commands,) = [dict(action.choices) for action in build_parser()._actions if action.dest == "command"]
    return {option for command in commands.values() for option in command._option_string_actions}


def option_of(name: str) -> str:
    """The option that stands for a parameter; one that Python has a keyword for ends in ``_`` there."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def config_of(arguments: argparse.Namespace, kind: type[Kind]) -> Kind:
    """The config of what was given."""
    names = (field.name for field in fields(kind) if field.name in arguments)
    return kind(**{name: getattr(arguments, name) for name in names})


def check_values(arguments: argparse.Namespace) -> None:
    """Refuse options without a value, as a variable that is not set leaves them.

    Raises:
        InputError: Names the first.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, str) and not value.strip():
            where = {"folder": "RUN", "file": "FILE"}.get(name) or option_of(name)
            raise InputError(f"{where}: expected a value, got {value!r}")
