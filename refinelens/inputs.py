"""All that a sweep reads, loaded and, where a run goes on, compared with what the run was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .backends import choose_backend
from .lens_files import Lens, fit_to_model, load_lenses
from .logit_lens import LogitLens
from .manifest import make_manifest
from .models import LoadedModel, load_model
from .options import SweepOptions
from .predict import Predictor
from .prompts import load_template
from .results import Outcome
from .task import Question, Task, choose_questions, load_task


@dataclass(frozen=True)
class SweepInputs:
    """Task, questions, template, lenses and model of a sweep; make one with `SweepInputs.load`."""

    options: SweepOptions
    task: Task
    template: str
    questions: list[Question]
    lenses: list[Lens]
    loaded: LoadedModel
    logit_lens: LogitLens

    @classmethod
    def load(
        cls, options: SweepOptions, require: Callable[[str, object], None] = lambda field, value: None
    ) -> SweepInputs:
        """Load everything, the quick things first; ``require`` refuses what is not as a run has it."""
        task = load_task(options.task)
        require("task.sha256", task.sha256)
        template = load_template(options.template)
        require("template", template)
        questions = choose_questions(task, options.examples, options.seed)
        lenses = load_lenses(options.lens)
        for index, lens in enumerate(lenses):
            require(f"lenses.{index}.sha256", lens.sha256)
        loaded = load_model(options.model, options.device, options.dtype)
        require("model.device", loaded.model.device.type)
        require("model.dtype", str(loaded.model.dtype).removeprefix("torch."))
        for name in ("config_sha256", "weights_sha256", "tokenizer_sha256"):
            require(f"model.{name}", getattr(loaded, name))
        logit_lens = LogitLens.from_model(loaded.model)
        require("model.backend", choose_backend(loaded.model.device.type, logit_lens.backend)[0])
        lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
        return cls(options, task, template, questions, lenses, loaded, logit_lens)

    def manifest(self, argv: list[str] | None, workers: int, questions_per_part: int) -> dict:
        """The manifest of a run that starts now."""
        things = (self.task, self.template, self.loaded, self.logit_lens, self.lenses)
        counts = {"n_questions": len(self.questions), "questions_per_part": questions_per_part, "workers": workers}
        return make_manifest(self.options.arguments(), argv, *things, **counts)

    def predictor(self) -> Predictor:
        """What asks the questions."""
        return Predictor(self.options, self.task, self.template, self.loaded, self.logit_lens, self.lenses)

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, Outcome]]:
        """Ask the questions at these places one after another, each with its outcome, until ``stopped``."""
        predictor = self.predictor()
        for place in places:
            if stopped():
                return
            yield place, predictor.ask(self.questions[place])
