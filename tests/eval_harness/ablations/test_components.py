"""Components: each is settings of a configuration, builds, runs, and changes nothing but its part."""

import pytest
import torch

from cognexis import CognexisForCausalLM
from cognexis.artifacts.run_config import config_from_document, resolve
from cognexis.errors import InvalidConfigError
from cognexis.eval_harness.ablations.components import COMPONENTS, component
from cognexis.eval_harness.ablations.overriding import merged, needs_training, paths_of

BASE = {
    "run": {"research_mode": True},
    "model": {
        "variant": "cognexis-tiny",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "recurrent_gating": True,
        "gate_loop_embedding": True,
        "recurrent_residual_mode": "learned_scalar",
        "recurrent_residual_scale": 0.5,
        "recurrent_norm": "closing",
        "value_head": {"kind": "token"},
    },
    "training": {
        "data": {"sequence_length": 16},
        "optimization": {"total_steps": 10, "warmup_steps": 2},
        "loop_curriculum": {"initial_max_loops": 2, "target_max_loops": 8},
        "losses": {"lambda_value": 0.1},
    },
    "inference": {
        "loop_mode": "adaptive_token",
        "halt_dependency": "prefix",
        "scheduler": {"type": "value_head"},
    },
    "evaluation": {"loop_counts": [1, 4]},
}
# Component -> parameters that it removes (their beginnings) and how it is retrained; the rest must stay the same.
REMOVED = {
    "no_recurrent": (),
    "no_prelude": ("model.prelude.",),
    "no_coda": ("model.coda.",),
    "no_gating": ("model.recurrent.gate.",),
    "no_injection": (),
    "no_residual_scaling": (
        "model.recurrent.blocks.0.attention_residual_scale",
        "model.recurrent.blocks.0.feed_forward_residual_scale",
    ),
    "no_value_head": ("model.value_head.",),
    "no_closing_norm": ("model.recurrent.closing_norm",),
}
IN_BLOCKS = {
    "no_attention": ("attention.", "attention_norm.", "attention_residual_scale"),
    "no_ffn": ("feed_forward.", "feed_forward_norm.", "feed_forward_residual_scale"),
    "no_norm": ("attention_norm.", "feed_forward_norm."),
}


@pytest.fixture(scope="module")
def base():
    return config_from_document(BASE)


def built(config):
    torch.manual_seed(0)
    return CognexisForCausalLM(resolve(config).model.config()).eval()


def names_of(model):
    """Parameter names, those of replaced blocks as if they were ordinary ones."""
    return {name.replace(".layer.", ".") for name, _ in model.named_parameters()}


def flat(document, prefix=""):
    if isinstance(document, dict) and prefix.count(".") < 3:
        return {k: v for name, inner in document.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): document}


def test_every_component_of_the_contract_is_there():
    expected = "no_recurrent fixed_only no_prelude no_coda no_gating no_injection no_residual_scaling no_value_head"
    expected += " no_tokenwise no_attention no_ffn no_norm no_closing_norm"
    assert sorted(COMPONENTS) == sorted(expected.split())
    forms = {name: (c.retrained is not None, c.switched is not None) for name, c in COMPONENTS.items()}
    both = {name for name, form in forms.items() if form == (True, True)}
    assert both == {"no_recurrent", "no_value_head"}
    assert {name for name, form in forms.items() if form == (False, True)} == {"fixed_only", "no_tokenwise"}


@pytest.mark.parametrize("name", sorted(COMPONENTS))
def test_component_builds_runs_and_changes_only_its_part(base, name):
    overrides = component(name).overrides(base, trained=False)
    config = resolve(merged(base, overrides))
    before, after = built(base), built(config)
    ids = torch.randint(5, 64, (2, 9))
    with torch.no_grad():
        logits = after(input_ids=ids).logits
    assert torch.isfinite(logits).all()
    gone = names_of(before) - names_of(after)
    assert names_of(after) <= names_of(before)
    if name in IN_BLOCKS:
        expected = {n for n in names_of(before) for part in IN_BLOCKS[name] if f".{part}" in f"{n}." and "blocks" in n}
        expected |= {n for n in names_of(before) if name == "no_norm" and n.split(".")[-2] in ("final_norm",)}
        expected |= {n for n in names_of(before) if name == "no_norm" and "closing_norm" in n}
    else:
        expected = {n for n in names_of(before) if n.startswith(REMOVED.get(name, ())) and REMOVED.get(name)}
    assert gone == expected
    old, new = flat(resolve(base).document()), flat(config.document())
    changed = {path for path in old | new if old.get(path) != new.get(path)}
    allowed = set(paths_of(overrides)) | {"inference.num_loops"}
    assert changed and all(any(path == a or path.startswith(f"{a}.") for a in allowed) for path in changed)


