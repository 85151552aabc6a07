"""Memory of a model on disk against its whole size.

    python benchmarks/offload.py

Makes a random Llama in bfloat16, which is read in float32, and runs a text of 64 tokens in a process of its own for
each: whole, and with a part of it on disk. All have the same ranks, or this stops. Memory is what a process holds
beside files that it maps, at its most, less what it held before it loaded the model.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

LAYERS, WIDTH = 16, 768


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        whole = run(folder, None)
        size = 2 * sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"{LAYERS} blocks of width {WIDTH}, {size / 1e6:.0f} MB in float32")
        print("| allowed | peak to load, MB (of the whole) | of gate and pass | seconds to load | a pass | ranks |")
        print("| --- | --- | --- | --- | --- | --- |")
        for limit in (None, size // 2, size // 4, size // 8):
            found = whole if limit is None else run(folder, limit)
            if found["ranks"] != whole["ranks"]:
                sys.exit("the ranks are others")
            allowed = "all" if limit is None else f"{limit / 1e6:.0f} MB"
            peaks = " | ".join(f"{found[key] / 1e6:.0f} ({found[key] / size:.2f})" for key in ("peak", "peak_pass"))
            numbers = f"{peaks} | {found['load']:.1f} | {found['pass']:.2f}"
            print(f"| {allowed} | {numbers} | equal |")


def make(folder: str) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from refinelens.model.loading import TINY

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=16, num_key_value_heads=16, **sizes)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(folder: str, limit: int | None) -> dict:
    words = [sys.executable, __file__, folder, str(limit or "")]
    # By default glibc keeps what was freed of weights, for those that come next.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(words, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def child(folder: str, limit: str) -> None:
    import torch

    from refinelens import LogitLens, load_model

    before = anonymous()
    peak = [before]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    where = {"device_map": "auto", "max_memory": f"cpu={int(limit) // 1024}KiB"} if limit else {"device": "cpu"}
    loaded = load_model(folder, **where)
    at_load, peak[0] = peak[0], anonymous()
    lens, ready = LogitLens(loaded.model), time.perf_counter()
    ids = torch.arange(64)[None]
    reading, end = lens.read(ids, 5, -1), time.perf_counter()
    found = {"ranks": reading.rank.flatten().tolist(), "peak": at_load - before, "peak_pass": peak[0] - before}
    print(json.dumps(found | {"load": ready - start, "pass": end - ready}))


def anonymous() -> int:
    """Bytes that this process holds in memory, but for mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
