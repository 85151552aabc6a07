"""The fit of a lens: text -> residual stream -> statistics -> translators -> quality; stopped, and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import PLAIN, FitConfig
from ..data.texts import load_text
from ..errors import FaultError, InputError
from ..lens.files import FORMAT_VERSION, TENSORS, Lens, load_lens, save_lens
from ..lens.logit_lens import LogitLens, model_entry
from ..lens.translators import Translators
from ..machine import __version__, now, packages
from ..model.loading import is_out_of_memory, load_model
from ..model.split import is_offloaded
from ..progress import Progress, unseen
from ..report.figures import QUALITY_FIGURE, draw_quality
from ..report.quality import QUALITY_TABLE, write_quality
from ..store.files import check_disk, write_whole
from ..store.folder import MANIFEST, Folder, MadeOf
from ..store.process import Interrupted, StopSignals, working_on
from . import objectives
from .jacobian import (
    PROMPT_TOKENS,
    SKIPPED,
    JacobianEstimator,
    Jacobians,
    as_translators,
    check_from_layer,
    valid_positions,
)
from .objectives import Statistics, train
from .quality import measure
from .text import States

STATISTICS = "statistics.safetensors"
JACOBIANS = "jacobians.safetensors"
CHECKPOINT_SECONDS = 60.0
REPORT_TOKENS = 2048  # at most; all layers are read at each, by every lens
CHOOSE_TOKENS = 512  # the same, to tell which of two lenses reads a layer better
BEGIN_AGAIN = "pass ``overwrite=True`` to begin again"
HOW_TO_RESUME = "the same command goes on from the last checkpoint, if there is one"


class LensFolder(Folder):
    """A lens, which its manifest makes whole; before that, the statistics that a fit goes on from."""

    NAME = "a lens"
    DERIVED = (TENSORS, QUALITY_TABLE, QUALITY_FIGURE, STATISTICS, JACOBIANS)
    MARKS = (MANIFEST, STATISTICS, JACOBIANS)


def lens_folder(out: str) -> LensFolder:
    """The folder that a lens may be written to.

    Raises:
        InputError: A name that ``lens`` cannot take, or something else that lies there.
    """
    folder = LensFolder(Path(out))
    if folder.path.resolve().name in ("", PLAIN) or "," in folder.path.name or not out.strip():
        raise InputError(
            f"``out``: expected a folder that ``lens`` can name, without a comma and not {PLAIN}, got {out!r}"
        )
    folder.check_foreign()
    return folder


@dataclass(frozen=True, repr=False)
class Fitted:
    """A lens that was fitted: its folder and manifest."""

    path: Path
    manifest: dict

    @property
    def lens(self) -> Lens:
        """The lens itself, for `LogitLens.with_lens`."""
        return load_lens(str(self.path))

    def __repr__(self) -> str:
        tokens, jacobian = self.manifest.get("tokens"), self.manifest.get("jacobian")
        of = f"{jacobian['prompts']} prompts" if jacobian else f"{tokens['fit']} tokens"
        return f"Lens {self.path}: {self.manifest['kind']} lens of {self.manifest['model']['name']}, fitted on {of}"


def fit_lens(
    options: FitConfig,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    progress: Progress = unseen,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
) -> Fitted:
    """Fit a lens to a model and write its folder; a fit that was stopped goes on from its last checkpoint.

    Memory: ``32 * n_layers * d_model**2`` bytes of statistics, whatever the amount of text, and a third of that
    while the lens is made of them; as much on disk until it is written. On a CPU ``objective="kl"`` keeps up to 1 GiB
    of the text's states beside them.

    Args:
        options: What to fit.
        out: Folder of the lens, made here.
        overwrite: Replace a lens or a stopped fit that is there.
        argv: Command line, for the manifest.
        progress: Called with a stage, and how much of it is done.
        checkpoint_seconds: How long what was read may be on no disk.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: No free disk or no memory; the same call goes on from the last checkpoint.
        Interrupted: SIGINT or SIGTERM, after the current sequence and a checkpoint; a second one at once.
    """
    folder = lens_folder(out)
    with working_on(folder.path, "the current sequence, then a checkpoint", lambda: HOW_TO_RESUME) as signals:
        folder.remove_temporary()
        if folder.exists and not overwrite:
            raise InputError(
                f"``out`` {out}: expected a new folder, got a lens; choose another or pass ``overwrite=True``"
            )
        text = load_text(options.text)
        loaded = load_model(options.model, **options.loading)
        logit_lens = LogitLens(loaded.model)
        if options.objective == "jacobian":
            if is_offloaded(loaded.model):
                raise InputError(
                    "``objective='jacobian'``: expected a model whose weights stay in memory, got some that are loaded "
                    "when they are needed; use another ``device_map`` or objective"
                )
            check_from_layer(logit_lens, options.from_layer)
        statistics_bytes = 2 * 2 * 8 * logit_lens.n_layers * logit_lens.d_model**2  # fit, choose; two sums each; fp64
        check_disk(out, 2 * statistics_bytes)
        try:
            states = States(options, text, loaded, logit_lens)
            parts = (states, signals, progress, checkpoint_seconds)
            return Fitted(folder.path, _Fit(options, folder.path, overwrite, *parts).finish(argv))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise FaultError(
                f"``model`` {options.model}: expected memory for {statistics_bytes / 1e9:.1f} GB of statistics beside "
                "the model, got out of memory; use a larger machine or a smaller model"
            ) from None


@dataclass(frozen=True)
class _Fit:
    """A fit under way, in a folder that is held."""

    options: FitConfig
    path: Path  # of the lens
    overwrite: bool
    states: States
    signals: StopSignals
    progress: Progress
    checkpoint_seconds: float

    def finish(self, argv: list[str] | None) -> dict:
        """Fit and write everything; the manifest."""
        started, states = time.monotonic(), self.states
        split, text, loaded = states.split, states.text, states.loaded
        self.signals.finish_first()
        objective = self.options.objective
        prompts = self._prompts() if objective == "jacobian" else range(0)
        statistics = self._gather()
        jacobians = self._differentiate(prompts) if prompts else None
        lenses, strengths = self._solve(*statistics, jacobians)
        quality = measure(states.lens, self._sample(split.report, REPORT_TOKENS), {PLAIN: None, **lenses})
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": objective,
            "refinelens_version": __version__,
            "model": model_entry(loaded, states.lens),
            "dtype": loaded.dtype_name,
            "text": {"name": text.name, "sha256": text.sha256},
            "arguments": self.options.arguments(),
            "argv": argv,
            "packages": packages(),
            "finished": now(),
            "tokens": {
                "fit": split.tokens(split.fit),
                "choose": split.tokens(split.choose),
                "report": quality[PLAIN].tokens,
            },
            "ridge": strengths,
            **({} if jacobians is None else {"jacobian": self._jacobian_entry(jacobians)}),
            "quality": {name: asdict(of_lens) for name, of_lens in quality.items()},
            "seconds": round(time.monotonic() - started, 3),
        }
        write_quality(self.path, manifest)
        draw_quality(self.path, manifest)
        manifest = save_lens(self.path, lenses[objective], manifest)
        for file in (STATISTICS, JACOBIANS):
            (self.path / file).unlink(missing_ok=True)
        return manifest

    def _identity(self) -> dict:
        """What two fits must share for one to go on where the other stopped."""
        split, loaded = self.states.split, self.states.loaded
        return {
            "tokens": self.options.tokens,
            "text_sha256": self.states.text.sha256,
            "config_sha256": loaded.config_sha256,
            "weights_sha256": loaded.weights_sha256,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "device": loaded.device.type,
            "sequences": [len(split.fit), len(split.choose), len(split.report)],
        }

    def _save(self, file: str, identity: dict, done: int, tensors: dict[str, Tensor]) -> None:
        """Write the sums of the first ``done`` things."""
        metadata = {"identity": json.dumps(identity), "done": str(done)}
        write_whole(self.path / file, lambda path: save_file(tensors, path, metadata))

    def _begun(self, file: str, identity: dict, sums: dict[str, Tensor]) -> int:
        """Things that a stopped fit has done, whose sums are put into ``sums``; 0 of a new one.

        Raises:
            InputError: The file is of another fit (the first difference is named), or damaged, and must not be
                overwritten.
        """
        try:
            return self._read(file, identity, sums) if (self.path / file).exists() else 0
        except InputError:
            if not self.overwrite:
                raise
            return 0

    def _read(self, file: str, identity: dict, sums: dict[str, Tensor]) -> int:
        try:
            with safe_open(self.path / file, framework="pt") as opened:
                metadata = opened.metadata()
                tensors = {key: opened.get_tensor(key) for key in sums}
            there, done = json.loads(metadata["identity"]), int(metadata["done"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"``out`` {self.path}: expected a whole {file}, got: {error}; {BEGIN_AGAIN}") from None
        made_of = MadeOf(self.path, there, "``out``", "the stopped fit", BEGIN_AGAIN)
        for key, value in identity.items():
            made_of.require(key, value)
        if any(tensors[key].shape != own.shape for key, own in sums.items()):
            raise InputError(f"``out`` {self.path}: expected a whole {file}, got sums of other shapes; {BEGIN_AGAIN}")
        for key, tensor in tensors.items():
            sums[key].copy_(tensor)
        return done

    def _sum(self, stage: str, things: Iterator[Tensor], add: Callable, save: Callable, done: int, end: int) -> None:
        """Add up what is left of ``end`` things, kept on disk now and then and when all are there.

        Args:
            stage: For `progress`.
            things: From the one numbered ``done`` on.
            add: Called with a thing's number and the thing.
            save: Called with how many are done.
            done: Things that are summed already.
            end: Number of all.
        """
        saved, adding = time.monotonic(), False
        self.progress(stage, done, end)
        try:
            for thing in things:
                adding = True
                add(done, thing)
                done, adding = done + 1, False
                self.progress(stage, done, end)
                if self.signals.received is not None or time.monotonic() - saved > self.checkpoint_seconds:
                    save(done)
                    saved = time.monotonic()
                    self.signals.stop_if_received()
        except Interrupted:  # the checkpoint is written, or it was the second signal
            raise
        except KeyboardInterrupt:  # not by our signals: from another thread, or from ``progress``
            if not adding:  # a thing that was added by half is in no state to go on from
                save(done)
            raise
        save(done)

    def _gather(self) -> tuple[Statistics, Statistics]:
        """Statistics of the sequences to fit on and to choose by."""
        lens, split, identity = self.states.lens, self.states.split, self._identity()
        fit, choose = (Statistics.empty(lens.n_layers, lens.d_model, lens.head.weight.device) for _ in range(2))
        sums = fit.tensors("fit") | choose.tensors("choose")
        done = self._begun(STATISTICS, identity, sums)
        self._sum(
            *("reading", self.states.of(range(done, split.choose.stop))),
            lambda number, hidden: (fit if number in split.fit else choose).add(hidden),
            lambda number: self._save(STATISTICS, identity, number, sums),
            *(done, split.choose.stop),
        )
        return fit, choose

    @property
    def _prompt_tokens(self) -> int:
        return min(PROMPT_TOKENS, self.states.split.length)

    def _prompts(self) -> range:
        """The sequences, of those to fit on, whose beginnings are the prompts of a Jacobian lens.

        Raises:
            InputError: There are not so many, or they are too short.
        """
        split, first, count = self.states.split, self.options.prompts_from, self.options.prompts
        if first + count > len(split.fit):
            raise InputError(
                f"``prompts``: expected at most {max(0, len(split.fit) - first)}, one for each sequence of "
                f"{split.length} tokens to fit on from number {first} on, got {count}; give more ``tokens`` or text"
            )
        valid_positions(self._prompt_tokens)
        return range(first, first + count)

    def _differentiate(self, prompts: range) -> Jacobians:
        """Sums of the Jacobians of some prompts."""
        states, n_tokens, from_layer = self.states, self._prompt_tokens, self.options.from_layer
        estimate = JacobianEstimator(states.lens, from_layer)
        own = {"from_layer": from_layer, "prompts_from": prompts.start, "prompt_tokens": n_tokens}
        jacobians, identity = Jacobians.empty(estimate.n_layers, states.lens.d_model), self._identity() | own
        sums = jacobians.tensors()
        done = self._begun(JACOBIANS, identity, sums)
        if done > len(prompts):
            raise InputError(
                f"``prompts``: expected at least the {done} that the stopped fit in {self.path} has, got "
                f"{len(prompts)}; give as many, or {BEGIN_AGAIN}"
            )
        self._sum(
            *("differentiating", (estimate(ids[:n_tokens]) for ids in states.some(prompts[done:]))),
            lambda number, jacobian: jacobians.add(jacobian),
            lambda number: self._save(JACOBIANS, identity, number, sums),
            *(done, len(prompts)),
        )
        return jacobians

    def _jacobian_entry(self, jacobians: Jacobians) -> dict:
        """What the manifest says of the estimate."""
        return {
            "prompts": jacobians.n_prompts,
            "prompts_from": self.options.prompts_from,
            "prompt_tokens": self._prompt_tokens,
            "sequence_tokens": self.states.split.length,
            "positions_skipped": SKIPPED,
            "from_layer": self.options.from_layer,
            "errors": jacobians.errors(),
        }

    def _stage(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is that comes after the last checkpoint, or stop there."""
        self.progress(stage, done, total)
        self.signals.stop_if_received()

    def _solve(
        self, fit: Statistics, choose: Statistics, jacobians: Jacobians | None
    ) -> tuple[dict[str, Translators], list[float]]:
        """The translators of every objective up to the one asked for, as the model needs them; the ridge strengths."""
        self._stage("solving", 0, 1)
        translators, strengths = objectives.solve(fit, choose)
        lenses = {"linear": translators}
        if self.options.objective == "kl":
            lenses["kl"] = self._train(translators, fit)
        if jacobians is not None:
            lenses["jacobian"] = as_translators(jacobians.mean(), self.states.lens.n_layers)
        try:
            return {name: self.states.lens.adapted(lens) for name, lens in lenses.items()}, strengths
        except InputError as error:
            raise InputError(f"``dtype``: {error}") from None

    def _train(self, start: Translators, statistics: Statistics) -> Translators:
        """The trained translators, but at layers where ``start`` reads the sequences to choose by better."""
        states, options, lens = self.states, self.options, self.states.lens
        on_step = partial(self._stage, "training")
        texts = (statistics, lambda: states.of(states.split.fit))
        trained = train(lens, start, *texts, options.steps, options.seed, on_step)
        both = {"start": lens.adapted(start), "trained": lens.adapted(trained)}
        quality = measure(lens, self._sample(states.split.choose, CHOOSE_TOKENS), both)
        pairs = zip(quality["trained"].kl[:-1], quality["start"].kl[:-1], strict=True)
        better = torch.tensor([trained_kl < start_kl for trained_kl, start_kl in pairs], device=trained.bias.device)
        return Translators(
            torch.where(better[:, None, None], trained.weight, start.weight),
            torch.where(better[:, None], trained.bias, start.bias),
        )

    def _sample(self, sequences: range, tokens: int) -> Iterator[Tensor]:
        """The states of a sample of so many tokens of some sequences."""
        for index, hidden in enumerate(self.states.sample(sequences, tokens)):
            self._stage("measuring", index, len(sequences))
            yield hidden
