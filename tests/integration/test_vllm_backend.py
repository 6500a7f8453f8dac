"""What vLLM's Transformers backend asks of a model, checked without vLLM, and against vLLM where it is installed.

The backend reads the *source* of the modules it finds in the saved folder: the module whose ``forward`` makes the one
call of the attention interface owns a key/value slot, found by its ``layer_idx``; projections written in the usual
way are fused. So the first part reads the generated files as syntax trees. The second part runs the model under an
engine of the same kind (no cache, one flat row of requests, keys kept per slot). The third part needs vLLM; a machine
without a GPU can have it through ``benchmarks/vllm_check.sh``.
"""

import ast
import json
from collections import defaultdict
from typing import Any

import pytest
import torch
from transformers import AttentionInterface

from cognexis import CognexisConfig, CognexisForCausalLM, CognexisModel
from cognexis.configuration_cognexis import AUTO_MAP
from cognexis.errors import InvalidConfigError
from cognexis.hub.bundle import bundle_files
from tests.batteries.tiny import tiny_config, tiny_model
from tests.batteries.without_package import run_without_package

WINDOW = {
    "sliding_window": 4,
    "prelude_layer_types": ["sliding_attention", "full_attention"],
    "core_layer_types": ["sliding_attention"],
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fewer slots": {"kv_slots": 2, "default_loops": 2},
    "two core blocks": {"num_recurrent_blocks": 2, "experimental_multi_block": True},
    "no prelude, no coda": {"num_prelude_blocks": 0, "num_coda_blocks": 0},
    "sliding window": WINDOW,
}

# ---- the generated source ----


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(text) for name, text in bundle_files().items()}


@pytest.fixture(scope="module")
def classes(trees) -> dict[str, ast.ClassDef]:
    return {node.name: node for tree in trees.values() for node in tree.body if isinstance(node, ast.ClassDef)}


def method(cls: ast.ClassDef, name: str = "forward") -> ast.FunctionDef:
    return next(node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name)


