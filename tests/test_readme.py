"""The README's Python examples run as they stand."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("code", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(code, capsys):
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_there_is_an_example_of_the_op_in_ten_lines():
    assert "fused_lens" in EXAMPLES[0] and len(EXAMPLES[0].splitlines()) <= 10


def test_every_option_is_a_real_one():
    from refinelens.cli import build_parser

    commands = build_parser()._subparsers._group_actions[0].choices.values()
    known = "".join(command.format_help() for command in commands)
    for option in set(re.findall(r"(--[a-z][a-z-]+)", README)):
        assert option in known, option
