"""Options stated once: fields, parser and help agree; values of Python; messages name parameters, not options."""

import ast
import re
from argparse import SUPPRESS
from dataclasses import fields, replace
from pathlib import Path

import pytest

from refinelens import config, view_config
from refinelens.cli import MARK, in_options
from refinelens.config import FitConfig, LayersConfig, SweepConfig
from refinelens.errors import InputError, resume_call
from refinelens.options import Config
from refinelens.parser import build_parser, config_of, known_options, option_of
from refinelens.view_config import BenchConfig, WidgetConfig

PACKAGE = Path(config.__file__).parent
ENGINE = {field.name for field in fields(config.EngineConfig)}
COMMANDS = {  # config and what the command line alone is asked
    "sweep": (SweepConfig, {"out", "overwrite", "resume", "shard", "no_report"} | ENGINE),
    "prompts": (SweepConfig, {"out"}),
    "fit": (FitConfig, {"out", "overwrite"}),
    "merge": (Config, {"folders", "out", "overwrite", "no_report"}),
    "merge-lenses": (Config, {"folders", "out", "overwrite"}),
    "recipe": (config.RecipeConfig, {"recipe", "out", "resume"} | ENGINE),
    "recipes": (Config, set()),
    "show": (view_config.ShowConfig, {"folder"}),
    "layers": (LayersConfig, {"folder", "out", "overwrite"}),
    "read": (view_config.ReadConfig, {"text", "html", "png", "json"}),
    "report": (Config, {"folders", "out"}),
    "convert": (Config, {"file", "from_", "out"}),
    "export": (WidgetConfig, {"folder", "format", "out"}),
    "drift": (view_config.DriftConfig, {"html", "csv"}),
    "doctor": (view_config.DoctorConfig, set()),
    "bench": (BenchConfig, {"json"}),
}
REQUIRED = {"recipe": ["inverted-u"], "fit": ["--out", "lens"], "export": ["run", "--out", "file"]}
REQUIRED |= {"show": ["run"], "layers": ["run"], "read": ["text"], "report": ["run"]}
REQUIRED |= {"convert": ["file", "--from", "squad", "--out", "task.jsonl"]}
REQUIRED |= {"merge": ["run", "--out", "merged"], "merge-lenses": ["lens", "--out", "merged"]}
REQUIRED |= {"prompts": ["--out", "prompts.jsonl"]}
PIP = {"--no-deps"}
KEPT = {  # texts that runs keep and tables print, commands to type; options of pip, and of a script of its own
    "report/summary.py": {"--model", "--top", "--out", "--lens"},
    "model/loading.py": PIP,
    "doctor.py": PIP,
    "lens/published.py": {"--repo-type"},  # of the hub's own command
}
LINES = ("report/figures.py", "bench/table.py")  # dashed ones, and rules of tables


def subparser(command):
    return build_parser()._subparsers._group_actions[0].choices[command]


def test_commands_are_these():
    assert set(build_parser()._subparsers._group_actions[0].choices) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_is_an_option_and_back(command):
    """With its help, which says its default."""
    kind, alone = COMMANDS[command]
    parser = subparser(command)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    assert set(actions) == {field.name for field in fields(kind)} | alone
    text = " ".join(parser.format_help().split())
    for field in fields(kind):
        assert actions[field.name].default is SUPPRESS
        assert f"--{field.name.replace('_', '-')}" in text and field.metadata["help"]
        if field.default not in (None, False):
            assert "(default: " in actions[field.name].help


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_the_config(command):
    kind, _ = COMMANDS[command]
    arguments = build_parser().parse_args([command, *REQUIRED.get(command, [])])
    assert config_of(arguments, kind) == kind() == kind(**kind().arguments()) == replace(kind())


def test_the_command_line_and_python_give_the_same():
    typed = (
        "sweep --model tiny --documents 10,closed-book --gold-positions 0,4 --examples 8 --top 5,1 --lens plain,x "
        "--chat --keep answered --shots 2 --shot-documents 3 --batch-size 2 --measures top5,jsd"
    )
    given = config_of(build_parser().parse_args(typed.split()), SweepConfig)
    options = SweepConfig(
        "tiny",
        documents=(10, "closed-book"),
        gold_positions=[0, 4],
        examples=8,
        top=[5, 1],
        lens=["plain", Path("x")],
        chat=True,
        keep="answered",
        shots=2,
        shot_documents=3,
        batch_size=2,
        measures=["jsd", "top5"],
    )
    assert given == options
    assert options.arguments() == {
        "model": "tiny",
        "task": "tiny",
        "documents": [0, 10],
        "gold_positions": "0,4",
        "golds": 1,
        "decoys": None,
        "decoy_positions": "all",
        "examples": 8,
        "target": "answer",
        "positions": "answer",
        "answer_tokens": "first",
        "generate": 0,
        "measures": ["jsd", "top5"],
        "frequencies": None,
        "top": [5, 1],
        "lens": ["plain", "x"],
        "template": "default",
        "chat": True,
        "keep": "answered",
        "shots": 2,
        "shot_documents": 3,
        "alias": "first",
        "device": "auto",
        "dtype": "auto",
        "batch_size": "2",
        "states": None,
        "reuse_prefix": "auto",
        "seed": 0,
        "device_map": None,
        "max_memory": None,
        "quantize": None,
        "revision": None,
        "subfolder": None,
        "trust_remote_code": False,
    }


