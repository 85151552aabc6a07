"""The text that a tokenizer's chat template puts around a prompt."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, REPLY = "{prompt}", "{reply}"


@dataclass(frozen=True)
class Chat:
    """A conversation of one turn, the user's, up to where the reply begins.

    The text is rendered once for a run and kept in its manifest: a template may write the date.
    """

    template_sha256: str
    text: str  # with {prompt} once; special tokens are in it

    def __post_init__(self):
        if self.text.count(PROMPT) != 1:
            raise InputError(f"--chat: expected a chat template that writes the user's turn once, got {self.text!r}")

    def around(self) -> tuple[str, str]:
        """What stands before and after the prompt."""
        before, _, after = self.text.partition(PROMPT)
        return before, after


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's chat template.

    Raises:
        InputError: It has none, or several and no default.
    """
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()


def render_chat(tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat of a tokenizer, with the space, if any, that its template puts before a reply.

    Raises:
        InputError: No chat template, or one that does not render a user's turn.
    """
    template = _template(tokenizer)
    turn = [{"role": "user", "content": PROMPT}]
    try:
        text = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--chat: expected a chat template that renders a user's turn, got {what}") from None
    return Chat(template_hash(tokenizer), text + _space_before_reply(tokenizer, template, turn, text))


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    several = getattr(tokenizer, "chat_template", None)
    if isinstance(several, dict) and "default" not in several:
        raise InputError(
            f"--chat: expected a tokenizer with one chat template or one named default, got several, "
            f"{', '.join(sorted(several))}; name the one to use default in its files"
        )
    try:
        return tokenizer.get_chat_template()
    except (ValueError, NotImplementedError):
        raise InputError(
            f"--chat: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one; leave "
            "--chat out, or use an instruction-tuned model"
        ) from None


def _space_before_reply(tokenizer: PreTrainedTokenizerBase, template: str, turn: list[dict], opening: str) -> str:
    try:
        answered = [*turn, {"role": "assistant", "content": REPLY}]
        text = tokenizer.apply_chat_template(answered, chat_template=template, tokenize=False)
    except Exception:  # a template need not take a reply
        return ""
    between = text.partition(REPLY)[0].removeprefix(opening)
    return between if between.isspace() else ""
