"""What a run says, summarised once. Reads results only; no torch, no model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..runs.results import Run
from ..runs.trajectory_table import choose_tokens, read_trajectories
from .caution import Caution, find_cautions
from .inverted_u import InvertedU, inverted_u_tests
from .paired import PairedDifference, paired_differences
from .summary import SummaryRow, summarise


@dataclass(frozen=True)
class Report:
    """What the tables and figures of a run say of its chosen answer tokens."""

    manifest: dict
    rows: list[SummaryRow]
    differences: list[PairedDifference]
    tests: list[InvertedU]
    cautions: list[Caution]

    @property
    def lenses(self) -> tuple[str, ...]:
        """Names of the lenses, in the order given."""
        return lens_names(self.manifest)

    @property
    def has_generations(self) -> bool:
        """Whether the model wrote texts that are scored."""
        return self.manifest["arguments"]["generate"] > 0

    @property
    def tops(self) -> tuple[int, ...]:
        """Thresholds, in the order given."""
        return tuple(self.manifest["arguments"]["top"])


def lens_names(manifest: dict) -> tuple[str, ...]:
    """Names of a run's lenses, in the order given."""
    return tuple(entry["name"] for entry in manifest["lenses"])


def read_report(run: Run, tops: tuple[int, ...] | None = None) -> Report:
    """Summarise the predictions that a run has.

    Args:
        run: The run.
        tops: Thresholds in place of the run's own.

    Raises:
        InputError: A part that is not as it was written, or none yet.
    """
    manifest = run.manifest
    if tops is not None:
        manifest["arguments"]["top"] = list(tops)
    lenses, tops = lens_names(manifest), tuple(manifest["arguments"]["top"])
    n_layers, seed = manifest["model"]["n_layers"], manifest["seed"]
    table = read_trajectories(run, tops)
    if not len(table):
        raise InputError(
            f"{run.path}: expected a run with rows, got none yet; refinelens sweep --resume {run.path} goes on with it"
        )
    table = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    cautions = find_cautions(table, lenses, tops, n_layers)
    blind = {(caution.lens, caution.top) for caution in cautions}
    tests = inverted_u_tests(table, lenses, tops, blind, seed)
    rows = summarise(table, lenses, tops, n_layers, seed, manifest["counts"]["left_out"])
    return Report(manifest, rows, paired_differences(table, lenses, tops, seed), tests, cautions)
