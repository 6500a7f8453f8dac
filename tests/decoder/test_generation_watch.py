"""Criteria of a caller beside the watch over loops."""

import torch
from transformers import StoppingCriteria

from cognexis import CognexisConfig, CognexisForCausalLM

SHAPE = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


class AfterTokens(StoppingCriteria):
    """Says for the batch as a whole, as a Python bool, that there are enough tokens; lm-eval's criterion does."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.length


def test_a_criterion_may_answer_for_the_batch_as_a_whole():
    config = CognexisConfig.from_variant("cognexis-tiny", vocab_size=64, eos_token_id=None, **SHAPE)
    model = CognexisForCausalLM(config).eval()
    ids = torch.randint(5, 64, (2, 4))
    settings = {"max_new_tokens": 8, "do_sample": False, "num_loops": 2}
    watched = model.generate(ids, stopping_criteria=[AfterTokens(7)], return_loop_stats=True, **settings)
    plain = model.generate(ids, stopping_criteria=[AfterTokens(7)], **settings)
    assert torch.equal(watched.sequences, plain) and watched.loop_counts.tolist() == [[2, 2, 2]] * 2
    assert watched.stop_reasons == ["cancelled"] * 2
