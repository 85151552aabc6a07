"""Errors a user can mend; the command line prints them as one line and exits with code 2."""


class InputError(ValueError):
    """Input that does not fit: says what was expected, what came and, where it helps, what to do."""


class UnsupportedModelError(InputError):
    """A model whose parts could not be found, or whose lens does not reproduce its own logits."""
