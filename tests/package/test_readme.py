"""README and pages: their Python examples run, options and links exist, the table of models is what is tested."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
FENCED = re.compile(r"^```.*?^```$", flags=re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    .*$", flags=re.MULTILINE)  # also code
LINK = re.compile(r"\]\(([^)\s]+)\)")
EXAMPLES = {
    f"{page}-{number}": code
    for page, text in PAGES.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
}


@pytest.mark.medium
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name, capsys):
    exec(compile(EXAMPLES[name], name, "exec"), {})
    assert capsys.readouterr().out.strip()


def test_first_example_is_the_op_in_ten_lines():
    code = EXAMPLES["README.md-0"]
    assert "fused_lens" in code and len(code.splitlines()) <= 10


def test_readme_is_short():
    """What is longer belongs into a page."""
    assert len(PAGES["README.md"].splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_every_option_is_a_real_one(page):
    from refinelens.parser import known_options

    lines = [line for line in PAGES[page].splitlines() if "pip install" not in line]  # whose options are pip's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines))) <= known_options()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    """Files and images that a page names are there, and so are the headings of pages that it links into."""
    for link in LINK.findall(_prose(PAGES[page])):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists() and path.is_relative_to(ROOT), link
        if anchor:
            assert anchor in _anchors(path.read_text(encoding="utf-8")), link


def test_every_page_can_be_reached():
    linked = {link.partition("#")[0] for link in LINK.findall(_prose(PAGES["README.md"]))}
    assert set(PAGES) - {"README.md"} <= linked


def test_table_of_models_is_what_is_proven():
    """A row per family, with every final norm that test_families.py finds in it and what is special."""
    from families import CASES

    lines = PAGES["docs/models.md"].partition("## Families")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
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


def _prose(text: str) -> str:
    return INDENTED.sub("", FENCED.sub("", text))


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
