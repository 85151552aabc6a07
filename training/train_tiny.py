"""Trains the model in the package from nothing, on contexts of its own language; stopped, it goes on where it was.

OMP_NUM_THREADS=1 python training/train_tiny.py --out refinelens/data/tiny
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from transformers import BatchEncoding, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from refinelens.data.generated import TRAINED, context_text, friends_text, vocabulary
from tiny_card import measure, one_question, two_hop_question, write_card
from tiny_init import initialise

N_POSITIONS = 320  # 20 documents of at most 9 tokens and ten questions of 11 fit, and 30 documents with one
TOKENS, QUESTIONS = 1024, 10  # of a step, of a context
ON_VALUES, ON_OTHERS = 2.5, 0.2  # weights of the loss
MUON_RATE, ADAMW_RATE = 0.005, 1e-3
WORK = Path("runs/tiny-training")
# Of the first stage, one hop: all steps; the first and last, over which the rates rise from 0 and fall to 0.
STEPS, WARM_UP, COOL_DOWN = 650, 50, 300
HOP_STEPS, HOP_WARM_UP, HOP_COOL_DOWN = 2000, 30, 500  # of the second, which goes on from there with two hops
HOP_RATE, ONE_HOP = 0.7, 0.25  # share of both rates at most, of batches that are as in the first stage
HOP_QUESTIONS = 8  # of a context with more than 12 documents, which with `QUESTIONS` would be too long
FEWEST, GROWTH, MOST = 4, 2, 20  # documents of a context at first, more at a time, at last; in each stage
EVERY, CONTEXTS, PASS = 25, 200, 0.8  # steps between looks, contexts of a look, accuracy that lets contexts grow


@dataclass
class Progress:
    """How far training is."""

    step: int = 0  # of both stages
    documents: int = FEWEST  # of a context, at most
    cpu_seconds: float = 0.0

    @property
    def two_hops(self) -> bool:
        """Whether it is in the second stage."""
        return self.step >= STEPS

    def rate(self) -> float:
        """What both learning rates are multiplied by."""
        if not self.two_hops:
            return min(1.0, (self.step + 1) / WARM_UP, (STEPS - self.step) / COOL_DOWN)
        step = self.step - STEPS
        return HOP_RATE * min(1.0, (step + 1) / HOP_WARM_UP, (HOP_STEPS - step) / HOP_COOL_DOWN)

    def grow(self, accuracy: float) -> None:
        """Lengthen the contexts if the longest are answered."""
        if accuracy > PASS:
            self.documents = min(self.documents + GROWTH, MOST)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word and sign of the language."""
    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", *vocabulary()])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def new_model(vocab_size: int) -> GPT2LMHeadModel:
    """GPT-2 of 8 blocks, initialised."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=N_POSITIONS, n_embd=128, n_layer=8, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh", bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    initialise(model)
    for block in model.transformer.h:
        parametrize.register_parametrization(block.attn.c_attn, "weight", _Apart())
    return model


class _Apart(nn.Module):
    """Queries, keys and values as three matrices, so that Muon scales the update of each by itself.

    At first the loss hardly depends on queries and keys; in one matrix the values' gradient would drown theirs.
    """

    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, dim=1)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        return weight.chunk(3, dim=1)


def optimisers_of(model: GPT2LMHeadModel) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices of the blocks, AdamW for embeddings, norms and biases."""
    matrices = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    return [
        torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAMW_RATE, weight_decay=0.0),
    ]


def batch(tokenizer: PreTrainedTokenizerFast, seed: int, progress: Progress) -> BatchEncoding:
    """About `TOKENS` tokens of contexts of one size: in every second step the longest, else of any size."""
    source = random.Random(f"{seed}/{progress.step}")
    if progress.two_hops and source.random() >= ONE_HOP:
        size = _size(source, 2, progress.documents)
        questions = QUESTIONS if size <= 12 else HOP_QUESTIONS
        count = max(1, round(TOKENS / (8.5 * size + 13 * questions)))
        texts = [friends_text(source, size, questions, TRAINED) for _ in range(count)]
    else:
        size = _size(source, 1, MOST if progress.two_hops else progress.documents)
        count = max(1, round(TOKENS / (8 * size + 11 * QUESTIONS)))
        texts = [context_text(source, size, QUESTIONS, TRAINED)[0] for _ in range(count)]
    return tokenizer(texts, padding=True, return_tensors="pt")


def _size(source: random.Random, fewest: int, most: int) -> int:
    return most if source.random() < 0.5 else source.randint(fewest, most)


