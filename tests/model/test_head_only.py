"""A model cut to its first block has the head of the whole one, whatever its family."""

import pytest
import torch
import transformers as tf

from families import CASES, build
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.head import find_blocks
from refinelens.model.head_only import count_blocks, cut_to_one_block, without_other_blocks


@pytest.mark.medium
@pytest.mark.parametrize("name", CASES)
def test_the_head_is_that_of_the_whole_model(name, tmp_path):
    whole = build(name)
    whole.save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    options = {"config": cut_to_one_block(config), "output_loading_info": True, "dtype": torch.float32}
    cut, info = tf.AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    assert count_blocks(config) == len(find_blocks(whole)) and len(find_blocks(cut)) == 1
    assert not info["missing_keys"]
    assert info["unexpected_keys"] and without_other_blocks(info["unexpected_keys"], cut) == []
    head, own = LogitLens(cut).head, LogitLens(whole).head
    states = torch.randn(7, own.d_model)  # of any block
    assert (head.softcap, head.scale, type(head.norm)) == (own.softcap, own.scale, type(own.norm))
    assert torch.equal(head.logits(states), own.logits(states))


def test_other_tensors_without_a_place_are_named():
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
    keys = ["h.1.attn.bias", "transformer.h.11.mlp.c_fc.weight", "transformer.h.0.odd", "score.weight", "path.1.weight"]
    assert without_other_blocks(keys, model) == ["transformer.h.0.odd", "score.weight", "path.1.weight"]
