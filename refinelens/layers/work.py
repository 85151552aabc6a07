"""What an analysis loads, held to what the run was made of, and its mean contributions."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UnsupportedModelError
from ..runs.durable import write_whole
from ..runs.files import sha256_of
from ..runs.layers_folder import MEANS, LayersFolder
from ..runs.results import Run
from ..sweep.inputs import SweepInputs
from ..sweep.resume import Terms
from ..tasks.question import Question
from .examples import RunExamples
from .means import MeanContributions
from .options import LayerOptions
from .restarts import Restarts, check_restarts
from .scanner import Scanner


def open_scanner(run: Run, examples: RunExamples, options: LayerOptions) -> tuple[Scanner, dict[int, Question]]:
    """Load model, task and lens of a run, and its questions by id.

    Raises:
        InputError: Something that is no longer the run's, or a model whose blocks cannot be intervened on.
    """
    terms = Terms(run.path, examples.manifest, "layers")
    inputs = SweepInputs.load(terms.options, terms)
    lens = next(lens for lens in inputs.lenses if lens.name == examples.lens)
    restarts = check_restarts(inputs.logit_lens)
    _check_sublayers(type(inputs.loaded.model).__name__, restarts, options)
    targets = examples.by_key(examples.target_id)
    scanner = Scanner(options, inputs.builder(), inputs.logit_lens, lens, restarts, targets, examples.top)
    return scanner, {question.id: question for question in inputs.questions}


def prepare_means(
    scanner: Scanner,
    folder: LayersFolder,
    manifest: dict,
    questions: dict[int, Question],
    stop_if_told: Callable[[], None],
    report: Callable[[str, int, int], None],
) -> None:
    """Give the scanner the mean contributions over all contexts: from the disk, or one pass over every context."""
    path = folder.path / MEANS
    if path.exists() and sha256_of(path) == manifest["means_sha256"]:
        scanner.means = MeanContributions.load(path, scanner.device)
        return
    ids = manifest["questions"]
    scanner.begin_means(max(c.prompt_length for id in ids for c in scanner.contexts(questions[id])))
    for done, id in enumerate(ids):
        stop_if_told()
        report("means", done, len(ids))
        for context in scanner.contexts(questions[id]):
            scanner.add_to_means(context)
    write_whole(path, scanner.means.save)
    manifest |= {"means_sha256": sha256_of(path)}
    folder.write_manifest(manifest)


def _check_sublayers(name: str, restarts: Restarts, options: LayerOptions) -> None:
    if None in restarts.sublayers and {"attn", "mlp"} & set(options.interventions):
        raise UnsupportedModelError(
            f"{name}: expected blocks that add attention and feed-forward part to the residual stream and nothing "
            f"else, got another in block {restarts.sublayers.index(None) + 1}; use --interventions skip,mean,patch"
        )