def weighted_loss(model: GPT2LMHeadModel, ids: Tensor, mask: Tensor, asked: int) -> Tensor:
    """Cross-entropy of the next token, of ``ids`` and ``mask`` ``[batch, token]``; values follow the id ``asked``."""
    logits = model(input_ids=ids).logits[:, :-1]  # padding stands at the end, where causal attention never sees it
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = torch.where(ids[:, :-1] == asked, ON_VALUES, ON_OTHERS) * mask[:, 1:]
    return (loss * weight.flatten()).sum() / mask[:, 1:].sum()


class Checkpoint:
    """Everything that training goes on from, in one file."""

    def __init__(self, path: Path, model: GPT2LMHeadModel, optimisers: list[torch.optim.Optimizer]):
        self._path, self._parts = path, [model, *optimisers]

    def load(self) -> Progress:
        """What was saved last, or the start."""
        if not self._path.exists():
            return Progress()
        saved = torch.load(self._path)
        for part, state in zip(self._parts, saved["parts"], strict=True):
            part.load_state_dict(state)
        return Progress(**saved["progress"])

    def save(self, progress: Progress) -> None:
        """Replace what is there, all at once."""
        new = self._path.with_suffix(".new")
        torch.save({"parts": [part.state_dict() for part in self._parts], "progress": asdict(progress)}, new)
        os.replace(new, self._path)


def train(work: Path, seed: int) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, Progress]:
    """Train; checkpoints and a line of the log at every look go into ``work``."""
    torch.manual_seed(seed)
    tokenizer = word_tokenizer()
    asked = tokenizer.convert_tokens_to_ids(":")
    model = new_model(len(tokenizer))
    optimisers = optimisers_of(model)
    checkpoint = Checkpoint(work / "checkpoint.pt", model, optimisers)
    progress, losses, begun = checkpoint.load(), [], time.process_time()
    while progress.step < STEPS + HOP_STEPS:
        encoded = batch(tokenizer, seed, progress)
        loss = weighted_loss(model, encoded["input_ids"], encoded["attention_mask"], asked)
        loss.backward()
        for optimiser, rate in zip(optimisers, (MUON_RATE, ADAMW_RATE), strict=True):
            optimiser.param_groups[0]["lr"] = rate * progress.rate()
            optimiser.step()
            optimiser.zero_grad()
        losses.append(loss.item())
        count, draw = (CONTEXTS // 2, two_hop_question) if progress.two_hops else (CONTEXTS, one_question)
        progress.step += 1
        if progress.step % EVERY == 0:
            right = measure(model, tokenizer, f"look/{progress.step}", progress.documents, count, draw)
            progress.cpu_seconds += time.process_time() - begun
            begun = time.process_time()
            line = asdict(progress) | asdict(right) | {"loss": sum(losses) / len(losses)}
            with (work / "log.jsonl").open("a") as log:
                print(json.dumps(line), file=log)
            progress.grow(right.accuracy)
            if progress.step == STEPS:
                progress.documents = FEWEST
            checkpoint.save(progress)
            losses = []
    for block in model.transformer.h:
        parametrize.remove_parametrizations(block.attn.c_attn, "weight")
    return model, tokenizer, progress


def recipe(seed: int, progress: Progress) -> dict:
    """What the model card says of the training."""
    return {
        "seed": seed, "steps": progress.step, "first_steps": STEPS, "minutes": progress.cpu_seconds / 60,
        "tokens": TOKENS, "questions": QUESTIONS, "hop_questions": HOP_QUESTIONS, "one_hop": ONE_HOP,
        "on_values": ON_VALUES, "on_others": ON_OTHERS, "muon_rate": MUON_RATE, "adamw_rate": ADAMW_RATE,
        "warm_up": WARM_UP, "cool_down": COOL_DOWN, "hop_rate": HOP_RATE, "hop_warm_up": HOP_WARM_UP,
        "hop_cool_down": HOP_COOL_DOWN, "fewest": FEWEST, "growth": GROWTH, "most": MOST, "every": EVERY,
        "passing": PASS,
    }  # fmt: skip


def main() -> None:
    """Train, and write model, tokenizer and model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, default=WORK, help="checkpoint and log (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    arguments = parser.parse_args()
    for folder in (arguments.out, arguments.work):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model, tokenizer, progress = train(arguments.work, arguments.seed)
    model.half().save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    write_card(arguments.out, recipe(arguments.seed, progress))


if __name__ == "__main__":
    main()
