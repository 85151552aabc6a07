"""Questions of SQuAD, HotpotQA and TriviaQA in our form, or the reason why one has no place in it.

A question of ours has one gold document: a passage that holds an answer as whole words (`scoring.has_answer`), title
included. What each data set calls its passages, and which of them is gold here, stands with each.
"""

from __future__ import annotations

import re
import reprlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError
from .questions import Document
from .scoring import has_answer, word_forms

PASSAGE_WORDS = 100  # of a passage cut from a longer text, as in DPR (Karpukhin et al. 2020) and Lost in the Middle
NO_QUESTION, NO_ANSWER = "no question", "no answer"
UNANSWERABLE = "no answer in the file, as SQuAD 2 marks what a passage does not answer"
NOT_IN_PASSAGE = "no answer in the passage as whole words"
YES_OR_NO = "an answer of yes or no"
NOT_SUPPORTED = "no answer in a supporting paragraph as whole words"
SEVERAL_GOLD = "an answer in more than one supporting paragraph"
NO_EVIDENCE = "no text among the evidence"
NOT_IN_EVIDENCE = "no answer in the evidence as whole words"
Value = TypeVar("Value", str, list, dict)
KINDS = {str: "a text", list: "a list", dict: "an object"}


@dataclass(frozen=True)
class Converted:
    """One question: its line, or why there is none."""

    line: dict | None  # ``id``, ``question``, ``answers``, ``ctxs``, perhaps ``group``
    reason: str = ""  # why not, in a few words
    n_left_out: int = 0  # passages beside the gold one that hold an answer


@dataclass(frozen=True)
class Source:
    """A data set that can be converted."""

    name: str
    fields: str  # of its questions, for errors
    questions: Callable[[dict, Path], Iterator[Converted]]  # of one record, and the folder that its file lies in


def _field(record: object, name: str, kind: type[Value]) -> Value:
    """An entry of the kind that a data set has there.

    Raises:
        InputError: Another kind, or none.
    """
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise InputError(f"expected {name!r} to be {KINDS[kind]}, got {reprlib.repr(value)}")
    return value


def _texts(record: object, name: str) -> list[str]:
    values = _field(record, name, list)
    odd = next((value for value in values if not isinstance(value, str)), None)
    if odd is not None:
        raise InputError(f"expected {name!r} to be a list of texts, got {reprlib.repr(odd)}")
    return values


