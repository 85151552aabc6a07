"""Question files in shapes that are not ours: what they are, and what to do with them."""

from __future__ import annotations

import csv
import json

LINES = "lines of JSON with question, answers and ctxs, one of them with isgold true (docs/sweep.md)"
TO_LINES = "to_json(OUT, orient='records', lines=True)"
SNIFFED = 1 << 16  # characters of a file that are looked at


def name_of_shape(suffix: str, raw: bytes) -> str | None:
    """What a file is, if it is one of the usual others, with the step that brings it nearer to ours.

    Args:
        suffix: Of its name, in lower case, such as ``.csv``.
        raw: Its bytes, unpacked.
    """
    if raw[:4] == b"PAR1":
        return f"a Parquet file; write its rows with pandas.read_parquet(FILE).{TO_LINES}"
    text = raw[: SNIFFED * 4].decode("utf-8-sig", errors="replace").lstrip()
    if text[:1] in ("[", "{"):
        return _of_json(raw)
    if suffix in (".csv", ".tsv") or _is_table(text[:SNIFFED]):
        return f"a table; write its rows with pandas.read_csv(FILE).{TO_LINES}"
    return None


def name_of_record(record: dict) -> str | None:
    """What a line is that is not one of ours, if it is a usual one."""
    if "supporting_facts" in record and "context" in record:
        return "a question of HotpotQA; its paragraphs of supporting_facts are the gold ones, of which one can be asked"
    if isinstance(record.get("answers"), dict) and "context" in record:
        return "a question of SQuAD; its context is the gold passage, its answers are answers['text']"
    if "paragraphs" in record:
        return "an article of SQuAD; write one line for each question of its paragraphs"
    return None


def _of_json(raw: bytes) -> str | None:
    """Of a file that is one JSON value."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = name_of_record(value[0])
        return f"one JSON array{f' of {inner}' if inner else ''}; write an object a line (jq -c '.[]' FILE)"
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        return "a file of SQuAD (data, paragraphs, qas); write one line for each question"
    return None


def _is_table(text: str) -> bool:
    """Whether the first lines have as many fields as each other, and more than one."""
    lines = [line for line in text.splitlines()[:5] if line.strip()]
    if len(lines) < 2:
        return False
    counts = {len(row) for row in csv.reader(lines[:2], delimiter="\t" if "\t" in lines[0] else ",")}
    return len(counts) == 1 and counts.pop() > 1
