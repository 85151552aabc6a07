"""The sweep: task -> prompts -> capture -> lens -> results, one question at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache

import torch

from .errors import InputError
from .lens import LensStats
from .logit_lens import LogitLens
from .manifest import make_manifest, now
from .models import LoadedModel, load_model
from .prompts import Context, build_context, gold_positions, load_template
from .report import write_outputs
from .results import Run, check_disk, check_output, create_run, disk_error
from .task import DistractorSource, Question, Task, choose_questions, load_task

QUESTIONS_PER_PART = 8
TOKENS_PER_BATCH = 16384  # of one forward pass on a GPU, padding included
CONTEXT_TOO_LONG = "a context longer than the model's positions"
TOO_FEW_DISTRACTORS = "too few passages without an answer"


@dataclass(frozen=True)
class SweepOptions:
    """Everything that decides the numbers of a run, except what the machine decides."""

    model: str = "smollm2"
    task: str = "builtin"
    documents: tuple[int, ...] = (5, 10)  # context sizes, the gold document included
    gold_positions: str = "all"
    examples: int | None = None  # questions drawn; None for all
    target: str = "answer"
    answer_tokens: str = "first"
    top: int = 1
    template: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if not self.documents or min(self.documents) < 1:
            raise InputError(f"--documents: expected sizes of at least 1 such as 5,10, got {self.documents}")
        for size in self.documents:
            gold_positions(self.gold_positions, size)
        if self.top < 1:
            raise InputError(f"--top: expected at least 1, got {self.top}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size: expected auto or a positive number, got {self.batch_size!r}")

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return {**asdict(self), "documents": list(self.documents)}


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C after the run was begun; everything that was finished has been written."""


@dataclass
class Progress:
    """What a sweep tells while it runs."""

    questions: int
    done: int = 0
    rows: int = 0  # rows of the lens: layers x positions


