"""The registered stacks build, run in steps as in sequences, and are what their titles say."""

import pytest
import torch

from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.cortex_stacks import STACKS, stack_names
from cognexis.eval_harness.cortex_training import SequenceClassifier, TrainingSettings, chunked_logits, probe_parity

LOCAL = [name for name in STACKS if name != "smollm"]


@pytest.mark.parametrize("name", LOCAL)
def test_stack_gives_the_same_logits_in_pieces(name):
    torch.manual_seed(0)
    model = SequenceClassifier(STACKS[name].build(16), 16, 5, 2).eval()
    ids = torch.randint(5, (2, 7))
    with torch.no_grad():
        whole = model(ids)[0]
        state = None
        for t in range(7):
            logits, state = model(ids[:, t : t + 1], state)
    assert whole.shape == (2, 2)
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["slstm", "mlstm", "axons"])
def test_every_parameter_of_a_single_path_learns(name):
    torch.manual_seed(0)
    model = SequenceClassifier(STACKS[name].build(16), 16, 5, 2)
    for _ in range(2):
        model(torch.randint(5, (3, 6)))[0].square().sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


def test_chunked_gradients_of_the_last_recurrence_equal_those_of_the_whole_sequence():
    torch.manual_seed(0)
    model = SequenceClassifier(STACKS["axons"].build(16), 16, 5, 2).double()
    ids, labels = torch.randint(5, (3, 12)), torch.tensor([0, 1, 1])
    lower = [p for name, p in model.named_parameters() if "blocks.0" in name]
    for parameter in lower:  # only the upper recurrence is compared: nothing stateful lies above it
        parameter.requires_grad_(False)
    upper = [(name, p) for name, p in model.named_parameters() if p.requires_grad and name.endswith(("nu_log", "w1"))]
    assert len(upper) == 2
    whole = torch.autograd.grad(model(ids)[0].square().sum(), [p for _, p in upper])
    for settings, is_equal in (
        (TrainingSettings(chunk_size=4), True),
        (TrainingSettings(chunk_size=4, rtu_disable_traces_last_chunk=True), False),
    ):
        part = torch.autograd.grad(chunked_logits(model, ids, settings).square().sum(), [p for _, p in upper])
        agree = [torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(part, whole, strict=True)]
        assert agree == [is_equal] * 2
    for parameter in lower:
        parameter.requires_grad_(True)
    probe = probe_parity(model, ids, labels, TrainingSettings(chunk_size=4))
    assert probe["num_parameters"] == 8 and probe["max_relative_difference"] > 0


def test_names_and_aliases_lead_to_stacks():
    assert stack_names("slstm_postup") == ["slstm"] and stack_names("mlstm_preup") == ["mlstm"]
    assert stack_names("all") == list(STACKS)
    with pytest.raises(InvalidConfigError, match="stack='gru': must be one of slstm, mlstm"):
        stack_names("gru")


def test_absent_weights_are_named_with_the_way_to_get_them():
    reason = STACKS["smollm"].missing()
    assert reason is not None and "hf download HuggingFaceTB/SmolLM-360M" in reason
