"""Errors that the command line prints as one line: input with exit code 2, faults with exit code 1."""


class InputError(ValueError):
    """Input that does not fit: says what was expected, what came and, where it helps, what to do."""


class UnsupportedModelError(InputError):
    """A model whose parts could not be found, or whose lens does not reproduce its own logits."""


class CannotAskError(InputError):
    """A question that cannot be asked of this model, and why, in a few words; a sweep leaves it out and counts it."""


class FaultError(RuntimeError):
    """Something broke under input that fits: no disk, no memory, an exception; says what is left and how to go on."""