@pytest.mark.parametrize(
    "kind, given, read",
    [
        (SweepConfig, {"documents": 10}, (10,)),
        (SweepConfig, {"documents": "closed-book"}, (0,)),
        (SweepConfig, {"documents": [10, 5, 5]}, (5, 10)),
        (SweepConfig, {"lens": "plain"}, ("plain",)),
        (SweepConfig, {"lens": Path("lenses/mine")}, ("lenses/mine",)),
        (SweepConfig, {"top": 5}, (5,)),
        (SweepConfig, {"gold_positions": 1}, "1"),
        (SweepConfig, {"model": Path("./mine")}, "mine"),
        (SweepConfig, {"task": None}, "builtin"),
        (LayersConfig, {"interventions": "none"}, ()),
        (LayersConfig, {"interventions": "skip"}, ("skip",)),
        (LayersConfig, {"interventions": None}, ("skip", "mean", "attn", "mlp", "patch")),
        (BenchConfig, {"baselines": ["compiled", "row-chunks"]}, "compiled,row-chunks"),
    ],
)
def test_values_of_python(kind, given, read):
    ((name, _),) = given.items()
    assert getattr(kind(**given), name) == read


def test_baselines_have_an_older_name():
    given = BenchConfig(peers=["compiled", "row-chunks"])
    assert given == BenchConfig(baselines="compiled,row-chunks") == replace(given, rows=None)
    assert "peers" not in given.arguments()


@pytest.mark.parametrize(
    "kind, given, message",
    [
        (SweepConfig, {"documents": 2.5}, "``documents``: expected closed-book, oracle or sizes such as 5,10, got 2.5"),
        (SweepConfig, {"documents": ()}, "``documents``: expected closed-book, oracle or sizes such as 5,10, got ''"),
        (SweepConfig, {"examples": "8"}, "``examples``: expected a whole number, got '8'"),
        (SweepConfig, {"chat": "yes"}, "``chat``: expected True or False, got 'yes'"),
        (SweepConfig, {"model": 3}, "``model``: expected a name or a path, got 3"),
        (SweepConfig, {"target": "x"}, "``target``: expected answer, prediction, got 'x'"),
        (SweepConfig, {"device": "tpu"}, "``device``: expected auto, cpu, cuda, got 'tpu'"),
        (SweepConfig, {"batch_size": "many"}, "``batch_size``: expected auto or a positive number, got 'many'"),
        (SweepConfig, {"top": "a"}, "``top``: expected numbers such as 1,5,10, got 'a'"),
        (FitConfig, {"steps": 0}, "``steps``: expected at least 1, got 0"),
        (WidgetConfig, {"k": 0}, "``k``: expected 1 or more, got 0"),
        (BenchConfig, {"model": "m", "vocab": 5}, "``vocab``: expected none beside ``model``, whose own"),
    ],
)
def test_what_does_not_fit_names_the_parameter(kind, given, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}") as error:
        kind(**given)
    assert "--" not in str(error.value)
    assert in_options(str(error.value)).startswith(re.sub(r"``(\w+)``", r"--\1", message).replace("_", "-"))


@pytest.mark.parametrize(
    "message, line",
    [
        ("``batch_size``: expected 1", "--batch-size: expected 1"),
        ("``model`` a/b: use ``dtype='float32'``", "--model a/b: use --dtype float32"),
        ("pass ``overwrite=True`` or leave ``chat`` out", "pass --overwrite or leave --chat out"),
        ("``convert(from_='squad')`` makes one", "refinelens convert --from squad makes one"),
        (f"{resume_call('my runs/it')} goes on", "refinelens sweep --resume my runs/it goes on"),
        ("names as they are: `model`, ``none_of_ours``, {documents}, --x", None),
    ],
)
def test_parameters_become_options(message, line):
    assert in_options(message) == (line or message)


def texts(path):
    """Strings of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
    documented = {id(node.body[0].value) for node in nodes if node.body and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documented:
            yield node.value


def test_the_library_speaks_of_parameters_alone():
    """Whatever it may say, whether or not a test makes it say so; and each of its parameters is an option."""
    marks = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        name, strings = path.relative_to(PACKAGE).as_posix(), list(texts(path))
        if name not in ("cli.py", "parser.py"):
            options = {option for text in strings for option in re.findall(r"(?<![\w-])--(?:[a-z][a-z-]*|$)", text)}
            options -= {"--"} if name in LINES else set()
            assert options == KEPT.get(name, set()), name
            marks |= {found[1] for text in strings for found in MARK.findall(text)}
    assert len(marks) > 20 and {option_of(mark) for mark in marks} <= known_options()
