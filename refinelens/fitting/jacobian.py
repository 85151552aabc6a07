"""The Jacobian lens: how much each number of a layer's residual stream moves each number of the last one, on average.

``J_l = E[d h_final / d h_l]`` (Anthropic 2026, "Verbalizable Representations Form a Global Workspace in Language
Models"), by the estimator of its authors' code: for each output dimension a one-hot cotangent at every valid position
at once, whose gradients are averaged over the valid positions of layer l, and over prompts. A gradient thereby sums
what a state does to its own position and to all later ones. Positions near the start, where models park attention, and
the last one are not valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache

from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.prefix import check_branching
from ..lens.runner import in_batches
from ..lens.translators import Translators
from ..model.hooks import first_state, hooked, run_base, stream_of
from ..model.loading import is_out_of_memory

PROMPT_TOKENS = 128  # of a prompt, at most
SKIPPED = 16  # positions at the start of a prompt that are not valid
COTANGENTS, COTANGENTS_CUDA = 8, 64  # output dimensions of one backward pass; a CPU's caches hold few
HALVES = 2  # sums of every other prompt, from which the error of their mean is told


class Jacobians:
    """Sums of the Jacobians of prompts, in two halves: what a fit goes on from, whatever the number of prompts."""

    def __init__(self, sums: Tensor, counts: Tensor):
        self.sums = sums  # fp64 [half, n_layers - from_layer, d_model of the last layer, d_model of layer l]
        self.counts = counts  # int64 [half], prompts

    @classmethod
    def empty(cls, n_layers: int, d_model: int) -> Jacobians:
        """Of no prompt, for so many layers."""
        return cls(torch.zeros(HALVES, n_layers, d_model, d_model, dtype=torch.float64), torch.zeros(HALVES).long())

    def tensors(self) -> dict[str, Tensor]:
        """The sums themselves by name, for a file and to be filled from one."""
        return {"sums": self.sums, "counts": self.counts}

    @property
    def n_prompts(self) -> int:
        """Prompts that were added."""
        return int(self.counts.sum())

    def add(self, jacobian: Tensor) -> None:
        """Take the Jacobian of a prompt, ``[n_layers - from_layer, d_model, d_model]``, into the half that is next."""
        half = self.n_prompts % HALVES
        self.sums[half] += jacobian
        self.counts[half] += 1

    def mean(self) -> Tensor:
        """Over all prompts, fp32 ``[n_layers - from_layer, d_model, d_model]``."""
        return (self.sums.sum(0) / self.counts.sum()).float()

    def errors(self) -> list[float] | None:
        """See `relative_errors`; None of a single prompt."""
        return relative_errors(list(self.sums / self.counts[:, None, None, None]), self.counts.tolist())


def relative_errors(means: Sequence[Tensor], counts: Sequence[int]) -> list[float] | None:
    """Of each layer the standard error of the mean Jacobian, as a share of its size (Frobenius norms).

    ``SE^2 = sum_i w_i^2 |J_i - J|^2 / (1 - sum_i w_i^2)`` of means ``[layer, d_model, d_model]`` of n_i prompts with
    ``w_i = n_i / sum n``, whose variances are as 1 / n_i; of two equal halves that is half the norm of their
    difference. None where a mean has no prompt.
    """
    if min(counts) == 0 or len(counts) < 2:
        return None
    weights = [count / sum(counts) for count in counts]
    mean = sum(weight * own for weight, own in zip(weights, means, strict=True))
    apart = [weight * torch.linalg.matrix_norm(own - mean) for weight, own in zip(weights, means, strict=True)]
    error = (torch.stack(apart).square().sum(0) / (1.0 - sum(weight**2 for weight in weights))).sqrt()
    return (error / torch.linalg.matrix_norm(mean)).tolist()


def as_translators(jacobian: Tensor, n_layers: int) -> Translators:
    """The lens of Jacobians ``[layer, d_model, d_model]`` of the highest layers below the output; others stay plain."""
    d_model = jacobian.shape[-1]
    weight = torch.zeros(n_layers, d_model, d_model)
    weight[n_layers - len(jacobian) :] = jacobian - torch.eye(d_model)
    return Translators(weight, torch.zeros(n_layers, d_model))


def valid_positions(n_tokens: int) -> range:
    """Positions of a prompt that are averaged over.

    Raises:
        InputError: A prompt that has none.
    """
    if n_tokens < SKIPPED + 2:
        raise InputError(
            f"``objective='jacobian'``: expected prompts of at least {SKIPPED + 2} tokens, of which the first "
            f"{SKIPPED} and the last are left out, got {n_tokens}; give more ``tokens``, or a model with more positions"
        )
    return range(SKIPPED, n_tokens - 1)


def check_from_layer(lens: LogitLens, from_layer: int) -> None:
    """Raises InputError where there is no such layer below the output."""
    if not 0 <= from_layer < lens.n_layers:
        raise InputError(
            f"``from_layer``: expected a layer below the output, 0 to {lens.n_layers - 1}, got {from_layer}"
        )


class JacobianEstimator:
    """Jacobians of prompts by backward passes over one forward pass, many output dimensions at a time.

    What comes before the valid positions is run without a graph and gone on from by its keys and values, where the
    model is proven to do that: no path from a valid position leads there.
    """

    def __init__(self, lens: LogitLens, from_layer: int):
        check_from_layer(lens, from_layer)
        self._lens, self._from = lens, from_layer
        self._branches = check_branching(lens).used
        self._batched = True  # whether backward passes can be batched in this model

    @property
    def n_layers(self) -> int:
        """Layers that get a Jacobian."""
        return self._lens.n_layers - self._from

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """The Jacobian of one prompt, fp32 ``[n_layers - from_layer, d_model, d_model]``, rows by output dimension.

        Memory: the graph of one forward pass from ``from_layer`` on, and `COTANGENTS` gradients of it.

        Raises:
            InputError: A prompt too short, see `valid_positions`.
        """
        valid, lens = valid_positions(len(ids)), self._lens
        tokens = torch.tensor([list(ids)], device=lens.device)[:, : valid.stop]
        cache, start = None, 0
        with lens.undisturbed(), _frozen(lens.model), sdpa_kernel(SDPBackend.MATH):  # which has batched gradients
            if self._branches:
                cache, start = DynamicCache(), valid.start
                run_base(lens.model, tokens[:, :start], cache=cache)
            with _graph(lens.blocks, self._from) as streams:
                run_base(lens.model, tokens[:, start:], cache=cache, gradients=True)
        places = slice(valid.start - start, valid.stop - start)
        jacobian = torch.empty(self.n_layers, lens.d_model, lens.d_model)
        most = COTANGENTS_CUDA if tokens.is_cuda else COTANGENTS

        def work(rows: list[int]) -> tuple[list[int], Tensor]:
            return rows, self._rows(streams, rows, places)

        for rows, gradients in in_batches(range(lens.d_model), work, lambda left: most):
            jacobian[:, rows] = gradients
        return jacobian

    def _rows(self, streams: list[Tensor], rows: list[int], places: slice) -> Tensor:
        """Rows of the Jacobian of every layer, ``[n_layers - from_layer, len(rows), d_model]``, on the CPU."""
        output = streams[-1]
        cotangents = output.new_zeros(len(rows), *output.shape)
        for i, row in enumerate(rows):
            cotangents[i, 0, places, row] = 1.0
        if self._batched:
            try:
                gradients = torch.autograd.grad(
                    output, streams[:-1], cotangents, retain_graph=True, is_grads_batched=True
                )
                return _means(gradients, places)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._batched = False  # an operation of this model has no batched gradient
        one = [torch.autograd.grad(output, streams[:-1], own, retain_graph=True) for own in cotangents]
        return _means([torch.stack(own) for own in zip(*one, strict=True)], places)


def _means(gradients: Sequence[Tensor], places: slice) -> Tensor:
    """Gradients ``[row, 1, token, d_model]`` of every layer, averaged over positions."""
    return torch.stack([own[:, 0, places].float().mean(1).cpu() for own in gradients])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the block no parameter asks for a gradient, so that a graph holds the residual stream's part alone."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _graph(blocks: nn.ModuleList, from_layer: int) -> Iterator[list[Tensor]]:
    """Within the block a pass with gradients fills the yielded list: the streams of layers ``from_layer`` to the last.

    The graph begins at the first of them, so that what lies below costs nothing.
    """
    streams: list[Tensor] = []
    first = blocks[from_layer]

    def before(module, args, kwargs):
        if module is not first or streams:
            return None
        stream = first_state(args, kwargs)
        streams.append(stream.detach().requires_grad_())
        own = tuple(streams[0] if value is stream else value for value in args)
        return own, {name: streams[0] if value is stream else value for name, value in kwargs.items()}

    def after(_module, _args, _kwargs, output):
        if streams:
            streams.append(stream_of(output))

    with hooked(blocks, before, after):
        yield streams
