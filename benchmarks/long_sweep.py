"""A sweep of 100,000 contexts: is memory flat, is the time per question, and how soon does it stop?

    OMP_NUM_THREADS=1 python benchmarks/long_sweep.py FOLDER [--contexts 100000]

Writes long_sweep.csv and long_sweep.png to FOLDER. The model is a real one and tiny (GPT-2, 2 blocks, width 32), so
that what a sweep does around the model shows. Time is processor time, which other programs on the machine change
less. Half-way the process gets a SIGINT, as from Ctrl-C, and a second process resumes the run and finishes it.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median

import torch
import transformers
from harness import machine, options_of
from matplotlib.figure import Figure
from tokenizers import Tokenizer, models, pre_tokenizers

from refinelens import cli, progress
from refinelens.bench.table import aligned

DOCUMENTS = 10
STEPS = 100  # samples over the whole sweep
Sample = tuple[int, float, float, int]  # contexts, resident MB, ms a question, process
WORDS = """
the lamp of in is town door key red blue green black iron stone gate white brown Document Title Question Answer
"""


def main() -> None:
    """Run both processes, then write and print what they sampled."""
    options = options_of(__doc__, folder=True, contexts=100_000)
    n_questions, folder = options.contexts // DOCUMENTS, Path(options.folder)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        _save_model(work / "model")
        _save_task(work / "task.jsonl", n_questions)
        command = ["sweep", "--model", work / "model", "--task", work / "task.jsonl", "--documents", DOCUMENTS]
        samples, stopped = _run(work / "first.csv", n_questions, [*command, "--out", work / "run"], n_questions // 2)
        samples += _run(work / "second.csv", n_questions, ["sweep", "--resume", work / "run"])[0]
    with (folder / "long_sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("contexts", "resident_mb", "ms_per_question", "process"))
        writer.writerows(samples)
    _print(samples, stopped)
    _draw(samples, folder / "long_sweep.png")


def _save_model(folder: Path) -> None:
    vocab = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(WORDS.split()), *"0123456789"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": None, "eos_token_id": None}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=len(vocab), **sizes)).save_pretrained(folder)


def _save_task(path: Path, n_questions: int) -> None:
    """Every gold document is a distractor of other questions, as in a task of real size."""
    draw = random.Random(0)
    answers = ["red", "blue", "green", "black", "white", "brown"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(n_questions):
            answer = draw.choice(answers)
            gold = {"title": f"town {i}", "text": f"the lamp in town {i} is {answer}", "isgold": True}
            file.write(json.dumps({"question": f"the lamp of town {i}", "answers": [answer], "ctxs": [gold]}) + "\n")


def _run(log: Path, n_questions: int, command: list, stop_at: int = 0) -> tuple[list[Sample], float]:
    """Run the command line in a process of its own; its samples, and the seconds that it took to stop, if it had to."""
    child = [sys.executable, __file__, "--child", str(log), str(n_questions), str(stop_at), *map(str, command)]
    process = subprocess.Popen(child, stdout=subprocess.DEVNULL)
    while stop_at and process.poll() is None and not log.with_name(log.name + ".half").exists():
        time.sleep(0.05)
    if stop_at:
        process.send_signal(signal.SIGINT)
    sent = time.time()
    code = process.wait()
    seconds = time.time() - sent
    if code != (130 if stop_at else 0):
        sys.exit(f"expected the sweep to end well, got exit code {code}")
    with log.open(encoding="utf-8") as file:
        return [(int(a), float(b), float(c), process.pid) for a, b, c in csv.reader(file)], seconds


def _child(log: str, n_questions: str, stop_at: str, *command: str) -> int:
    """The sweep itself, sampled from its progress."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes deaf to it
    step, writer = max(1, int(n_questions) // STEPS), csv.writer(open(log, "w", encoding="utf-8", buffering=1))  # noqa: SIM115
    since = []

    def report(stage: str, done: int, total: int, *so_far: object) -> None:
        now = time.process_time()
        if since and done % step == 0:
            milliseconds = 1000 * (now - since[1]) / (done - since[0])
            writer.writerow((done * DOCUMENTS, round(_resident_mb(), 1), round(milliseconds, 2)))
        if not since or done % step == 0:
            since[:] = done, now
        if done == int(stop_at):
            Path(f"{log}.half").touch()

    progress.progress_bar = lambda: nullcontext(report)  # whether or not there is a terminal
    return cli.main(list(command))


def _resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _print(samples: list[Sample], stopped: float) -> None:
    n = len(samples)
    print(f"{samples[-1][0]} contexts of {DOCUMENTS} documents, {machine()}\n")
    rows = [["contexts", "resident MB", "ms of processor time a question (median)"]]
    for tenth in range(10):
        block = samples[tenth * n // 10 : (tenth + 1) * n // 10]
        resident, milliseconds = max(s[1] for s in block), median(s[2] for s in block)
        rows.append([str(block[-1][0]), f"{resident:.0f}", f"{milliseconds:.1f}"])
    print("\n".join(aligned(rows)))
    print(f"\nSIGINT half-way: the process ended after {stopped:.1f} s, tables and figures of that half included.")


def _draw(samples: list[Sample], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    for place, label in ((1, "resident memory\nMB"), (2, "processor time\nms a question")):
        for process, colour in zip(dict.fromkeys(s[3] for s in samples), ("#0072B2", "#D55E00"), strict=True):
            own = [s for s in samples if s[3] == process]
            axes[place - 1].plot([s[0] for s in own], [s[place] for s in own], color=colour)
        axes[place - 1].set_ylabel(label)
        axes[place - 1].set_ylim(0, 1.1 * max(s[place] for s in samples))
        axes[place - 1].grid(alpha=0.3)
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[1].set_xlabel("contexts (stopped by SIGINT half-way, then resumed by another process)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(_child(*sys.argv[2:]))
    main()
