"""Lines of a task file, in one of the formats of Lost in the Middle, read and checked."""

from __future__ import annotations

import gzip
import json
import reprlib
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import InputError
from .formats import KV, QA, Format
from .other_files import LINES, name_of_record, name_of_shape
from .question import Document, Question

KV_FIELD = "ordered_kv_records"


def parse_lines(path: Path, raw: bytes) -> tuple[Format, tuple[Question, ...]]:
    """The questions of a file and their format, which the fields of the first line tell.

    Raises:
        InputError: Malformed; file and line are named.
    """
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        other = name_of_shape("", raw)
        if other is not None:
            raise InputError(f"{path}: expected {LINES}, got {other}") from None
        raise InputError(f"{path}: expected UTF-8 lines of JSON (gzip if it ends in .gz), got {error}") from None
    format, questions = QA, []
    for number, line in enumerate(text.split("\n")):
        if line.strip():
            where = f"{path}, line {number + 1}"
            record = _first_record(path, where, line, raw) if not questions else _parse_record(where, line)
            format = KV if not questions and KV_FIELD in record else format
            questions.append(_PARSERS[format.name](where, number, record))
    return format, tuple(questions)


def kv_question(number: int, gold: Document, distractors: Sequence[Document], source_id: str | None = None) -> Question:
    """The question for the value of a key; the prompt ends in the value's opening quote."""
    return Question(number, gold.title, (gold.text,), ' "', "", gold, tuple(distractors), source_id)


def _first_record(path: Path, where: str, line: str, raw: bytes) -> dict:
    """The first record, or what the file is instead."""
    try:
        record = _parse_record(where, line)
    except InputError as error:
        other = name_of_shape(Path(path.name.removesuffix(".gz")).suffix.lower(), raw)
        raise error if other is None else InputError(f"{path}: expected {LINES}, got {other}") from None
    other = name_of_record(record) or (name_of_shape("", raw) if "ctxs" not in record else None)
    if other is not None:
        raise InputError(f"{where}: expected {LINES}, got {other}")
    return record


def _parse_record(where: str, line: str) -> dict:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        got = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else error
        raise InputError(f"{where}: expected a JSON object of valid text, got: {got}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    return record


def _parse_qa(where: str, number: int, record: dict) -> Question:
    question, answers = record.get("question"), record.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: expected a non-empty string 'question', got {question!r}")
    if not isinstance(answers, list) or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{where}: expected a list of non-empty strings 'answers', got {reprlib.repr(answers)}")
    ctxs = record.get("ctxs")
    _check_list(where, ctxs, _is_passage, "'ctxs' of objects with strings 'title' and 'text'")
    for field, value in ((field, c.get(field)) for c in ctxs for field in ("isgold", "hasanswer")):
        if not isinstance(value, bool | None):
            raise InputError(f"{where}: expected {field} true or false in every passage of 'ctxs', got {value!r}")
    gold = [c for c in ctxs if c.get("isgold") is True]
    if len(gold) != 1:
        raise InputError(f"{where}: expected one passage with isgold true, got {len(gold)}")
    for field in ("answer_prefix", "group"):
        if not isinstance(record.get(field, ""), str):
            raise InputError(f"{where}: expected a string {field!r}, got {record[field]!r}")
    return Question(
        id=number,
        question=question.strip(),
        answers=tuple(a.strip() for a in answers),
        answer_prefix=record.get("answer_prefix", ""),
        group=record.get("group", ""),
        gold=_document(gold[0]),
        distractors=tuple(_document(c) for c in ctxs if c is not gold[0] and c.get("hasanswer") is not True),
        source_id=_source_id(where, record),
    )


def _source_id(where: str, record: dict) -> str | None:
    """What the file calls the question."""
    name = next((name for name in ("id", "_id") if record.get(name) is not None), None)
    if name is None:
        return None
    if type(record[name]) not in (str, int):
        raise InputError(f"{where}: expected a string or a number {name!r}, got {reprlib.repr(record[name])}")
    return str(record[name])


def _parse_kv(where: str, number: int, record: dict) -> Question:
    pairs, key, value = (record.get(field) for field in (KV_FIELD, "key", "value"))
    _check_list(where, pairs, _is_pair, f"{KV_FIELD!r} of pairs of non-empty strings")
    if len({name for name, _ in pairs}) < len(pairs):
        raise InputError(f"{where}: expected every key in {KV_FIELD!r} once, got one twice")
    if [key, value] not in pairs:
        raise InputError(f"{where}: expected 'key' and 'value' of a pair in {KV_FIELD!r}, got {key!r} and {value!r}")
    distractors = [Document(*pair) for pair in pairs if pair[0] != key]
    return kv_question(number, Document(key, value), distractors, _source_id(where, record))


def _check_list(where: str, entries: object, fits: Callable[[object], bool], expected: str) -> None:
    odd = [entry for entry in entries if not fits(entry)] if isinstance(entries, list) else [entries]
    if odd:
        raise InputError(f"{where}: expected a list {expected}, got {reprlib.repr(odd[0])}")


def _is_passage(ctx: object) -> bool:
    return isinstance(ctx, dict) and isinstance(ctx.get("title"), str) and isinstance(ctx.get("text"), str)


def _is_pair(pair: object) -> bool:
    return isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair)


def _document(ctx: dict) -> Document:
    return Document(ctx["title"].strip(), ctx["text"].strip())


_PARSERS = {QA.name: _parse_qa, KV.name: _parse_kv}
