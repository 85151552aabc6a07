"""A causal LM cut to its first block, for lenses of states that another engine computed.

Embedding, first block, final norm and unembedding are the checkpoint's own. Norm, unembedding, softcap and logit scale
act on whatever the last block puts out, so that `find_head` and the parity gate find and prove them behind the first
block as behind the last.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import UnsupportedModelError
from .head import BLOCK_COUNTS, find_blocks


def count_blocks(config: PreTrainedConfig) -> int:
    """How many transformer blocks a configuration states, an encoder's hidden behind the decoder's.

    Raises:
        UnsupportedModelError: It states none.
    """
    stated = [getattr(config.get_text_config(), name, None) for name in BLOCK_COUNTS]
    found = next((count for count in stated if isinstance(count, int) and count > 0), None)
    if found is None:
        raise UnsupportedModelError(
            f"{type(config).__name__}: expected a number of blocks, one of {', '.join(BLOCK_COUNTS)}, got none"
        )
    return found


def cut_to_one_block(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a configuration that has one block, and of every list over blocks the first entry."""
    short, n_layers = copy.deepcopy(config), count_blocks(config)
    text = short.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == n_layers:
            setattr(text, name, value[:1])
    for name in BLOCK_COUNTS:
        if getattr(text, name, None) == n_layers:
            setattr(text, name, 1)
    return short


def without_other_blocks(keys: Iterable[str], model: PreTrainedModel) -> list[str]:
    """Names of a checkpoint's tensors but for those of the blocks that a model was cut by."""
    blocks = find_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    of_block = re.compile(rf"(^|\.){re.escape(path.rpartition('.')[2])}\.[1-9]\d*\.")
    return [key for key in keys if not of_block.search(key)]


@contextmanager
def unlisted() -> Iterator[None]:
    """Within the block Transformers does not list the tensors of the other blocks, which it has no place for."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