def interface_names(tree: ast.AST) -> set[str]:
    """Local variables that hold a function taken from ``ALL_ATTENTION_FUNCTIONS``."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node.value):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def self_calls(function: ast.FunctionDef, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"self.{name}"]


def test_site_makes_one_call_of_one_interface_variable(classes):
    forward = method(classes["AttentionSite"])
    (name,) = interface_names(forward)
    calls = [node for node in ast.walk(forward) if isinstance(node, ast.Call) and ast.unparse(node.func) == name]
    assert len(calls) == 1
    scaling = [keyword.value for keyword in calls[0].keywords if keyword.arg == "scaling"]
    assert [ast.unparse(value) for value in scaling] == ["self.scaling"]
    lookups = [node for node in ast.walk(forward) if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(node)]
    assert any(ast.unparse(node).startswith("ALL_ATTENTION_FUNCTIONS.get_interface(") for node in lookups)


def test_no_other_class_dispatches_or_owns_a_slot(classes):
    dispatching = {name for name, cls in classes.items() if "ALL_ATTENTION_FUNCTIONS" in ast.unparse(cls)}
    assert dispatching == {"AttentionSite"}
    owners = {
        name
        for name, cls in classes.items()
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "layer_idx"
    }
    assert owners == {"AttentionSite"}


def test_nothing_is_declared_not_causal(trees):
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and any(ast.unparse(t).endswith("is_causal") for t in node.targets):
                assert ast.unparse(node.value) == "True", f"{name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "is_causal":
                assert ast.unparse(node.value) != "False", f"{name}:{node.lineno}"


def test_projections_are_written_as_fusion_recognises_them(classes):
    forward = method(classes["CognexisAttention"])
    first = forward.args.args[1].arg
    for name in ("q_proj", "k_proj", "v_proj"):
        (call,) = self_calls(forward, name)
        assert [ast.unparse(argument) for argument in call.args] == [first] and not call.keywords
    stored = [
        n for n in ast.walk(forward) if isinstance(n, ast.Name) and n.id == first and isinstance(n.ctx, ast.Store)
    ]
    assert stored == []
    (result,) = [node.value for node in ast.walk(forward) if isinstance(node, ast.Return)]
    assert isinstance(result, ast.Call) and ast.unparse(result.func) == "self.o_proj"
    gated = ast.unparse(method(classes["GatedFeedForward"]))
    assert "self.activation(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)" in gated
    norm = ast.unparse(method(classes["CognexisRMSNorm"]))
    assert ".pow(2).mean(-1, keepdim=True)" in norm and "torch.rsqrt(" in norm


def test_folder_offers_every_class_that_engines_ask_for(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(AUTO_MAP)


# ---- built models ----


def sites(model: torch.nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "AttentionSite"]


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_are_unique_and_complete(shape):
    config = tiny_config(**SHAPES[shape])
    model = CognexisModel(config)
    assert sorted(site.layer_idx for site in sites(model)) == list(range(config.num_hidden_layers))
    assert sorted(m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")) == list(
        range(config.num_hidden_layers)
    )
    for site in sites(model):
        assert type(site.layer_idx) is int and isinstance(site.scaling, float) and site.config is model.config
        assert not list(site.parameters()) and not list(site.children())
        sliding = config.layer_types[site.layer_idx] == "sliding_attention"
        assert site.sliding_window == (4 if sliding else None)
    assert all(getattr(module, "is_causal", True) for module in model.modules())
    assert len(config.layer_types) == config.num_hidden_layers


def test_flags_and_plans_are_those_that_the_backend_reads():
    model = tiny_model()
    assert model._supports_attention_backend and CognexisModel._supports_attention_backend
    assert model.model.is_backend_compatible()
    allowed = {"colwise", "rowwise", "replicate", "colwise_gather_output", "rowwise_split_input"}
    plan = model.config.base_model_tp_plan  # to which transformers may have added a rule for the embedding
    assert {style for name, style in plan.items() if name != "embed_tokens"} <= allowed
    norms = [module for module in model.modules() if type(module).__name__ == "CognexisRMSNorm"]
    assert norms and all(not list(norm.children()) for norm in norms)


@pytest.mark.parametrize("loops", [1, 2, 4, 6])
def test_overrides_after_construction_reach_slots_and_depth(loops):
    model = tiny_model(tiny_config(trained_max_loops=6, default_loops=4))
    config = CognexisConfig.from_dict(model.config.to_dict())
    config.update({"num_loops": loops, "kv_slots": loops})
    assert config.default_loops == loops and config.num_hidden_layers == 3 + loops
    assert len(config.layer_types) == 3 + loops
    assert CognexisConfig.from_dict(config.to_dict()).num_hidden_layers == 3 + loops
    served = CognexisForCausalLM(config).eval()
    assert sorted(site.layer_idx for site in sites(served)) == list(range(3 + loops))
    served.load_state_dict(model.state_dict())
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(served(ids).logits, model(ids, num_loops=loops).logits)


def test_fewer_loops_alone_keep_the_slots():
    config = tiny_config()
    config.update({"num_loops": 2})
    assert config.default_loops == 2 and config.num_hidden_layers == 7


# ---- an engine of the same kind ----


class Engine:
    """Attention that keeps keys and values per slot and request, as serving engines do.

    ``requests`` names the request of each token of the flat row in the current call.
    """

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.keys: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self.calls: list[int] = []

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        assert attention_mask is None and query.shape[0] == 1 and query.shape[2] == len(self.requests)
        self.calls.append(module.layer_idx)
        window = module.sliding_window
        result = torch.empty(query.shape[2], query.shape[1] * query.shape[3])
        for token, request in enumerate(self.requests):
            held = self.keys[module.layer_idx, request]
            held.append((key[0, :, token], value[0, :, token]))
            visible = held[-window:] if window else held
            groups = query.shape[1] // key.shape[1]
            keys, values = (torch.stack(x, dim=1).repeat_interleave(groups, 0) for x in zip(*visible, strict=True))
            weights = (query[0, :, token, None] @ keys.transpose(1, 2) * scaling).softmax(-1)
            result[token] = (weights @ values).flatten()
        return result, None


@pytest.fixture
def engine(monkeypatch) -> Engine:
    engine = Engine()
    monkeypatch.setitem(AttentionInterface._global_mapping, "engine", engine)
    return engine


@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_flat_rows_of_requests_give_the_logits_of_each_request(engine, shape, loops):
    loops = min(loops, tiny_config(**SHAPES[shape]).kv_slots)
    model = tiny_model(tiny_config(**SHAPES[shape]))
    ids = torch.randint(4, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, num_loops=loops, use_cache=False).logits
    model.config.default_loops = loops
    model.model.config._attn_implementation = "engine"
    steps = [  # positions of the requests 0 and 1 that each step computes
        (range(6), range(4)),
        (range(6, 7), range(4, 7)),
        (range(7, 8), range(7, 8)),
        (range(8, 9), range(8, 9)),
    ]
    for step in steps:
        engine.calls.clear()
        engine.requests = [request for request, span in enumerate(step) for _ in span]
        positions = torch.tensor([[position for span in step for position in span]])
        tokens = ids[torch.tensor(engine.requests), positions[0]][None]
        with torch.no_grad():
            hidden = model.model(input_ids=tokens, position_ids=positions, use_cache=False, return_dict=False)[0]
        logits = model.lm_head(hidden[0])
        wanted = expected[torch.tensor(engine.requests), positions[0]]
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
        config = model.config
        passed = config.num_prelude_blocks + config.num_coda_blocks + loops * config.num_recurrent_blocks
        assert len(engine.calls) == len(set(engine.calls)) == passed


@pytest.mark.parametrize(
    "overrides",
    [{"input_injection": "attention_memory"}, WINDOW | {"global_tokens": 2}],
    ids=["attention memory", "global tokens"],
)
def test_what_needs_a_mask_of_its_own_is_refused_by_engines_without_masks(engine, overrides):
    model = tiny_model(tiny_config(**overrides))
    model.config._attn_implementation = "engine"
    engine.requests = [0] * 6
    with pytest.raises(InvalidConfigError, match="attention memory|global tokens"):
        model(torch.arange(4, 10)[None], position_ids=torch.arange(6)[None], use_cache=False)


# ---- vLLM itself ----

OVERRIDES = [  # given to the server, loops that it then runs, slots that it then allocates per core block
    ({}, 4, 4),
    ({"num_loops": 2}, 2, 4),
    ({"num_loops": 2, "kv_slots": 2}, 2, 2),
    ({"num_loops": 6, "max_loops": 6, "kv_slots": 6}, 6, 6),
]

# Loads a folder through vLLM's Transformers backend for each of the overrides; dense attention, causal within each
# request, takes the place of the compiled kernels.
VLLM = """
import json, sys
import torch
from pathlib import Path
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

