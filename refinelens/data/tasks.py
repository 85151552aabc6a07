"""Tasks: questions and their distractors, read from files in the formats of Lost in the Middle, and checked.

Question files in shapes that are not ours are named, with what to do with them.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import os
import random
import reprlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from ..errors import InputError
from ..options import check_utf8
from .questions import KV, QA, Document, Format, Question
from .scoring import has_answer, word_forms

LINES = "lines of JSON with question, answers and ctxs, one of them with isgold true (docs/sweep.md)"
TO_LINES = "to_json(OUT, orient='records', lines=True)"
SNIFFED = 1 << 16  # characters of a file that are looked at
KV_FIELD = "ordered_kv_records"
BUILTIN = Path(__file__).parents[1] / "data" / "builtin.jsonl"
NQ_VARIABLE = "REFINELENS_NQ"
CUES = "cues"  # the built-in questions with documents that disagree
SOURCES = (  # of the documents that state one answer
    "{}",
    "From a guide book: {}",
    "A local reporter wrote: {}",
    "An old letter says: {}",
    "From a book for schools: {}",
)


def name_of_shape(suffix: str, raw: bytes) -> str | None:
    """What a file is, if it is one of the usual others, with what makes ours of it.

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
    """What a line is that is not one of ours, if it is a usual one, and what makes ours of it."""
    if "supporting_facts" in record and "context" in record:
        return f"a question of HotpotQA; {_how_to_convert('hotpotqa')}"
    if isinstance(record.get("answers"), dict) and "context" in record:
        return f"a question of SQuAD; {_how_to_convert('squad')}"
    if "paragraphs" in record:
        return f"an article of SQuAD; {_how_to_convert('squad')}"
    if {"entity_pages", "search_results", "EntityPages", "SearchResults"} & record.keys():
        return f"a question of TriviaQA; {_how_to_convert('triviaqa')}"
    return None


def _how_to_convert(source: str) -> str:
    return f"``convert(from_='{source}')`` makes a task of the file"


