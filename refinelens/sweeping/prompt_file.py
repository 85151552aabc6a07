"""The contexts of a sweep as token ids, for another engine to run: ``refinelens prompts``."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..config import SweepConfig
from ..data.prompts import Context, render_chat
from ..errors import InputError
from ..lens.stored_states import HeadLens, StoredStates, context_id
from ..model.loading import HEAD, OUTLINE, load_model
from ..report.rows import counted
from ..store.files import write_output
from ..store.frames import check_new_file
from .contexts import ContextBuilder
from .inputs import check_words, load_questions

NO_WEIGHTS = {"device": "cpu", "dtype": "auto", "device_map": None, "max_memory": None, "quantize": None}


@dataclass(frozen=True)
class Prompts:
    """A file of contexts, and how many there are."""

    path: Path
    contexts: int
    tokens: int
    longest: int  # tokens

    def __str__(self) -> str:
        contexts, tokens = counted(self.contexts, "context"), counted(self.tokens, "token")
        return f"{self.path}: {contexts}, {tokens}, the longest has {self.longest}"


def write_prompts(options: SweepConfig, out: str | Path) -> Prompts:
    """Write every context that a sweep may ask the model for, a JSON object a line, in the sweep's order.

    Only tokenizer and configuration of the model are loaded. With ``states`` contexts that have a file there are left
    out, and the head of the model is loaded too.

    Args:
        options: Of the sweep.
        out: A new file, packed with gzip if its name ends in ``.gz``.

    Raises:
        InputError: Options that do not fit, an ``out`` that is there or cannot be written, or no context at all.
        FaultError: No free disk.
    """
    out = Path(out)
    check_new_file(out)
    lines = _lines(options)
    found = [0, 0, 0]

    def write(temporary: Path) -> None:
        with temporary.open("wb") as raw, _packed(raw, out.suffix == ".gz") as file:
            for line in lines:
                n_tokens = len(line["token_ids"])
                found[:] = found[0] + 1, found[1] + n_tokens, max(found[2], n_tokens)
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        if not found[0]:
            missing = "" if options.states is None else " that has no file yet"
            raise InputError(f"``out`` {out}: expected a context or more{missing}, got none, and nothing was written")

    write_output(out, write)
    return Prompts(out, *found)


def _packed(raw: IO[bytes], is_packed: bool) -> IO[bytes]:
    """What lines are written to; packed without name and time, so that the same contexts have the same bytes."""
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_packed else raw


def _lines(options: SweepConfig) -> Iterator[dict[str, Any]]:
    """Everything is loaded at once, and the contexts of a question made when they are asked for."""
    task, template, questions = load_questions(options)
    stored = None
    if options.states is None:
        loaded = load_model(options.model, part=OUTLINE, **options.loading | NO_WEIGHTS)
    else:
        loaded = load_model(options.model, part=HEAD, **options.loading)
        stored = StoredStates(options.states, HeadLens(loaded))
    check_words(options, template, questions, loaded)
    if options.chat:
        template = replace(template, chat=render_chat(loaded.tokenizer, options.shots))
    builder = ContextBuilder(options, task, template, loaded, stored)

    def lines() -> Iterator[dict[str, Any]]:
        written: dict[str, int] = {}  # the first position of what has a line
        for question in questions:
            own: dict[str, dict[str, Any]] = {}
            for alias, context in builder.every_context(question):
                if stored is None or not stored.has(context.input_ids):
                    _add(own, alias, context, options)
            for id, line in own.items():
                # Another question may have the same context: a line that reads more takes the place of the first.
                first = line["positions"][0]
                if first < written.get(id, first + 1):
                    written[id] = first
                    yield line

    return lines()


def _add(lines: dict[str, dict[str, Any]], alias: int, context: Context, options: SweepConfig) -> None:
    """Add a context to those of its question; contexts of the same tokens are one, read at the positions of all."""
    id, first = context_id(context.input_ids), context.answer_span.positions[0]
    if options.alias == "best":
        first = min(first, context.reply_span.positions[0])
    first = 0 if options.positions == "all" else first
    if id in lines:
        first = min(first, lines[id]["positions"][0])
        lines[id]["positions"] = list(range(first, len(context.input_ids)))
        return
    question, placement = context.question, context.placement
    lines[id] = {
        "id": id,
        "question_id": question.id,
        "source_id": question.source_id,
        "documents": context.n_documents,
        "gold_position": context.gold_position,
        "decoy_position": placement.decoy_position,
        "alias": alias,
        "answer": question.answers[alias],
        "token_ids": list(context.input_ids),
        "positions": list(range(first, len(context.input_ids))),
    }