def _rows(value: object) -> list[dict]:
    """Objects, which the package datasets writes as one object of lists; none of anything else."""
    if isinstance(value, dict):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        return [dict(zip(columns, row, strict=True)) for row in zip_longest(*columns.values())]
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def holds_any(document: Document, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in a passage or its title."""
    forms = word_forms(f"{document.title} {document.text}")
    return any(has_answer(forms, answer) for answer in answers)


def _line(
    id: object, question: str, answers: Sequence[str], gold: Document, others: Sequence[Document], group: str = ""
) -> Converted:
    """The line of a question whose gold document holds an answer.

    Answers that stand in the gold document come first, so that the first, which a sweep takes for the target unless it
    is asked for another, is one of them. Other passages stay if they hold none.
    """
    forms = word_forms(f"{gold.title} {gold.text}")
    answers = sorted(answers, key=lambda answer: not has_answer(forms, answer))
    apart = [document for document in others if not holds_any(document, answers)]
    ctxs = [{"title": d.title, "text": d.text, "hasanswer": d is gold, "isgold": d is gold} for d in (gold, *apart)]
    named = {"id": id} if isinstance(id, str | int) and not isinstance(id, bool) else {}
    line = {**named, "question": question, "answers": answers, "ctxs": ctxs} | ({"group": group} if group else {})
    return Converted(line, n_left_out=len(others) - len(apart))


def _distinct(answers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(answer.strip() for answer in answers if answer.strip()))


def of_squad(record: dict, folder: Path) -> Iterator[Converted]:
    """Questions of SQuAD 1.1 or 2: of an article as its files have it, or the one of a line of the package datasets.

    The passage is gold. There are no others; questions of an article form a group, so that its other passages are the
    first distractors.

    Args:
        record: An article (``title``, ``paragraphs`` of ``context`` and ``qas``), or ``context``, ``question``,
            ``answers`` with lists ``text`` and ``answer_start``, perhaps ``id`` and ``title``.
        folder: Not looked at.

    Raises:
        InputError: A record of another shape.
    """
    if "paragraphs" not in record:
        yield _squad_question(record, record, record.get("title"), _texts(_field(record, "answers", dict), "text"))
        return
    for paragraph in _field(record, "paragraphs", list):
        for asked in _field(paragraph, "qas", list):
            answers = [_field(answer, "text", str) for answer in _field(asked, "answers", list)]
            yield _squad_question(asked, paragraph, record.get("title"), answers)


def _squad_question(asked: dict, paragraph: dict, title: object, answers: Sequence[str]) -> Converted:
    question, title = _field(asked, "question", str).strip(), title if isinstance(title, str) else ""
    answers, gold = _distinct(answers), Document(title, _field(paragraph, "context", str))
    if not question:
        return Converted(None, NO_QUESTION)
    if not answers:
        return Converted(None, UNANSWERABLE)
    if not holds_any(gold, answers):
        return Converted(None, NOT_IN_PASSAGE)
    return _line(asked.get("id"), question, answers, gold, [], title)


def of_hotpotqa(record: dict, folder: Path) -> Iterator[Converted]:
    """The question of a record of HotpotQA in the distractor setting, of the authors' file or the package datasets.

    It takes two paragraphs, and here a question has one gold document: that is the supporting one that holds the
    answer, where only one does. The other supporting one, which says nothing of the answer, is the first distractor,
    and so stays in front while the gold document moves, as in ``tiny-hops``; the rest follow in their order.

    Args:
        record: ``question``, ``answer``, ``supporting_facts`` and ``context``; the latter are lists of pairs, or lists
            ``title`` and ``sent_id`` or ``sentences``.
        folder: Not looked at.

    Raises:
        InputError: A record of another shape.
    """
    question, answer = (_field(record, name, str).strip() for name in ("question", "answer"))
    facts, context = record.get("supporting_facts"), record.get("context")
    named = _field(facts, "title", list) if isinstance(facts, dict) else _firsts(record, "supporting_facts")
    if isinstance(context, dict):
        pairs = zip_longest(_texts(context, "title"), _field(context, "sentences", list))
    else:
        pairs = zip(_firsts(record, "context"), (pair[1] for pair in record["context"]), strict=True)
    paragraphs = [Document(title, _joined(title, sentences)) for title, sentences in pairs]
    yield _hotpotqa_question(record, question, answer, set(named), paragraphs)


def _firsts(record: dict, name: str) -> list[str]:
    """The titles of pairs."""
    pairs = _field(record, name, list)
    odd = [p for p in pairs if not (isinstance(p, list) and len(p) == 2 and isinstance(p[0], str))]
    if odd:
        raise InputError(f"expected {name!r} to be a list of pairs that begin with a title, got {reprlib.repr(odd[0])}")
    return [pair[0] for pair in pairs]


def _joined(title: Any, sentences: Any) -> str:
    if not isinstance(title, str) or not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise InputError(f"expected 'context' with sentences for every title, got {reprlib.repr([title, sentences])}")
    return " ".join(sentence.strip() for sentence in sentences if sentence.strip())


def _hotpotqa_question(
    record: dict, question: str, answer: str, named: set[str], paragraphs: Sequence[Document]
) -> Converted:
    if not question or not answer:
        return Converted(None, NO_ANSWER if question else NO_QUESTION)
    if answer.lower() in ("yes", "no"):
        return Converted(None, YES_OR_NO)
    supporting = [paragraph for paragraph in paragraphs if paragraph.title in named]
    gold = [paragraph for paragraph in supporting if holds_any(paragraph, [answer])]
    if len(gold) != 1:
        return Converted(None, SEVERAL_GOLD if gold else NOT_SUPPORTED)
    others = [*(p for p in supporting if p is not gold[0]), *(p for p in paragraphs if p.title not in named)]
    return _line(record.get("_id", record.get("id")), question, [answer], gold[0], others)


def of_triviaqa(record: dict, folder: Path) -> Iterator[Converted]:
    """The question of a record of TriviaQA (rc or unfiltered), of the authors' files or the package datasets.

    Its evidence, pages of entities before search results, are long texts. The first one that holds an answer gives the
    gold document: `PASSAGE_WORDS` words around where an answer first stands. Each of the others gives a distractor, its
    first `PASSAGE_WORDS` words, counted from its start in whole blocks, that hold none.

    Args:
        record: ``question``, ``answer`` with ``value`` and ``aliases``, ``entity_pages`` and ``search_results``, each
            of objects or an object of lists, with ``title`` and ``wiki_context`` or ``search_context``; the authors
            write ``Question``, ``EntityPages`` and so on, and the texts lie in files.
        folder: In whose neighbour ``evidence`` the authors' archive has those texts. A search result of which there is
            no text has its ``description``.

    Raises:
        InputError: A record of another shape.
    """
    record = _in_snake_case(record)
    question, answer = _field(record, "question", str).strip(), _field(record, "answer", dict)
    aliases = answer.get("aliases") or []
    answers = _distinct([_field(answer, "value", str), *(alias for alias in aliases if isinstance(alias, str))])
    if not {"entity_pages", "search_results"} & set(record):
        raise InputError("expected 'entity_pages' or 'search_results', got neither")
    texts = [*_evidence(record.get("entity_pages"), folder.parent / "evidence" / "wikipedia")]
    texts += _evidence(record.get("search_results"), folder.parent / "evidence" / "web")
    yield _triviaqa_question(record, question, answers, texts)


def _in_snake_case(value: Any) -> Any:
    """``EntityPages`` as ``entity_pages``, also within objects and lists."""
    if isinstance(value, dict):
        return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower(): _in_snake_case(own) for key, own in value.items()}
    return [_in_snake_case(own) for own in value] if isinstance(value, list) else value


def _evidence(value: object, folder: Path) -> Iterator[Document]:
    """Titles and texts, those without a text left out."""
    for row in _rows(value):
        texts = (row.get(name) for name in ("wiki_context", "search_context"))
        text = next((text for text in texts if isinstance(text, str) and text.strip()), None)
        text = text or _text_of_file(folder, row.get("filename")) or row.get("description")
        if isinstance(text, str) and text.strip():
            yield Document(row["title"] if isinstance(row.get("title"), str) else "", text)


def _text_of_file(folder: Path, name: object) -> str | None:
    """Of a file within a folder, if it is there."""
    path = folder / name if isinstance(name, str) and name else folder
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        return None
    return path.read_text(encoding="utf-8", errors="replace")


def _triviaqa_question(record: dict, question: str, answers: Sequence[str], texts: Sequence[Document]) -> Converted:
    if not question or not answers:
        return Converted(None, NO_ANSWER if question else NO_QUESTION)
    if not texts:
        return Converted(None, NO_EVIDENCE)
    gold, others = None, []
    for document in texts:
        passage = None if gold else passage_around(document, answers)
        if passage is not None:
            gold = passage
        else:
            others += passage_without(document, answers)
    if gold is None:
        return Converted(None, NOT_IN_EVIDENCE)
    return _line(record.get("question_id"), question, answers, gold, others)


def passage_around(document: Document, answers: Sequence[str]) -> Document | None:
    """`PASSAGE_WORDS` words of a text around the end of the answer that ends first; None if it holds none.

    The answer ends in the middle of the passage, or nearer to its ends where the text begins or ends.
    """
    words = document.text.split()

    def holds(start: int, n: int) -> bool:
        forms = word_forms(" ".join(words[start : start + n]))
        return any(has_answer(forms, answer) for answer in answers)

    windows = range(0, len(words), PASSAGE_WORDS)  # each overlaps the next by half, so that one has the answer whole
    first = next((start for start in windows if holds(start, 2 * PASSAGE_WORDS)), None)
    if first is None:
        return None
    n_words = bisect_left(range(2 * PASSAGE_WORDS), True, key=lambda n: holds(first, n))  # the fewest that hold one
    start = max(0, min(first + n_words - PASSAGE_WORDS // 2, len(words) - PASSAGE_WORDS))
    passage = Document(document.title, " ".join(words[start : start + PASSAGE_WORDS]))
    return passage if holds_any(passage, answers) else None  # an answer of more than half a passage may be cut


def passage_without(document: Document, answers: Sequence[str]) -> list[Document]:
    """The first block of `PASSAGE_WORDS` words of a text that holds no answer, as a list of one, or of none."""
    words = document.text.split()
    for start in range(0, len(words), PASSAGE_WORDS):
        block = Document(document.title, " ".join(words[start : start + PASSAGE_WORDS]))
        if not holds_any(block, answers):
            return [block]
    return []


DATA_SETS = {  # by the names in `refinelens.config`
    "squad": Source("SQuAD", "paragraphs of an article, or context, question and answers with text", of_squad),
    "hotpotqa": Source("HotpotQA", "question, answer, supporting_facts and context", of_hotpotqa),
    "triviaqa": Source("TriviaQA", "question, answer with value, entity_pages or search_results", of_triviaqa),
}
