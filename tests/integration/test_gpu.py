"""What holds on a CUDA device: backends agree, compiled decoding equals eager, no loop waits for the host."""

from pathlib import Path

import pytest
import torch

from cognexis import CognexisCache, CognexisForCausalLM
from cognexis.decoder import mixed_loops
from cognexis.errors import NonFiniteError
from cognexis.looping.driver import run_loops
from tests.batteries.state_layers import MIXTURES, overrides
from tests.batteries.tiny import tiny_config, tiny_model

pytestmark = pytest.mark.gpu


@pytest.fixture
def ids():
    return torch.randint(3, 64, (3, 17), device="cuda")


@pytest.mark.parametrize("num_loops", [1, 4])
def test_cuda_equals_cpu(ids, num_loops):
    model = tiny_model()
    expected = model(ids.cpu(), num_loops=num_loops).logits
    actual = model.cuda()(ids, num_loops=num_loops).logits.cpu()
    # float32 matmuls sum in another order on the device; logits have unit scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * num_loops**0.5 * expected.abs().max().item())


@pytest.mark.parametrize("implementation", ["eager", "flex_attention"])
def test_attention_implementations_agree_under_left_padding(ids, implementation):
    config = tiny_config(hidden_size=64, head_dim=16)
    model = tiny_model(config).cuda()
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    model.set_attn_implementation(implementation)
    actual = model(ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-4 * expected.abs().max().item())


def test_half_precision_stays_close_to_float32(ids):
    model = tiny_model().cuda()
    expected = model(ids).logits.flatten().float()
    for dtype in (torch.bfloat16, torch.float16):
        actual = tiny_model().cuda().to(dtype)(ids).logits.flatten().float()
        assert torch.cosine_similarity(actual, expected, dim=0) > 0.999


@pytest.mark.parametrize("num_loops", [1, 3])
def test_static_cache_with_compiled_decoding_gives_the_tokens_of_the_dynamic_cache(ids, num_loops):
    model = tiny_model().cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "num_loops": num_loops, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("cache_type", ["dynamic", "static"])
def test_a_decode_step_never_waits_for_the_host(ids, cache_type):
    config = tiny_config()
    model = tiny_model(config).cuda()
    cache = CognexisCache(config, cache_type, max_cache_len=32)
    masks = {}
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, num_loops=4)
        if cache_type == "static":  # as generate does: the mask is built before the compiled call
            empty = torch.empty(3, 1, 0, device="cuda")
            masks["attention_mask"] = model.create_masks_for_generate(
                config=config, inputs_embeds=empty, attention_mask=None, past_key_values=cache, position_ids=None
            )
        positions = torch.full((3, 1), 17, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            # the static cache reads its length once per forward when it runs without compilation
            run = torch.compile(model) if cache_type == "static" else model
            if cache_type == "static":
                torch.cuda.set_sync_debug_mode("default")
                run(ids[:, :1], past_key_values=cache, use_cache=True, num_loops=4, position_ids=positions, **masks)
                torch.cuda.set_sync_debug_mode("error")
            run(ids[:, :1], past_key_values=cache, use_cache=True, num_loops=4, position_ids=positions, **masks)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_gradients_match_the_cpu(ids):
    expected = tiny_model().train()
    expected(ids.cpu(), labels=ids.cpu(), num_loops=3).loss.backward()
    actual = tiny_model().train().cuda()
    actual(ids, labels=ids, num_loops=3).loss.backward()
    for (name, reference), parameter in zip(expected.named_parameters(), actual.parameters(), strict=True):
        scale = reference.grad.abs().max().item()
        error = (parameter.grad.cpu() - reference.grad).abs().max().item()
        assert error <= 1e-4 * scale + 1e-7, f"{name}: {error} of {scale}"


def test_generation_reports_non_finite_logits_at_the_end(ids):
    model = tiny_model(cls=CognexisForCausalLM).cuda()
    with torch.no_grad():
        model.model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="logits"):
        model.generate(ids, max_new_tokens=2)


@pytest.mark.parametrize("mode", ["adaptive_token", "adaptive_sequence"])
@pytest.mark.parametrize(
    "rule", [{"min_delta": 0.1}, {"min_delta": 0.0, "kl_threshold": 1e-5, "patience": 2, "delay": 1}], ids=str
)
def test_adaptive_loops_decide_as_on_the_cpu_and_never_wait_for_the_host(monkeypatch, mode, rule):
    checkpoint = Path(__file__).parents[2] / "hub_assets" / "windowed_parity"
    model = CognexisForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.randint(0, 2, (4, 33), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 2
    settings = {"loop_mode": mode, "scheduler": {"type": "rule_based", **rule}}
    expected = model(ids, **settings)
    model, on_device = model.cuda(), ids.cuda()
    model(on_device, **settings)  # what is made once, such as tables, may wait

    def run_watched(*args, **kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_loops(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(mixed_loops, "run_loops", run_watched)
    actual = model(on_device, **settings)
    assert actual.loop_counts.cpu().equal(expected.loop_counts)
    assert 1 < actual.loop_counts.max() < model.config.max_loops
    torch.testing.assert_close(actual.logits.cpu(), expected.logits, rtol=0, atol=1e-3)
    prompt = model(on_device[:, :32], use_cache=True, **settings)
    model(on_device[:, 32:], past_key_values=prompt.past_key_values, **settings)


STATE_MODELS = {
    "column_in_the_core": overrides("column", "core"),
    "no_attention": MIXTURES["no_attention_anywhere"],
    "beside_attention": MIXTURES["beside_attention"],
}


@pytest.mark.parametrize("name", STATE_MODELS)
def test_layers_with_memory_over_time_compute_as_on_the_cpu(ids, name):
    config, mask = tiny_config(**STATE_MODELS[name]), torch.ones_like(ids)
    mask[1, :6] = 0
    reference, model = tiny_model(config).double(), tiny_model(config).double().cuda()
    expected = reference(ids.cpu(), attention_mask=mask.cpu(), num_loops=3).logits
    actual = model(ids, attention_mask=mask, num_loops=3).logits.cpu()
    real = mask.bool().cpu()
    torch.testing.assert_close(actual[real], expected[real], rtol=0, atol=1e-11)
    reference.train()(ids.cpu(), labels=ids.cpu(), num_loops=2).loss.backward()
    model.train()(ids, labels=ids, num_loops=2).loss.backward()
    for (parameter_name, of_cpu), of_gpu in zip(reference.named_parameters(), model.parameters(), strict=True):
        error = (of_gpu.grad.cpu() - of_cpu.grad).abs().max().item()
        assert error <= 1e-9 * of_cpu.grad.abs().max().item() + 1e-14, f"{parameter_name}: {error}"


@pytest.mark.parametrize("name", STATE_MODELS)
def test_states_over_time_in_static_caches_give_the_tokens_of_dynamic_ones(ids, name):
    model = tiny_model(tiny_config(**STATE_MODELS[name])).cuda()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "num_loops": 2, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **options), expected)
    adaptive = {"loop_mode": "adaptive_token", "scheduler": {"type": "rule_based", "min_delta": 0.3}}
    options = {k: v for k, v in options.items() if k != "num_loops"} | adaptive | {"halt_dependency": "token"}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))
