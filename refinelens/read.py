"""`refinelens read`: every layer of one text, or of one context of a run, as a map to look at."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache

from .errors import InputError
from .layers.sublayers import HALVES, by_layer, read_sublayers
from .lens.files import load_lenses
from .lens.inputs import Tokens, targets_of
from .lens.logit_lens import LogitLens, fit_to_model
from .lens.reading import LayerReading, heat_map
from .machine import __version__, device_name
from .model.loading import LoadedModel, load_model
from .options import check_idle
from .pages.figure import draw_heatmap
from .pages.heatmap import NEXT, PREDICTION, HeatMap, Segment
from .pages.terminal import print_heatmap
from .store.files import write_output
from .store.results import Run
from .sweeping.generate import Generator, check_cache
from .sweeping.inputs import SweepInputs
from .sweeping.run_spec import RunSpec
from .view_config import MID, POST, ReadConfig

SHOWN_TOKENS = 24  # of a terminal
INSIDE = {
    "behind attention": "layer l is the stream between the attention and the feed-forward part of block l + 1; the "
    "last one the output",
    "adds": "to the target's logit, through the final norm as it is at the output; of all layers, also those not "
    "shown, the parts and a constant of biases sum up to the logit, which was checked",
}
# Options that a run decides, and those that choose one of its contexts.
OF_THE_RUN = ("model", "lens", "device", "dtype", "trust_remote_code", "generate")
OF_A_RUN = ("question", "documents", "gold_position", "decoy_position")


def read_text(
    text: str, options: ReadConfig, given: Container[str] = (), argv: Sequence[str] | None = None
) -> HeatMap:
    """Read a text through every lens, from one forward pass.

    Args:
        text: What is read.
        options: How, and how it is shown.
        given: Names of the options that were given.
        argv: Command line, for the page.

    Raises:
        InputError: No text, options that choose a context of a run, no such model or lens, a target that is not one
            token, or more tokens than the model has positions.
    """
    for name in OF_A_RUN:
        if name in given:
            raise InputError(f"``{name}``: expected the folder of a run beside this option, got a text: {text!r}")
    if options.points == MID:
        check_idle(given, ["lens"], "points='post'", "mid, which the plain lens alone reads")
    loaded = load_model(options.model, **options.loading)
    lens = LogitLens(loaded.model, loaded.tokenizer)
    lenses, facts = [], _command(argv)
    for own in load_lenses(options.lens):
        fitted = fit_to_model(own, loaded, lens)
        with warnings.catch_warnings(action="ignore"):  # said here
            lenses.append(lens if own.translators is None else lens.with_lens(fitted))
        facts |= {f"lens {own.name}": fitted.note} if fitted.note else {}
    ids = list(loaded.tokenizer(text)["input_ids"])
    if not ids:
        raise InputError("text: expected a token or more, got none; pass some text")
    n_prompt = len(ids)
    if loaded.max_tokens is not None and n_prompt > loaded.max_tokens:
        raise InputError(
            f"text: expected at most {loaded.max_tokens} tokens, for which {loaded.name} has positions, got {n_prompt}"
        )
    if options.generate:
        ids = written(lens, loaded, ids, options.generate)
    segments = [Segment(n_prompt, len(ids), "generated", "generated")] if len(ids) > n_prompt else []
    title = text if len(text) <= 100 else f"…{text[-99:]}"
    return map_of(lens, lenses, loaded, ids, options, title, segments, facts)


def read_context(
    run: Run, options: ReadConfig, given: Container[str] = (), argv: Sequence[str] | None = None
) -> HeatMap:
    """Read one context of a run again, answer included, with its documents marked.

    Args:
        run: The run, whose model, lenses, device and dtype are taken.
        options: Which context, and how it is shown.
        given: Names of the options that were given.
        argv: Command line, for the page.

    Raises:
        InputError: Options that a run decides, no such context, or a model, task or lens that is no longer the run's.
    """
    for name in OF_THE_RUN:
        if name in given:
            raise InputError(f"``{name}``: expected none beside a run, whose own is used; leave it out")
    spec = RunSpec(run.path, run.manifest, "read")
    inputs = SweepInputs.load(spec.options, spec)
    context = inputs.context(*(getattr(options, name) for name in OF_A_RUN))
    kinds = {place: kind for kind, places in context.placement.spans.items() for place in places}
    segments = [
        Segment(*span, f"document {place}{f', {kinds[place]}' if place in kinds else ''}", kinds.get(place, "document"))
        for place, span in enumerate(inputs.builder().document_spans(context))
        if span is not None
    ]
    n_prompt, n_tokens = context.prompt_length, len(context.input_ids)
    if n_tokens > n_prompt:
        segments.append(Segment(n_prompt, n_tokens, "answer", "answer"))
    lens = inputs.logit_lens
    lens.tokenizer = inputs.loaded.tokenizer  # which the copies below have too
    with warnings.catch_warnings(action="ignore"):  # the run has said it
        lenses = [lens if own.translators is None else lens.with_lens(own) for own in inputs.lenses]
    facts = {"context": f"{context.where} of {run.path}"} | _command(argv)
    title = f"{context.question.question} ({context.where})"
    ids, following = list(context.input_ids), context.answer_ids[-1]
    return map_of(lens, lenses, inputs.loaded, ids, options, title, segments, facts, following)


def map_of(
    plain: LogitLens,
    lenses: Sequence[LogitLens],
    loaded: LoadedModel,
    ids: list[int],
    options: ReadConfig,
    title: str,
    segments: Sequence[Segment],
    facts: dict[str, str],
    following: int | None = None,
) -> HeatMap:
    """The map of a text's last tokens: one forward pass, and of each lens one product with the unembedding a statistic.

    Args:
        plain: The plain lens of the model.
        lenses: What it is read through.
        loaded: That model.
        ids: Of the text.
        options: How it is shown.
        title: Of the page.
        segments: What belongs together, by places in ``ids``.
        facts: That stand under the map, before those of the model.
        following: The token that follows the text; None where only the model says one.
    """
    lens, n = plain, len(ids)
    first = max(0, n - (options.tokens or n))
    positions = torch.arange(first, n)
    hidden = lens.hidden(torch.tensor([ids]), positions)  # [n_layers + 1, 1, token, d_model]
    targets, target_id = _targets(lens, hidden, [*ids[first + 1 :], following], options.target)
    shown = Tokens(torch.tensor([ids]), None, positions[None], is_batch=False)
    readings: list[LayerReading] = []
    for one in lenses if options.points != MID else ():
        k = min(options.top_k, one.head.vocab_size)
        readings.append(replace(one.read_states(hidden[:, 0], targets, top_k=k, check_last=False), tokens=shown))
    added = {}
    if options.points != POST:
        k = min(options.top_k, lens.head.vocab_size)
        inside = read_sublayers(lens, ids, targets, range(first, n), top_k=k)
        readings.append(inside.mid)
        added = {mid: {half: by_layer(inside, half, mid) for half in HALVES} for mid in (False, True)}
    own = [replace(s, start=max(0, s.start - first), end=s.end - first) for s in segments if s.end > first]
    words = _words_of_target(options.target, readings[0].text, target_id, following is not None)
    facts = facts | model_facts(loaded, lens) | (INSIDE if options.points != POST else {})
    if options.points == MID:
        del facts["layers"]
    found = heat_map(readings, title=title, target_is=words, every=options.layers, segments=own, facts=facts)
    if not added:
        return found
    note = {False: "", True: INSIDE["behind attention"]}
    of_mid = [one.name == inside.mid.lens for one in found.lenses]
    own_lenses = zip(found.lenses, of_mid, strict=True)
    return replace(found, lenses=[replace(one, **added[mid], note=note[mid]) for one, mid in own_lenses])


def _targets(
    lens: LogitLens, hidden: Tensor, next_ids: list[int | None], target: str
) -> tuple[Tensor, int | None]:
    """Of every column ``[token]``, and the id of a token of one's own; for an unknown next token the model's own."""
    if target not in (PREDICTION, NEXT):
        (one,) = targets_of([target], lens.tokenizer).tolist()  # type: ignore[union-attr]
        return torch.tensor(one), one
    own = lens.stats(hidden[-1, 0]).argmax.cpu()
    if target == PREDICTION:
        return own, None
    return torch.tensor([int(own[i]) if id is None else id for i, id in enumerate(next_ids)]), None


def written(lens: LogitLens, loaded: LoadedModel, ids: list[int], limit: int) -> list[int]:
    """The text with up to ``limit`` tokens more, always the argmax at the output; an end-of-sequence token ends it."""
    if loaded.max_tokens is not None:
        limit = min(limit, loaded.max_tokens - len(ids))
    if limit < 1:
        return ids
    generator = Generator.from_model(loaded, lens, limit, one_line=False)
    (found,) = generator.generate([ids], [0], DynamicCache() if check_cache(lens).used else None)
    return [*ids, *found.ids]


def model_facts(loaded: LoadedModel, lens: LogitLens) -> dict[str, str]:
    """What a reader needs to trust the numbers."""
    parity = lens.parity
    dtype, device = str(lens.head.weight.dtype).removeprefix("torch."), lens.head.weight.device.type
    return {
        "model": f"{loaded.name} ({type(loaded.model).__name__}), {lens.n_layers} layers, {lens.head.vocab_size} "
        f"tokens, {dtype} on {device_name(device)}",
        "checked": f"at the last layer the lens is the model's own prediction: logits differ by at most "
        f"{parity.max_difference:.2g}, allowed {parity.tolerance * parity.logit_range:.2g} (of a range of "
        f"{parity.logit_range:.3g})",
        "ranks": "exact over the whole vocabulary, 1 is best; of equal logits the lower id comes first",
        "layers": "0 is the embedding output, i the output of block i, the last one the model's own prediction",
        "likeliest": "log-probabilities of the lists in steps of 0.001 nats; all else as computed",
        "made by": f"refinelens {__version__}, torch {torch.__version__}",
    }


def _words_of_target(target: str, text: Callable[[int], str], target_id: int | None, ends: bool) -> str:
    """What a target is, for a reader: the model's own prediction, the text's next token, or a token by name.

    Args:
        target: As it was asked for.
        text: Of a token.
        target_id: Of a token by name.
        ends: Whether it is known what follows the last token.
    """
    if target == PREDICTION:
        return "the model's own prediction"
    if target == NEXT:
        return "the token that follows" + ("" if ends else " (behind the last one the model's own prediction)")
    return repr(text(target_id)) if target_id is not None else target


def _command(argv: Sequence[str] | None) -> dict[str, str]:
    return {} if argv is None else {"command": shlex.join(argv)}


def show(map: HeatMap, options: ReadConfig, files: dict[str, str | None], console: Console) -> None:
    """Write what was asked for, or else print the map.

    Args:
        map: What was read.
        options: How it is shown.
        files: By ``html``, ``png`` and ``json``.
        console: Where the map is printed where no file is asked for.
    """
    asked = {kind: Path(path) for kind, path in files.items() if path is not None}
    if not asked:
        print_heatmap(console, map.last(options.tokens or SHOWN_TOKENS), options.measure)
    for kind, path in asked.items():
        shown = len(map.tokens)
        if kind == "png":
            shown = min(len(map.tokens), options.tokens or SHOWN_TOKENS)
            figure = draw_heatmap(map, options.measure, shown)
            write_output(path, lambda temporary, figure=figure: figure.savefig(temporary, dpi=150, format="png"))
        else:
            text = map.to_html() if kind == "html" else map.to_json()
            write_output(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
        console.print(f"{path}: {shown} tokens x {len(map.layers)} layers", highlight=False, soft_wrap=True)


