"""What the command line takes: the parser of every command."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import fields

from . import __version__
from .config import CHOICES
from .errors import InputError

DTYPES = CHOICES["dtype"]
EXAMPLES = """examples:
  refinelens sweep --model tiny --documents 5,10,20
  refinelens sweep --documents 5,10 --examples 20 --out runs/first
  refinelens sweep --model ./my-model --task questions.jsonl.gz --documents 10 --gold-positions ends-middle
  refinelens sweep --task kv --documents 10,50 --examples 100 --template query-aware
  refinelens sweep --task nq --documents closed-book,oracle,10 --alias best --chat
  refinelens sweep --resume runs/first
  refinelens show runs/first --top 1,5
  refinelens layers runs/first --interventions skip,attn --examples 10
  refinelens fit --model ./my-model --out lenses/mine
  refinelens doctor --model ./my-model
  refinelens bench --rows 416
"""


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    _add_sweep(commands)
    _add_fit(commands)
    show = commands.add_parser("show", help="print the table of a run again")
    show.add_argument("folder", metavar="RUN", help="folder of a run")
    show.add_argument("--top", metavar="K[,K]", help="the table at other thresholds, from the ranks the run has")
    _add_layers(commands)
    _add_export(commands)
    _add_doctor(commands)
    _add_bench(commands)
    return parser


def options_given(arguments: argparse.Namespace, kind: type) -> dict[str, object]:
    """What was given for the fields of a dataclass of options, or is the parser's default; the rest has its own."""
    values = {field.name: getattr(arguments, field.name) for field in fields(kind)}
    return {name: value for name, value in values.items() if value is not None}


def check_values(arguments: argparse.Namespace) -> None:
    """Refuse options without a value, as a variable that is not set leaves them.

    Raises:
        InputError: Names the first.
    """
    for name, value in vars(arguments).items():
        if isinstance(value, str) and not value.strip():
            raise InputError(f"{'RUN' if name == 'folder' else _option(name)}: expected a value, got {value!r}")


