"""One context of a run for logit-lens widgets in a browser: their JSON format, version 2.

The format is that of github.com/davidbau/logitlenskit (docs/DATA_FORMAT.md): ``meta``, ``layers``, ``input`` (texts of
the tokens shown), ``tracked`` (per token the probabilities, layer by layer, of all that comes up in its column),
``topk`` (per layer and token the most likely next tokens). A run stores the most likely token alone, so the model runs
again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .data.prompts import Context
from .errors import InputError
from .lens.files import Lens
from .lens.logit_lens import LogitLens
from .lens.runner import ForwardRunner
from .machine import now
from .model.identity import text_of
from .op.vocabulary import lens_top_k
from .report.rows import counted
from .store.files import write_output
from .store.results import Run
from .sweeping.contexts import pick
from .sweeping.inputs import SweepInputs
from .sweeping.run_spec import RunSpec
from .view_config import WidgetConfig

DIGITS = 5  # of a probability


def export_lens_json(run: Run, path: Path, choice: WidgetConfig) -> str:
    """Run the model on one context of a run again and write what a widget shows; says in words which context.

    Raises:
        InputError: No such context or lens in the run, more likely tokens than there are, or a model, task or lens
            that is no longer the run's; also a file that cannot be written.
        FaultError: No free disk.
    """
    if run.vocab_size is not None and choice.k > run.vocab_size:
        raise InputError(f"``k``: expected at most the {run.vocab_size} tokens of the vocabulary, got {choice.k}")
    spec = RunSpec(run.path, run.manifest, "export")
    inputs = SweepInputs.load(spec.options, spec)
    lens = pick("``lens``", inputs.lenses, lambda lens: lens.name, choice.lens)
    which = (choice.question, choice.documents, choice.gold_position, choice.decoy_position)
    context = inputs.context(*which)
    tokenizer = inputs.loaded.tokenizer
    data = {
        "meta": {"version": 2, "timestamp": now(), "model": inputs.loaded.name},
        **widget(inputs.logit_lens, lens, context, choice.tokens, choice.k, lambda id: text_of(tokenizer, id)),
    }
    text = json.dumps(data, ensure_ascii=False) + "\n"
    write_output(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    shown, there = len(data["input"]), counted(len(context.input_ids), "token")
    tokens = f"all {there}" if shown == len(context.input_ids) else f"the last {shown} of {there}"
    return f"{context.where}, {lens.name}: {tokens} x {len(data['layers'])} layers"


def widget(
    logit_lens: LogitLens, lens: Lens, context: Context, n_tokens: int, k: int, text: Callable[[int], str]
) -> dict:
    """``layers``, ``input``, ``tracked`` and ``topk`` of the last tokens of a context.

    Args:
        logit_lens: The model.
        lens: What reads the layers before the output.
        context: Prompt and answer; the answer's tokens and what follows the shown ones are tracked too.
        n_tokens: How many tokens are shown.
        k: How many next tokens stand in ``topk``.
        text: The text of a token id.
    """
    ids = context.input_ids
    positions = torch.arange(max(0, len(ids) - n_tokens), len(ids))
    following = [*ids, context.answer_ids[-1]][int(positions[0]) + 1 :]
    states = ForwardRunner(logit_lens).states(ids, positions.tolist(), context.where)  # [n_layers + 1, token, d_model]
    states = states if lens.translators is None else lens.translators(states)
    top = lens_top_k(states, logit_lens.head, k, backend=logit_lens.backend).ids.cpu()
    logsumexp = logit_lens.stats(states).logsumexp
    columns = []
    for place, next_id in enumerate(following):
        seen = torch.cat([top[:, place].flatten(), torch.tensor([next_id])]).unique()
        logits = _logits(logit_lens, states[:, place], seen)
        columns.append((seen.tolist(), (logits - logsumexp[:, place, None]).exp().T.tolist()))
    names = [_names(seen, text) for seen, _ in columns]
    return {
        "layers": list(range(logit_lens.n_layers + 1)),
        "input": [text(ids[position]) for position in positions.tolist()],
        "tracked": [
            {own[id]: [round(p, DIGITS) for p in curve] for id, curve in zip(seen, curves, strict=True)}
            for own, (seen, curves) in zip(names, columns, strict=True)
        ],
        "topk": [[[own[id] for id in cell] for own, cell in zip(names, row, strict=True)] for row in top.tolist()],
    }


def _logits(logit_lens: LogitLens, states: Tensor, ids: Tensor) -> Tensor:
    """``[rows, ids]`` of a few tokens in fp32."""
    head = logit_lens.head
    ids = ids.to(head.weight.device)
    return replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids]).logits(states)


def _names(ids: list[int], text: Callable[[int], str]) -> dict[int, str]:
    """The text of each id, with the id where two have the same, as parts of one character do."""
    texts = {id: text(id) for id in ids}
    count = Counter(texts.values())
    return {id: name if count[name] == 1 else f"{name} #{id}" for id, name in texts.items()}
