"""The README's Python examples run as they stand, its options exist, its table of models is what is tested."""

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
    from refinelens.parser import build_parser

    commands = build_parser()._subparsers._group_actions[0].choices.values()
    known = "".join(command.format_help() for command in commands)
    for option in set(re.findall(r"(--[a-z][a-z-]+)", README)):
        assert option in known, option


def test_table_of_models_is_what_is_proven():
    """A row per family, with every final norm that test_families.py finds in it and what is special."""
    from families import CASES

    section = README.split("## Models\n")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    families = list(dict.fromkeys(case.family for case in CASES.values()))
    assert [row[0] for row in rows[2:]] == families
    for family, norms, special in rows[2:]:
        cases = [case for case in CASES.values() if case.family == family]
        assert norms.split(" / ") == list(dict.fromkeys(case.norm for case in cases)), family
        parts = {
            "projection": any(case.projection for case in cases),
            "unembedding bias": any(case.bias for case in cases),
            "softcap": any(case.softcap for case in cases),
            "logit scale": any(case.logit_scale != 1.0 for case in cases),
        }
        assert {name: name in special for name in parts} == parts, family