def check_idle(values: dict[str, object], names: Iterable[str], owner: str, got: str) -> None:
    """Refuse options that would do nothing.

    Args:
        values: Options that were given, by the names of their fields.
        names: Those that ``owner`` alone has.
        owner: Option and choice, such as ``--format lens-json``.
        got: The choice that was made instead.

    Raises:
        InputError: Names the first, and whose it is.
    """
    for name in names:
        if name in values:
            raise InputError(f"{_option(name)}: expected {owner}, which alone has this option, got {got}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _add_trust(add: Callable) -> None:
    add("--trust-remote-code", action="store_true", help="run the code that a model brings (default: refuse it)")


def _add_doctor(commands) -> None:
    doctor = commands.add_parser("doctor", help="say which backend would be used, and what is found in a model")
    add = doctor.add_argument
    add("--model", metavar="NAME", help="find the parts of its lens and prove them, as sweep does (default: no model)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the model (default: as in sweep)")
    add("--dtype", choices=DTYPES, default="auto", help="of the model (default: as in sweep)")
    _add_trust(add)


def _add_sweep(commands) -> None:
    sweep = commands.add_parser(
        "sweep",
        help="move the gold document through the context and read every layer",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = sweep.add_argument_group("what is asked").add_argument
    what(
        "--model",
        default="smollm2",
        help="smollm2, tiny, a hub name, a folder or a .gguf file (default: %(default)s)",
    )
    what(
        "--task",
        help="builtin, nq (the file in $REFINELENS_NQ), kv (random pairs of keys and values), tiny or FILE.jsonl[.gz] "
        "in a format of Lost in the Middle (default: builtin; tiny for the model tiny)",
    )
    what(
        "--documents",
        default="5,10",
        metavar="N[,N]",
        help="context sizes, the gold document included; also closed-book (no document) and oracle (the gold one "
        "alone) (default: %(default)s)",
    )
    what(
        "--gold-positions",
        default="all",
        metavar="all|ends-middle|P[,P]",
        help="of the gold document, from 0 (default: %(default)s)",
    )
    what("--examples", type=int, metavar="N", help="questions drawn by the seed (default: all; of kv and tiny 100)")
    what(
        "--template",
        default="default",
        metavar="default|query-aware|FILE",
        help="Lost in the Middle's prompt; the one with the question also before the documents; or a text file with "
        "{documents} and {question} (default: %(default)s)",
    )
    what("--chat", action="store_true", help="put the prompt into the tokenizer's chat template, as the user's turn")
    what(
        "--alias",
        choices=CHOICES["alias"],
        default="first",
        help="which of several answers is the target; best: the likeliest after the oracle context "
        "(default: %(default)s)",
    )
    what("--seed", type=int, default=0, metavar="N", help="of questions, distractors, intervals (default: %(default)s)")
    _add_readings(sweep.add_argument_group("what is read"))
    _add_machine(sweep.add_argument_group("how it runs"))
    run = sweep.add_argument_group("the run").add_argument
    run("--out", metavar="FOLDER", help="folder of the run (default: runs/MODEL-TASK-TIME)")
    run("--overwrite", action="store_true", help="replace a run that is there")
    run("--resume", metavar="RUN", help="go on with a run that was interrupted, with its own options (and --workers)")


def _add_readings(group) -> None:
    add = group.add_argument
    add("--lens", default="plain", metavar="LENS[,LENS]", help="plain, or folders of lenses (default: %(default)s)")
    add(
        "--target",
        choices=CHOICES["target"],
        default="answer",
        help="whose rank at every layer: the answer's token, or the model's own prediction (default: %(default)s)",
    )
    add(
        "--positions",
        choices=CHOICES["positions"],
        default="answer",
        help="where it is read: before each answer token, or at every token of the context, with the next one as "
        "target (default: %(default)s)",
    )
    add(
        "--answer-tokens",
        choices=CHOICES["answer_tokens"],
        default="first",
        help="that tables and figures are about; the data have all (default: %(default)s)",
    )
    add("--top", default="1", metavar="K[,K]", help="correct means rank 1 to K, for each K (default: %(default)s)")
    add(
        "--generate",
        type=int,
        default=0,
        metavar="N",
        help="also write up to N tokens after each prompt, greedily, and score them by best_subspan_em (default: none)",
    )


def _add_machine(group) -> None:
    add = group.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="(default: float32 on a CPU, the checkpoint's own on CUDA)")
    add("--batch-size", default="auto", metavar="auto|N", help="contexts per forward pass (default: %(default)s)")
    add(
        "--reuse-prefix",
        choices=CHOICES["reuse_prefix"],
        default="auto",
        help="run documents that contexts share once; auto: on a CPU in float32, if proven (default: %(default)s)",
    )
    add("--workers", type=int, default=1, metavar="N", help="processes, a model in each (default: %(default)s)")
    _add_trust(add)


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
        "--text",
        help="builtin (Python's own reference), tiny, text or .jsonl[.gz] (default: builtin; tiny for the model tiny)",
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
    add("--steps", type=int, metavar="N", help="of training, for kl alone (default: 150)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: CUDA if there is one)")
    add("--dtype", choices=DTYPES, default="auto", help="(default: float32 on a CPU, the checkpoint's own on CUDA)")
    add("--seed", type=int, metavar="N", help="of the training, for kl alone (default: 0)")
    _add_trust(add)
    add("--out", required=True, metavar="LENS", help="folder of the lens; a fit that was stopped there goes on")
    add("--overwrite", action="store_true", help="replace a lens or a stopped fit that is there")


def _add_layers(commands) -> None:
    layers = commands.add_parser(
        "layers",
        help="which layers are essential: by the lens, and by taking them away",
        description="What the lens says of every layer of a finished sweep, and what the answer loses when the model "
        "has to do without it. An analysis that was stopped goes on with the same command.",
    )
    add = layers.add_argument
    add("folder", metavar="RUN", help="folder of a finished run")
    add(
        "--interventions",
        default="skip,mean,attn,mlp,patch",
        metavar="NAME[,NAME]",
        help="skip a block, replace what it adds by its mean, silence its attn or mlp, patch the state before the "
        "answer between gold positions; or none, which needs no model (default: %(default)s)",
    )
    add("--at", choices=("all", "answer"), default="all", help="tokens that are struck (default: %(default)s)")
    add("--examples", type=int, metavar="N", help="questions drawn by the run's seed (default: all of the run)")
    add("--lens", metavar="NAME", help="one of the run's (default: its last)")
    add("--out", metavar="FOLDER", help="folder of the analysis (default: RUN/layers)")
    add("--overwrite", action="store_true", help="replace an analysis that is there")


def _add_export(commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a run's predictions for other programs",
        description="csv, jsonl and parquet: all predictions, a row for every layer. lens-json: one context for "
        "logit-lens widgets (version 2 of their format), for which the model runs again.",
    )
    add = export.add_argument
    add("folder", metavar="RUN", help="folder of a run")
    add("--format", choices=("csv", "jsonl", "parquet", "lens-json"), default="csv", help="(default: %(default)s)")
    add("--out", required=True, metavar="FILE", help="the file to write")
    add = export.add_argument_group("of lens-json").add_argument
    add(
        "--question",
        type=int,
        metavar="ID",
        help="line of the task file, from 0 (default: the first that could be asked with so many documents)",
    )
    add(
        "--documents",
        type=int,
        metavar="N",
        help="context size; 0 closed-book, 1 oracle (default: the run's smallest of 2 or more, else oracle, else 0)",
    )
    add("--gold-position", type=int, metavar="P", help="0-based (default: the run's first)")
    add("--lens", metavar="NAME", help="plain, or the name of a lens (default: the run's first)")
    add("--tokens", type=int, metavar="N", help="at most, the last ones of the context (default: 32)")
    add("--k", type=int, metavar="K", help="most likely tokens of every layer (default: 5)")


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
    _add_trust(add)
    add("--json", metavar="FILE", help="write every number there too")