def run_sweep(
    options: SweepOptions,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Run:
    """Run a sweep and write its folder; an interrupt keeps what is finished, with its summary.

    Args:
        options: What to run.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        report: Called after every question.

    Raises:
        InputError: Input that does not fit, or no free disk; finished parts stay readable.
        SweepInterrupted: Ctrl-C, after the finished questions and their summary were written.
    """
    arguments = options.arguments()
    check_output(out, overwrite, arguments)
    task = load_task(options.task)
    template = load_template(options.template)
    questions = choose_questions(task, options.examples, options.seed)
    loaded = load_model(options.model, options.device, options.dtype)
    lens = LogitLens.from_model(loaded.model)
    check_disk(out, _bytes_needed(options, len(questions), lens.n_layers))
    manifest = make_manifest(arguments, argv, task, template, loaded, lens, len(questions))
    run = create_run(out, manifest)
    sweeper = _Sweeper(options, task, template, loaded, lens)
    try:
        try:
            _write_parts(run, sweeper, questions, manifest, report)
        finally:
            write_outputs(run)
    except OSError as error:
        raise disk_error(out, error) from None
    if not sweeper.counts["rows"]:
        reasons = "; ".join(f"{count} at {reason}" for reason, count in sweeper.left_out.items())
        raise InputError(f"expected at least one question that can be asked, got none ({reasons}); change --documents")
    return run


def _write_parts(run: Run, sweeper: _Sweeper, questions: list[Question], manifest: dict, report) -> None:
    progress = Progress(len(questions))
    started = time.monotonic()
    status, rows, part = "failed", [], 0
    try:
        report(progress)
        for question in questions:
            rows += sweeper.rows(question)
            progress.done += 1
            progress.rows = sweeper.counts["lens_rows"]
            report(progress)
            if progress.done % QUESTIONS_PER_PART == 0:
                run.write_part(part, rows)
                rows, part = [], part + 1
        status = "finished"
    except KeyboardInterrupt:
        status = "interrupted"
        raise SweepInterrupted from None
    finally:
        if rows:
            run.write_part(part, rows)
        manifest["status"], manifest["finished"] = status, now()
        manifest["seconds"] = round(time.monotonic() - started, 3)
        manifest["counts"] |= {"done": progress.done, **sweeper.summary_counts()}
        run.write_manifest(manifest)


class _Sweeper:
    """Turns questions into prediction rows."""

    def __init__(self, options: SweepOptions, task: Task, template: str, loaded: LoadedModel, lens: LogitLens):
        self.options = options
        self.counts: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self._template = template
        self._loaded = loaded
        self._lens = lens
        self._distractors = DistractorSource(task, options.seed)
        self._text = cache(lambda token_id: loaded.tokenizer.decode([token_id]))

    def summary_counts(self) -> dict:
        """Counts for the manifest."""
        return {**self.counts, "left_out": dict(self.left_out)}

    def rows(self, question: Question) -> list[dict]:
        """Prediction rows of one question at every context size and gold position it can be asked at."""
        contexts = [c for size in self.options.documents for c in self._contexts(question, size)]
        rows = []
        for batch in self._batches(contexts):
            rows += self._run(batch)
        self.counts["contexts"] += len(contexts)
        self.counts["rows"] += len(rows)
        return rows

    def _contexts(self, question: Question, size: int) -> list[Context]:
        """All gold positions of a context size, or none: a sweep is paired."""
        distractors = self._distractors.choose(question, size - 1)
        if distractors is None:
            self.left_out[f"{size} documents: {TOO_FEW_DISTRACTORS}"] += 1
            return []
        contexts = [
            build_context(self._loaded.tokenizer, self._template, question, distractors, position)
            for position in gold_positions(self.options.gold_positions, size)
        ]
        limit = self._loaded.max_tokens
        if limit is not None and any(len(c.input_ids) > limit for c in contexts):
            self.left_out[f"{size} documents: {CONTEXT_TOO_LONG}"] += 1
            return []
        return contexts

    def _batches(self, contexts: list[Context]) -> Iterator[list[Context]]:
        if not contexts:
            return
        if self.options.batch_size != "auto":
            size = int(self.options.batch_size)
        elif self._loaded.model.device.type == "cpu":
            size = 1  # several contexts at a time bring nothing on a CPU
        else:
            size = max(1, TOKENS_PER_BATCH // max(len(c.input_ids) for c in contexts))
        for start in range(0, len(contexts), size):
            yield contexts[start : start + size]

    def _run(self, batch: list[Context]) -> list[dict]:
        try:
            stats, targets = self._statistics(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise InputError(
                    f"--device: expected memory for one context of {len(batch[0].input_ids)} tokens, got out of "
                    "memory; use fewer documents, a smaller model or --dtype bfloat16"
                ) from None
            torch.cuda.empty_cache()
            half = len(batch) // 2
            return self._run(batch[:half]) + self._run(batch[half:])
        self.counts["lens_rows"] += stats.argmax.numel()
        return [row for index, context in enumerate(batch) for row in self._rows(context, index, stats, targets)]

    def _statistics(self, batch: list[Context]) -> tuple[LensStats, torch.Tensor]:
        """Statistics ``[n_layers + 1, batch, answer tokens]`` and targets ``[batch, answer tokens]``, on the CPU.

        Contexts are padded on the right, and answers by repeating their last token; padded rows are not used.
        """
        device = self._loaded.model.device
        n_tokens = max(len(c.input_ids) for c in batch)
        n_answers = max(len(c.answer_ids) for c in batch)
        ids = torch.tensor([_pad(c.input_ids, n_tokens, c.input_ids[-1]) for c in batch], device=device)
        mask = torch.tensor([_pad([1] * len(c.input_ids), n_tokens, 0) for c in batch], device=device)
        positions = torch.tensor([_pad(c.positions, n_answers, c.positions[-1]) for c in batch])
        answers = torch.tensor([_pad(c.answer_ids, n_answers, c.answer_ids[-1]) for c in batch], device=device)
        hidden = self._lens.hidden(ids, positions, mask)
        targets = answers if self.options.target == "answer" else self._lens.stats(hidden[-1]).argmax
        return self._lens.stats(hidden, targets).to("cpu"), targets.cpu()

    def _rows(self, context: Context, index: int, stats: LensStats, targets: torch.Tensor) -> Iterator[dict]:
        start, end = context.gold_span or (None, None)
        for token, answer_id in enumerate(context.answer_ids):
            layers = {
                name: getattr(stats, name)[:, index, token].tolist()
                for name in ("argmax", "target_rank", "target_logprob", "max_logprob", "entropy")
            }
            target_id = int(targets[index, token])
            yield {
                "question_id": context.question.id,
                "documents": context.n_documents,
                "gold_position": context.gold_position,
                "answer_token": token,
                "n_tokens": len(context.input_ids),
                "gold_start": start,
                "gold_end": end,
                "answer_id": answer_id,
                "answer_text": self._text(answer_id),
                "target_id": target_id,
                "target_text": self._text(target_id),
                "argmax_text": [self._text(token_id) for token_id in layers["argmax"]],
                **layers,
            }


def _pad(values, length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]


def _bytes_needed(options: SweepOptions, n_questions: int, n_layers: int) -> int:
    """Upper estimate: 64 bytes per layer and 512 per row uncompressed, four answer tokens a question."""
    n_contexts = sum(len(gold_positions(options.gold_positions, size)) for size in options.documents)
    return n_questions * n_contexts * 4 * ((n_layers + 1) * 64 + 512) + (4 << 20)
