"""For the API reference: the comment behind a field of a dataclass, its shape and dtype, is the field's docstring."""

import griffe


class FieldComments(griffe.Extension):
    """Griffe reads docstrings alone, and comments are how the fields of tensors are described here."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: object) -> None:
        """Called for every attribute; ``attr.lines`` is its statement as it stands in the file."""
        comment = attr.lines[-1].partition("  # ")[2] if attr.lines else ""
        if attr.docstring is None and comment and not comment.startswith(("noqa", "type:")):
            attr.docstring = griffe.Docstring(comment, parent=attr)
