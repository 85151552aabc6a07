"""Peak memory of reading every token of a long context: one pass beside chunks, at several lengths.

    OMP_NUM_THREADS=1 python benchmarks/long_context.py [--shapes tiny,tiny-gqa] [--tokens 8000,16000,32000] [--seed 0]
    OMP_NUM_THREADS=1 python benchmarks/long_context.py --shapes smollm2 --tokens 5000,8000

Random weights. Each read is `LogitLens.read` of all positions in a fork of its own, with KL and without a list of the
likeliest tokens; its peak is what the kernel accounts beyond what was there after a short read, which brings in the
pages of the libraries, the proof on the first 8,192 tokens apart (``proof``, once a model). Of that the keys and values
of all tokens are ``cache``, the statistics of all rows ``result``; ``rest`` is what remains in chunks. Argmaxes and
ranks of both ways are compared over all rows; those that differ are tied to rounding.
"""

from __future__ import annotations

import os
import pickle
import time
from functools import partial
from tempfile import TemporaryFile

import torch
from harness import llama_of, machine, options_of

from refinelens import LogitLens
from refinelens.bench.table import aligned
from refinelens.lens import chunks

POSITIONS = 65_536
SHAPES = {
    "tiny": llama_of(64, 256, 8, 4, 4, 1000, POSITIONS),  # a key and value for every head
    "tiny-gqa": llama_of(64, 256, 8, 4, 1, 1000, POSITIONS),  # heads share them
    # But for its vocabulary, which costs time and no memory.
    "smollm2": llama_of(576, 1536, 30, 9, 3, 4096, POSITIONS),
}


def main() -> None:
    """A line for every shape and length."""
    given = options_of(__doc__, shapes="tiny,tiny-gqa", tokens="8000,16000,32000", seed=0)
    print(f"{machine()}; peaks in MB\n")
    rows = [["model", "tokens", "one pass", "chunks", "cache", "result", "rest", "proof", "s, one pass", "s, chunks"]]
    rows[0] += ["argmaxes, ranks that differ"]
    for name in given.shapes.split(","):
        for n_tokens in map(int, given.tokens.split(",")):
            rows.append([name, str(n_tokens), *_measure(name, n_tokens, given.seed)])
    print("\n".join(aligned(rows)))


def _measure(name: str, n_tokens: int, seed: int) -> list[str]:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = SHAPES[name]()
    model = AutoModelForCausalLM.from_config(config).eval()
    lens = LogitLens(model)
    ids = torch.randint(3, config.vocab_size, (n_tokens,))

    def warm() -> None:
        lens.read(ids[:64], targets=ids[:64].roll(-1), top_k=0)

    warm()  # what a first pass allocates for good
    proof, proof_mb, _ = _forked(warm, lambda: chunks.prove_chunks(lens, chunks.chunk_tokens(lens)))

    def read(proven: bool) -> tuple:
        lens.proofs[chunks.chunk_tokens(lens)] = chunks.ChunkedPrefill(proven, "")
        reading = lens.read(ids, targets=ids.roll(-1), top_k=0)
        return reading.argmax, reading.rank, sum(v.numel() * v.element_size() for v in reading._values().values())

    whole, chunked = (_forked(warm, partial(read, proven)) for proven in (False, True))
    differ = [int((a != b).sum()) for a, b in zip(whole[0][:2], chunked[0][:2], strict=True)]
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * 4 * n_tokens / 2**20
    result = chunked[0][2] / 2**20
    numbers = [whole[1], chunked[1], cache, result, chunked[1] - cache - result, proof_mb]
    of = whole[0][0].numel()
    found = [f"{n:.0f}" for n in numbers] + [f"{whole[2]:.1f}", f"{chunked[2]:.1f}"]
    return [*found, f"{differ[0]}, {differ[1]} of {of}" + ("" if proof.used else f"; not proven: {proof.why}")]


def _forked(warm, work) -> tuple:
    """What a piece of work returns, its peak beyond what was there before, MB, and its processor time.

    A fork starts without the pages of libraries that its parent has read: ``warm`` reads them again.
    """
    with TemporaryFile() as file:
        if os.fork() == 0:
            warm()
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")  # the peak counts from here
            before, start = _peak(), time.process_time()
            result = work()
            pickle.dump((result, (_peak() - before) / 1024, time.process_time() - start), file)
            file.flush()
            os._exit(0)
        if os.wait()[1]:
            raise RuntimeError("the fork failed")
        file.seek(0)
        return pickle.load(file)


def _peak() -> int:
    """Largest resident set so far, kB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
