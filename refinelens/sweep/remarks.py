"""What a reader must know of the texts of a sweep: lines that are said when it begins and kept in its manifest."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..model.loading import LoadedModel
from ..model.tokens import encode, ids_of
from ..options import SweepOptions
from ..prompts.context import Template
from ..report.words import counted
from ..tasks.question import Question
from ..tasks.scoring import fold
from ..tasks.scripts import has_word_boundaries

LOOKED_AT = 100  # questions whose documents are read for unknown words
UNKNOWN_SHARE = 0.01  # of the tokens of documents, from which on it is said
THINKING = re.compile(r"[<\[](think|thinking|thought|reasoning|reason)[>\]]\s*$", re.IGNORECASE)


def remarks(options: SweepOptions, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """One line for each thing that numbers are read with, and that no number shows."""
    task = f"--task {options.task}"
    distinct = len({(question.question, question.answers) for question in questions})
    if distinct < len(questions):
        yield (
            f"{task}: {counted(len(questions), 'question')}, {distinct} of them distinct; tables and figures count "
            "equal ones as independent, so that intervals are too narrow"
        )
    yield from _special_tokens(task, template, questions, loaded)
    yield from _unknown_words(task, questions, loaded)
    yield from _prompt(options, template, questions, loaded)
    joined = sum(not has_word_boundaries(fold(" ".join(question.answers))) for question in questions)
    if joined and not template.format.pairs:
        yield (
            f"{task}: {counted(joined, 'question')} with answers in a script that does not set words apart; a passage "
            "that contains one anywhere is taken to hold it, which may leave out more than need be"
        )


def _special_tokens(task: str, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """Those in documents, where the prompt has some too, so that the tokenizer reads all alike."""
    if template.is_literal(loaded.tokenizer):
        return
    names = sorted(filter(None, loaded.tokenizer.all_special_tokens), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)))
    found = [match for question in questions if (match := special.search(_text_of(question)))]
    if found:
        yield (
            f"{task}: {counted(len(found), 'question')} with special tokens of the tokenizer in the text, such as "
            f"{found[0].group()!r}; the prompt has some of its own, so that the model reads these as special tokens too"
        )


def _text_of(question: Question) -> str:
    documents = (question.gold, *question.distractors)
    texts = [text for document in documents for text in (document.title, document.text)]
    return "\n".join([question.question, question.answer_prefix, *question.answers, *texts])


def _unknown_words(task: str, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    unknown = loaded.tokenizer.unk_token_id
    if unknown is None:
        return
    ids = [id for question in questions[:LOOKED_AT] for id in ids_of(loaded.tokenizer, question.gold.text)]
    share = ids.count(unknown) / max(1, len(ids))
    if share >= UNKNOWN_SHARE:
        yield (
            f"{task}: {share:.0%} of the tokens of the gold documents stand for words that the tokenizer does not "
            "know; the model cannot read those"
        )


def _prompt(options: SweepOptions, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """A second beginning of the text, and a chat that makes the model think before it answers."""
    tokenizer = loaded.tokenizer
    if template.chat is not None:
        opening = THINKING.search(template.chat.around()[1])
        if opening:
            yield (
                f"--chat: the template opens the reply with {opening.group().strip()!r}; the answer is read where the "
                "model would begin to think"
            )
        return
    prompt = template.fill(questions[0], [questions[0].gold], 0)[0]
    ids = encode(tokenizer, prompt, True, template.is_literal(tokenizer))["input_ids"]
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        yield (
            f"--template {options.template}: it begins with {tokenizer.bos_token!r}, which the tokenizer puts before "
            "every text by itself, so that contexts begin with two of them"
        )
