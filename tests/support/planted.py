"""A causal LM whose refinement depth is known by construction: where its answers are is set by the gold position.

It knows the language of the tiny model. At the token before an answer its blocks write, one after the other, which
token is the best: the answer at block `FIRST` and from a block on that depends on the gold position and, by a hash of
the question, on chance; a value of no document in all others.
"""

import zlib
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from refinelens.data.generated import VALUES
from refinelens.model.loading import load_model

FIRST, BLOCKS = 3, 12
SHAPES = {  # by the kind of a gold position: layers that refinement takes on average
    "inverted-u": {"first": 2, "middle": 4, "last": 2},
    "u": {"first": 4, "middle": 2, "last": 4},
    "flat": {"first": 3, "middle": 3, "last": 3},
    "rising": {"first": 2, "middle": 3, "last": 4},
}
NOISE = 2  # layers, at most, by which a context differs from the mean


class PlantedConfig(transformers.PretrainedConfig):
    model_type = "planted"

    def __init__(self, words=(), shape="flat", **more):
        self.words, self.shape, self.vocab_size = list(words), shape, len(words)
        self.num_hidden_layers, self.hidden_size = BLOCKS, len(words) + 3
        super().__init__(**more)


@dataclass
class Planted:
    """What a context says at its last token: the answer's token, and the block from which it stays the best."""

    answer: int = 0
    settle: int = FIRST


class Embedding(nn.Embedding):
    """Zeros, but for what the blocks are told at every token: answer, settle, and a token that is wrong."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.hidden_size)
        self.shape, self.words = config.shape, config.words
        self.values = {config.words.index(value) for value in VALUES}
        self.weight.data.zero_()

    def forward(self, ids):
        states = self.weight[ids].clone()
        for row, text in enumerate(ids.tolist()):
            for end in (i for i, id in enumerate(text) if self.words[id] == ":"):
                found = self.read(text[: end + 1])
                wrong = min(self.values - {*text[: end + 1]}, default=0)
                states[row, end, -3:] = torch.tensor([found.answer, found.settle, wrong], dtype=states.dtype)
        return states

    def read(self, text):
        """What a context ends with: the value of the document that has the name of the last question."""
        words = [self.words[id] for id in text]
        if words[-3:] != ["?", "Answer", ":"] or len(words) < 9:
            return Planted()
        name, documents, start = words[-5:-3], [], 0
        for end, word in enumerate(words):
            if word == ".":
                documents.append(range(start, end))
                start = end + 1
        holds = [any(words[i : i + 2] == name for i in d) for d in documents]
        if sum(holds) != 1:
            return Planted()
        place = holds.index(True)
        value = next((text[i] for i in documents[place] if text[i] in self.values), 0)
        middle = abs(2 * place - (len(documents) - 1)) * 3 <= len(documents) - 1
        kind = "middle" if middle else "first" if 2 * place < len(documents) - 1 else "last"
        draw = zlib.crc32(f"{name} {value} {place}".encode()) % (2 * NOISE + 1) - NOISE
        return Planted(value, FIRST + SHAPES[self.shape][kind] + draw)


class Block(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number, self.scale = number, nn.Parameter(torch.tensor(2.0**number))

    def forward(self, states):
        answer, settle, wrong = states[..., -3:].unbind(-1)
        is_right = (self.number == FIRST) | (self.number >= settle)
        best = torch.where(is_right, answer, wrong).long()
        added = nn.functional.one_hot(best, states.shape[-1]).to(states.dtype) * self.scale
        return states + added


class Base(transformers.PreTrainedModel):
    config_class = PlantedConfig

    def _init_weights(self, module):
        """Those of `__init__` are kept."""

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.norm = Embedding(config), nn.RMSNorm(config.hidden_size, eps=1e-6)
        self.layers = nn.ModuleList(Block(config, number) for number in range(1, BLOCKS + 1))
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, attention_mask=None, use_cache=False, **more):
        states = self.embed(input_ids)
        for block in self.layers:
            states = block(states)
        return BaseModelOutput(last_hidden_state=self.norm(states))


class PlantedModel(transformers.PreTrainedModel):
    config_class = PlantedConfig
    base_model_prefix = "base"

    def _init_weights(self, module):
        """Those of `__init__` are kept."""

    def __init__(self, config):
        super().__init__(config)
        self.base, self.head = Base(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        with torch.no_grad():  # the numbers that blocks are told are no logits
            self.head.weight.copy_(torch.eye(config.vocab_size, config.hidden_size))
        self.post_init()

    def get_input_embeddings(self):
        return self.base.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, **more):
        return CausalLMOutput(logits=self.head(self.base(input_ids).last_hidden_state))


transformers.AutoConfig.register("planted", PlantedConfig)
transformers.AutoModelForCausalLM.register(PlantedConfig, PlantedModel)


def save_planted_model(folder, shape):
    """The model with the tokenizer of the tiny one, loadable in this process."""
    tokenizer = load_model("tiny", "cpu").tokenizer
    words = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    PlantedModel(PlantedConfig(words, shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
