"""A stack of Llama layers computes what the model computes."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cognexis.cortex_layers.stacks.hf import (
    build_hf_stack,
    build_hf_stack_config,
    build_llama_stack_config_from_model,
    build_llama_stack_from_model,
)


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def through(model, stack, ids, state=None, resets=None):
    y, state = stack(model.model.embed_tokens(ids), state, resets=resets)
    return model.lm_head(model.model.norm(y)), state


@pytest.mark.parametrize("mem_len", [0, 16])
def test_logits_equal_those_of_the_model(model, mem_len):
    ids = torch.randint(0, 13, (2, 12))
    stack = build_llama_stack_from_model(model, mem_len=mem_len)
    torch.testing.assert_close(through(model, stack, ids)[0], model(ids).logits)


def test_chunks_and_resets_equal_separate_runs_of_the_model(model):
    ids = torch.randint(0, 13, (1, 12))
    stack = build_llama_stack_from_model(model, mem_len=16)
    resets = torch.zeros(1, 12, dtype=torch.bool)
    resets[0, 5] = True
    pieces, state = [], None
    for piece, flags in zip(ids.split(4, 1), resets.split(4, 1), strict=True):
        logits, state = through(model, stack, piece, state, flags)
        pieces.append(logits)
    expected = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
    torch.testing.assert_close(torch.cat(pieces, 1), expected)


def test_saved_model_is_loaded_and_cut(model, tmp_path):
    model.save_pretrained(tmp_path)
    stack = build_hf_stack(str(tmp_path), num_layers=2, mem_len=4, dtype=torch.float32)
    assert len(stack.blocks) == 2 and not stack.training
    x = torch.randn(1, 5, 16)
    short = build_llama_stack_config_from_model(model)
    assert [block.cell.mem_len for block in short.blocks] == [0, 0, 0] and not short.post_norm
    model.model.layers = model.model.layers[:2]
    torch.testing.assert_close(stack(x)[0], build_llama_stack_from_model(model)(x)[0])
    with pytest.raises(ValueError, match="num_layers=9: must be from 1 to 3"):
        build_hf_stack_config(str(tmp_path), num_layers=9)


def test_other_models_are_refused():
    with pytest.raises(NotImplementedError, match="model_type='gpt2'"):
        build_llama_stack_config_from_model(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)))
