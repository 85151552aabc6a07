"""Errors that the command line prints as one line: input with exit code 2, faults with exit code 1.

A message names a parameter in double backquotes, as Python has it: ``documents``, ``dtype='float32'``,
``overwrite=True``, ``sweep(resume='runs/first')``. The command line alone makes options of these, when it prints a line
(`refinelens.cli.in_options`): --documents, --dtype float32, --overwrite, refinelens sweep --resume runs/first.
"""


class InputError(ValueError):
    """Input that does not fit: says what was expected, what came and, where it helps, what to do."""


class UnsupportedModelError(InputError):
    """A model whose parts could not be found, or whose lens does not reproduce its own logits."""


class CannotAskError(InputError):
    """A question that cannot be asked of this model, and why, in a few words; a sweep leaves it out and counts it."""


class FaultError(RuntimeError):
    """Something broke under input that fits: no disk, no memory, an exception; says what is left and how to go on."""


def resume_call(path: object) -> str:
    """What goes on with an interrupted or damaged run, as messages name it."""
    return f"``sweep(resume='{path}')``"