def _of_json(raw: bytes) -> str | None:
    """Of a file that is one JSON value."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = name_of_record(value[0])
        return f"one JSON array of {inner}" if inner else "one JSON array; write an object a line (jq -c '.[]' FILE)"
    for name, source, key in (("SQuAD", "squad", "data"), ("TriviaQA", "triviaqa", "Data")):
        if isinstance(value, dict) and isinstance(value.get(key), list):
            return f"a file of {name}; {_how_to_convert(source)}"
    return None


def _is_table(text: str) -> bool:
    """Whether the first lines have as many fields as each other, and more than one."""
    lines = [line for line in text.splitlines()[:5] if line.strip()]
    if len(lines) < 2:
        return False
    counts = {len(row) for row in csv.reader(lines[:2], delimiter="\t" if "\t" in lines[0] else ",")}
    return len(counts) == 1 and counts.pop() > 1


def _parse_lines(path: Path, raw: bytes) -> tuple[Format, tuple[Question, ...]]:
    """The questions of a file and their format, which the fields of the first line tell."""
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
    for field in ("answer_prefix", "group", "decoy_answer"):
        if not isinstance(record.get(field, ""), str):
            raise InputError(f"{where}: expected a string {field!r}, got {record[field]!r}")
    for field in ("golds", "decoys"):
        _check_list(where, record.get(field, []), _is_passage, f"{field!r} of objects with strings 'title' and 'text'")
    decoys, decoy_answer = record.get("decoys", []), record.get("decoy_answer", "").strip()
    if decoys and (not decoy_answer or decoy_answer in answers):
        raise InputError(f"{where}: expected another answer, 'decoy_answer', beside 'decoys', got {decoy_answer!r}")
    return Question(
        id=number,
        question=question.strip(),
        answers=tuple(a.strip() for a in answers),
        answer_prefix=record.get("answer_prefix", ""),
        group=record.get("group", ""),
        gold=_document(gold[0]),
        distractors=tuple(_document(c) for c in ctxs if c is not gold[0] and c.get("hasanswer") is not True),
        source_id=_source_id(where, record),
        golds=tuple(_document(c) for c in record.get("golds", [])),
        decoys=tuple(_document(c) for c in decoys),
        decoy_answer=decoy_answer,
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


@dataclass(frozen=True)
class Task:
    """Questions in file order, how their contexts are written, and what identifies them."""

    name: str
    path: Path | None  # None where the questions were generated
    sha256: str  # of the file as stored, or of what was generated
    questions: tuple[Question, ...]
    format: Format


def load_task(name: str) -> Task:
    """Read and check a whole task file: ``builtin``, ``nq`` (named by the variable REFINELENS_NQ) or a path.

    Each line is a JSON object as in Lost in the Middle (Liu et al. 2023, arXiv 2307.03172), and the first one tells
    which: ``question``, ``answers`` and ``ctxs`` (objects with ``title``, ``text`` and ``isgold``; one is gold),
    optionally ``answer_prefix``, ``group``, ``golds``, ``decoys`` and ``decoy_answer``; or ``ordered_kv_records``
    (pairs), ``key`` and ``value``.

    Raises:
        InputError: The file is missing, empty or malformed, file and line are named; or the variable is not set.
    """
    given = str(BUILTIN) if name in ("builtin", CUES) else name
    if name == "nq":
        given = os.environ.get(NQ_VARIABLE, "")
        if not given:
            raise InputError(
                f"``task='nq'``: expected the path of a question file in ${NQ_VARIABLE}, got nothing; set it"
            )
        check_utf8(f"${NQ_VARIABLE}", given)
    if not os.path.isfile(given):  # unlike `Path.is_file`, of a name that no file can have too
        raise InputError(
            f"``task`` {name}: expected builtin, cues, nq, kv, tiny, tiny-cues, tiny-friends, tiny-hops or a "
            f".jsonl[.gz] file, got no file at {given}"
        )
    path = Path(given)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    format, questions = _parse_lines(path, raw)
    if not questions:
        raise InputError(f"{path}: expected at least one question, got an empty file")
    if name == CUES:
        questions = with_decoys(questions)
        raw = repr(questions).encode()  # decoys and all
    return Task(name, path, hashlib.sha256(raw).hexdigest(), questions, format)


def with_decoys(questions: Sequence[Question]) -> tuple[Question, ...]:
    """Questions with documents that state the answer of another question of their group, and with more gold ones.

    A decoy is the gold document with that answer in place of its own (as entities are substituted by Longpre et al.
    2021, arXiv 2109.05052); each kind has `SOURCES` copies, which tell where they are from. The other answer is that
    of the next question of the group, in a circle, which begins with another word. Questions without one, or whose
    document has their answer more or less than once, have no decoys.
    """
    by_group: dict[str, list[Question]] = {}
    for question in questions:
        by_group.setdefault(question.group, []).append(question)
    found = []
    for question in questions:
        group, (title, text) = by_group[question.group], (question.gold.title, question.gold.text)
        place = group.index(question)
        others = [other.answers[0] for other in (*group[place + 1 :], *group[:place]) if other.answers]
        answer = question.answers[0] if question.answers else ""
        other = next((o for o in others if o.split()[0] != answer.split()[0]), None) if answer else None
        frame = " ".join((*SOURCES, title))
        if other is None or text.count(answer) != 1 or other in text or answer in frame or other in frame:
            found.append(question)
            continue
        golds, decoys = (
            [Document(title, source.format(told)) for source in SOURCES] for told in (text, text.replace(answer, other))
        )
        more = {"golds": tuple(golds[1:]), "decoys": tuple(decoys), "decoy_answer": other}
        found.append(replace(question, gold=golds[0], **more))
    return tuple(found)


class DistractorSource:
    """Chooses distractors that never contain an answer, always the same ones for one seed."""

    def __init__(self, task: Task, seed: int):
        self._task = task
        self._seed = seed

    def choose(self, question: Question, count: int) -> list[Document] | None:
        """The first ``count`` distractors of a question, or None if the task has too few.

        The question's own passages come first, in file order; then, unless the format has a question's own
        alone, other questions' passages, those of its group before the rest, in an order fixed by the seed and
        the question. Fewer distractors are a prefix of more, so that context sizes are nested.
        """
        chosen: dict[Document, None] = {}
        for document in self._candidates(question):
            if len(chosen) == count:
                break
            if document not in chosen and self._fits(document, question):
                chosen[document] = None
        return list(chosen) if len(chosen) == count else None

    def replaced(self, question: Question, count: int) -> int:
        """How many of the first ``count`` of a question's own passages others stand for."""
        return sum(not self._fits(document, question) for document in question.distractors[:count])

    def _fits(self, document: Document, question: Question) -> bool:
        """Whether it is none of the question's gold documents and decoys, and without an answer of either."""
        if document in (question.gold, *question.golds, *question.decoys):
            return False
        wrong = (*question.answers, *question.wrong)
        if self._task.format.pairs:
            return document.text not in wrong
        forms = _forms(document)
        return not any(has_answer(forms, answer) for answer in wrong)

    def _candidates(self, question: Question) -> Iterator[Document]:
        yield from question.distractors
        if self._task.format.own_documents:
            return
        others = [q for q in self._task.questions if q.id != question.id]
        random.Random(f"{self._seed}/{question.id}").shuffle(others)
        others.sort(key=lambda q: not (question.group and q.group == question.group))
        for other in others:
            yield other.gold
        for other in others:
            yield from other.distractors


@lru_cache(maxsize=4096)  # questions share distractors; a large task has more than should be held
def _forms(document: Document) -> tuple[str, ...]:
    return word_forms(f"{document.title} {document.text}")


def choose_questions(task: Task, count: int | None, seed: int) -> list[Question]:
    """``count`` questions drawn by the seed (all when None), in file order.

    Raises:
        InputError: More questions were asked for than the file has.
    """
    if count is None:
        return list(task.questions)
    if not 1 <= count <= len(task.questions):
        raise InputError(f"``examples``: expected 1 to {len(task.questions)} (questions in {task.path}), got {count}")
    return sorted(random.Random(seed).sample(task.questions, count), key=lambda q: q.id)