folder = Path(sys.argv[1])
inputs = torch.load(folder.parent / "inputs.pt")
ids, positions = inputs["ids"], inputs["positions"]
request = (positions == 0).cumsum(0)
visible = (request[:, None] == request) & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()


def dense(self, query, key, value, *_):
    query = query.view(len(ids), self.num_heads, self.head_size).transpose(0, 1)
    key, value = (x.view(len(ids), self.num_kv_heads, self.head_size).transpose(0, 1) for x in (key, value))
    groups = self.num_heads // self.num_kv_heads
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, attn_mask=visible, scale=self.impl.scale).transpose(0, 1).flatten(1)


Attention.forward = dense
seen = []
for number, overrides in enumerate(json.loads(sys.argv[2])):
    arguments = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        trust_remote_code=True,
        model_impl="transformers",
        enforce_eager=True,
        dtype="float32",
        max_model_len=64,
        hf_overrides=overrides,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), set_forward_context(None, config), torch.no_grad():
        if number == 0:
            init_distributed_environment(1, 0, f"file://{folder.parent}/rendezvous", 0, backend="gloo")
            initialize_model_parallel(1, 1)
        model = initialize_model(vllm_config=config)
        files = [str(path) for path in folder.glob("*.safetensors")]
        loaded = model.load_weights(safetensors_weights_iterator(files, use_tqdm_on_load=False))
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
        logits = model.compute_logits(model(ids, positions))
    torch.save(logits, folder.parent / f"logits_{number}.pt")
    kinds = [type(module).__name__ for module in model.modules()]
    seen.append(
        {
            "architecture": config.model_config.architecture,
            "module": type(model.model).__module__,
            "layers": [name for name, module in model.named_modules() if isinstance(module, Attention)],
            "kinds": {kind: kinds.count(kind) for kind in kinds},
            "not loaded": sorted(set(dict(model.named_parameters())) - loaded),
            "tensors": len(loaded),
        }
    )
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> list[dict[str, Any]]:
    """What vLLM makes of a saved folder, with the largest difference of its logits from the model's own."""
    pytest.importorskip("vllm", reason="vLLM is not installed; see benchmarks/vllm_check.sh")
    work = tmp_path_factory.mktemp("vllm")
    model = tiny_model(tiny_config(vocab_size=128, hidden_size=64))
    model.save_pretrained(work / "model")
    ids = torch.randint(4, 128, (14,), generator=torch.Generator().manual_seed(0))
    torch.save({"ids": ids, "positions": torch.cat((torch.arange(9), torch.arange(5)))}, work / "inputs.pt")
    overrides = json.dumps([overrides for overrides, _, _ in OVERRIDES])
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HOME": str(work)}
    seen = run_without_package(VLLM, work / "model", overrides, hf_home=work / "home", **environment)
    for number, (_, loops, _) in enumerate(OVERRIDES):
        logits = torch.load(work / f"logits_{number}.pt")[:, :128]
        with torch.no_grad():
            parts = [
                model(part[None], num_loops=loops, allow_extrapolation=True).logits[0] for part in (ids[:9], ids[9:])
            ]
        seen[number]["difference"] = (logits - torch.cat(parts)).abs().max().item()
    return seen


@pytest.mark.vllm
@pytest.mark.parametrize("number", range(len(OVERRIDES)), ids=[json.dumps(case[0]) for case in OVERRIDES])
def test_vllm_serves_the_saved_folder(served, number, capsys):
    overrides, _, slots = OVERRIDES[number]
    seen = served[number]
    with capsys.disabled():
        print(f"\n{overrides}: {len(seen['layers'])} KV layers, {seen['tensors']} tensors, {seen['difference']:.1e}")
    assert seen["architecture"] == "TransformersForCausalLM"
    assert seen["module"].startswith("transformers_modules.")
    assert len(seen["layers"]) == len(set(seen["layers"])) == 3 + slots
    kinds = seen["kinds"]
    assert kinds["QKVParallelLinear"] == kinds["MergedColumnParallelLinear"] == 4
    assert "CognexisRMSNorm" not in kinds and "Linear" not in kinds
    assert seen["not loaded"] == []
    assert seen["difference"] < 1e-5