@pytest.mark.parametrize("name", sorted(IN_BLOCKS))
def test_a_block_without_a_part_computes_the_rest(base, name):
    whole = built(merged(base, {"model": {"recurrent_residual_mode": "fixed"}}))
    less = built(
        merged(
            merged(base, {"model": {"recurrent_residual_mode": "fixed"}}),
            component(name).overrides(base, trained=False),
        )
    )
    block, lesser = whole.model.prelude.blocks[0], less.model.prelude.blocks[0].layer
    lesser.load_state_dict(block.state_dict(), strict=False)
    x, ids = torch.randn(1, 6, 32), torch.arange(6)[None]
    mask = torch.full((1, 1, 6, 6), float("-inf")).triu(1)
    shared = {"position_embeddings": whole.model.rotary_emb(x, position_ids=ids), "attention_mask": mask}
    with torch.no_grad():
        found = lesser(x, **shared)
        attention = x + block.attention(block.attention_norm(x), **shared)
        expected = {
            "no_attention": x + block.feed_forward(block.feed_forward_norm(x)),
            "no_ffn": attention,
            "no_norm": (y := x + block.attention(x, **shared)) + block.feed_forward(y),
        }[name]
    assert torch.allclose(found, expected, atol=1e-6)


def test_replaced_blocks_decode_with_a_cache(base):
    config = merged(
        base, {"inference": {"loop_mode": "fixed", "halt_dependency": None, "scheduler": {"type": "fixed"}}}
    )
    for name in IN_BLOCKS:
        model = built(merged(config, component(name).overrides(config, trained=False))).double()
        ids = torch.randint(5, 64, (1, 6))
        settings = {"max_new_tokens": 4, "do_sample": False, "num_loops": 3}
        assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_what_weights_depend_on_needs_training(base):
    assert needs_training(component("no_gating").overrides(base, trained=False))
    assert not needs_training(component("fixed_only").overrides(base, trained=False))
    assert not needs_training(component("no_recurrent").overrides(base, trained=True))
    with pytest.raises(InvalidConfigError, match="no_gating: needs training: the weights were fitted with the gate"):
        component("no_gating").overrides(base, trained=True)


@pytest.mark.parametrize(
    ("change", "name", "words"),
    [
        ({"model": {"recurrent_gating": False, "gate_loop_embedding": False}}, "no_gating", "has no gate"),
        ({"model": {"input_injection": "none"}}, "no_injection", "has no injection"),
        ({"model": {"num_coda_blocks": 0}}, "no_coda", "has no coda"),
        ({"model": {"recurrent_norm": "none"}}, "no_closing_norm", "has no closing norm"),
        ({"model": {"input_injection": "gate_condition"}}, "no_gating", "needs the gate"),
        ({"model": {"input_injection": "attention_memory"}}, "no_ffn", "use another injection"),
    ],
)
def test_a_part_that_is_not_there_cannot_be_taken_out(base, change, name, words):
    with pytest.raises(InvalidConfigError, match=words):
        component(name).overrides(merged(base, change), trained=False)


def test_unknown_component_names_the_nearest():
    with pytest.raises(InvalidConfigError, match="did you mean 'no_gating'"):
        component("no_gate")


def test_side_effects_are_said(base):
    sandwich = merged(base, {"model": {"recurrent_norm": "sandwich"}})
    assert component("no_closing_norm").side_effect(base) == ""
    assert "each sub-layer" in component("no_closing_norm").side_effect(sandwich)
