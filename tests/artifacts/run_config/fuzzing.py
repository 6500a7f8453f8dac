"""Mutated configurations: one per case number, always the same one.

Even numbers are settings of CognexisConfig (keyword arguments, JSON files), odd ones run configurations (mappings,
YAML and JSON text). What a mutation does is drawn from the case number alone, so a failure is repeated by its number.
"""

import copy
import json
import math
import random
import string
from pathlib import Path
from typing import Any

import torch
import yaml

from cognexis import CognexisConfig, CognexisForCausalLM
from cognexis.artifacts.run_config import RunConfig, config_from_document, default_run_config, load_run_config, resolve
from cognexis.artifacts.run_config.documents import parse_document, yaml_text
from cognexis.artifacts.run_config.model_section import ARCHITECTURE_FIELDS
from cognexis.configuration_cognexis import AUTO_MAP
from cognexis.errors import CognexisError, InvalidConfigError
from tests.batteries.tiny import tiny_config

TINY = {name: value for name, value in tiny_config().to_dict().items() if name in ARCHITECTURE_FIELDS}
STORED = TINY | {"model_type": "cognexis", "auto_map": dict(AUTO_MAP), "dtype": "float32", "transformers_version": "5"}
SMALL_MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_prelude_blocks": 1,
    "num_coda_blocks": 1,
    "trained_max_loops": 4,
    "dtype": "fp32",
}
NESTED_MODEL = {
    "vocab_size": 64,
    "hidden_dim": 32,
    "num_prelude_blocks": 1,
    "num_coda_blocks": 1,
    "attention": {"variant": "gqa", "num_attention_heads": 4, "num_kv_heads": 2},
    "rope": {"theta": 1e4, "max_position_embeddings": 128, "scaling": {"type": "none"}},
    "ffn": {"activation": "swiglu", "intermediate_dim": 48},
    "recurrent": {"max_loops": 4, "min_loops": 1, "gating": True, "return_intermediate_states": False},
}
NUMBERS = (0, -1, 1, 2, 3, 7, 64, 2**31, 2**40, -(2**70), 10**400, 10**5000, 0.0, 0.5, -0.5, 1e-4, 1e308, -1e-320)
JUNK = (None, True, False, "", "x", "1e-4", "on", "\ud800", "\0", "a" * 3000, math.nan, math.inf, -math.inf)
NESTS = ([], {}, [1], [None], {"": 1}, {"a": {"b": [1, {"c": None}]}}, [[[[]]]], {"type": "x"}, {"rope_type": "yarn"})
WORDS = (
    *("fixed", "adaptive", "token_wise", "hybrid", "value_head", "oracle", "rule_based", "geometric", "milestone"),
    *("disabled", "enabled", "none", "all", "gelu", "layernorm", "sandwich", "learned_vector", "attention_memory"),
    *("gate_condition", "concat_project", "random", "identity", "post", "checkpointed", "bf16", "bfloat16", "cosine"),
)
PIECES = (
    *(b"&a ", b"*a", b"!!python/object:os.system ", b"NaN", b".inf", b"{", b"}", b"'", b"- ", b"? ", b"---\n", b"\n"),
    *(b"\xef\xbb\xbf", b"\t", b"\0", b"[" * 200, b"1" * 5000),
)
INHERITED = ("id2label", "label2id", "num_labels", "architectures", "problem_type", "dtype", "torch_dtype", "auto_map")


def mutated(rng: random.Random, document: Any, extra_keys: tuple[str, ...] = ()) -> Any:
    """A copy with one to four changes: other values, misspelt, removed, doubled or strange keys."""
    document = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        places = list(containers(document))
        container = rng.choice(places)
        keys = list(container)
        change = rng.random()
        if change < 0.6 and keys:
            key = rng.choice(keys)
            container[key] = value(rng, container[key])
        elif change < 0.7 and keys:
            del container[rng.choice(keys)]
        elif change < 0.85 and keys:
            key = rng.choice(keys)
            container[misspelt(rng, key)] = container.pop(key) if rng.random() < 0.5 else container[key]
        elif extra_keys:
            document[rng.choice(extra_keys)] = value(rng, 0)
        else:
            container[rng.choice(("bogus", "", "<<", "schema_version", "model", "variant"))] = value(rng, 0)
    return document


def containers(document: Any) -> Any:
    if isinstance(document, dict):
        yield document
        for inner in document.values():
            yield from containers(inner)


def value(rng: random.Random, old: Any) -> Any:
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(NUMBERS)
    if kind < 0.35:
        return rng.choice(JUNK)
    if kind < 0.4:
        return copy.deepcopy(rng.choice(NESTS))
    if kind < 0.55:
        return rng.choice(WORDS)
    if isinstance(old, bool) or old is None:
        return not old
    if isinstance(old, (int, float)) and abs(old) < 1e9:
        return rng.choice((old * 2, old + 1, max(old - 1, 0), float(old), str(old), [old]))
    return rng.choice((old, old.upper(), f"{old} ", [old], {"inner": old})) if isinstance(old, str) else {"inner": old}


def misspelt(rng: random.Random, key: Any) -> str:
    key = str(key)  # the labels of id2label are numbers
    place = rng.randrange(len(key)) if key else 0
    return rng.choice((key[:place] + key[place + 1 :], key[:place] + rng.choice(string.ascii_letters) + key[place:]))


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, repeat or insert a few bytes."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        place, length = rng.randrange(len(data) + 1), rng.randrange(1, 30)
        piece = rng.choice((*PIECES, rng.randbytes(1), data[place : place + length]))
        cut = rng.choice((0, 0, 1, length))
        data = data[:place] + piece + data[place + cut :]
    return data


def base_document(rng: random.Random) -> dict[str, Any]:
    full = default_run_config().document()
    document = {"schema_version": 1} | {name: full[name] for name in full if rng.random() < 0.8}
    if "model" in document:
        document["model"] = copy.deepcopy(rng.choice((SMALL_MODEL, SMALL_MODEL, NESTED_MODEL, {"variant": "tiny"})))
    if isinstance(document.get("training"), dict):
        document["training"]["data"]["sequence_length"] = 64
    if "safety" in document and rng.random() < 0.5:
        document["safety"] = {}
    return document


def json_text(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=True).encode("ascii")


def text_of(rng: random.Random, document: Any) -> bytes:
    if rng.random() < 0.5:
        return json_text(document)
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def run_case(number: int, folder: Path) -> str:
    """Try one configuration; what it came to is "accepted" or "refused".

    Raises:
        Any other error than ours, and AssertionError where a promise is broken.
    """
    rng = random.Random(number)
    try:
        return (_architecture_case if number % 2 == 0 else _run_config_case)(rng, folder)
    except InvalidConfigError as error:
        refusal = error
    assert refusal.faults and refusal.code in ("invalid_config", "unsafe_override")
    for fault in refusal.faults:
        assert fault.path and fault.path in str(refusal), f"no field is named: {refusal}"
    return "refused"


def _architecture_case(rng: random.Random, folder: Path) -> str:
    form = rng.random()
    if form < 0.4:
        config = CognexisConfig(**mutated(rng, TINY, INHERITED))
    else:
        try:
            data = json_text(mutated(rng, STORED, INHERITED) if form < 0.8 else STORED)
        except ValueError:  # an integer without a decimal text cannot stand in a file
            return "refused"
        (folder / "config.json").write_bytes(data if form < 0.8 else mutated_bytes(rng, data))
        config = CognexisConfig.from_pretrained(folder)
    assert CognexisConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_dict() == config.to_dict()
    assert_runs(config)
    return "accepted"


def _run_config_case(rng: random.Random, folder: Path) -> str:
    form, document = rng.random(), base_document(rng)
    if form < 0.4:
        config = config_from_document(mutated(rng, document))
    elif form < 0.9:
        try:
            data = text_of(rng, mutated(rng, document) if form < 0.7 else document)
        except ValueError:
            return "refused"
        data = data if form < 0.7 else mutated_bytes(rng, data)
        path = folder / ("run.json" if data.lstrip().startswith(b"{") else "run.yaml")
        path.write_bytes(data)
        config = load_run_config(path)
    else:
        section, name, new = rng.choice(("inference", "model", "evaluation")), rng.choice(WORDS), value(rng, 3)
        override = f"{section}.{rng.choice(('max_loops', 'loop_mode', 'loop_counts', name))}={shown(new)}"
        overrides = [override.replace("\ud800", "?") if rng.random() < 0.9 else override]
        config = load_run_config(document, overrides=overrides, context=rng.choice((None, "checkpoint")))
    assert_reproducible(config)
    if config.model is not None:
        assert_runs(config.model.config())
    return "accepted"


def shown(value: Any) -> str:
    try:
        return repr(value)[:100]
    except ValueError:
        return "9" * 5000


def assert_reproducible(config: RunConfig) -> None:
    """Resolving is idempotent, and what is written is read back as the same configuration."""
    resolved = resolve(config)
    assert resolve(resolved) == resolved
    text = yaml_text(resolved.document()).encode("utf-8")
    assert config_from_document(parse_document(text, is_yaml=True, name="text")) == resolved
    assert config_from_document(parse_document(json_text(resolved.document()), is_yaml=False, name="text")) == resolved


_KNOWN_TO_RUN: set[str] = set()


def assert_runs(config: CognexisConfig) -> None:
    """A tiny configuration builds and gives finite logits; one that is not tiny is left alone."""
    sizes = {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 8192, "max_position_embeddings": 4096}
    sizes |= {
        "num_prelude_blocks": 6,
        "num_coda_blocks": 6,
        "num_recurrent_blocks": 3,
        "max_loops": 64,
        "kv_slots": 64,
    }
    magnitudes = ("embedding_scale", "injection_scale", "recurrent_residual_scale", "gate_init_bias", "rms_norm_eps")
    if any(getattr(config, name) > most for name, most in sizes.items()) or config.min_loops > 8:
        return
    if any(abs(getattr(config, name)) > 1e4 for name in (*magnitudes, "initializer_range")):
        return  # finite as numbers, but not after they multiplied a float32 state a few times
    overrides = (config.stage_overrides or {}).values()
    if any(
        values.get("intermediate_size", 0) > 512 or values.get("num_attention_heads", 0) > 64 for values in overrides
    ):
        return
    key = json.dumps({k: v for k, v in config.to_dict().items() if not k.startswith("_")}, sort_keys=True, default=str)
    if key in _KNOWN_TO_RUN:
        return
    try:
        torch.manual_seed(0)
        model = CognexisForCausalLM(config).float().eval()
        with torch.no_grad():
            logits = model(torch.tensor([[3, 1, 2]]) % config.vocab_size, num_loops=config.min_loops).logits
    except CognexisError:  # three positions exceed max_position_embeddings, retained loops that are not run
        return
    assert logits.isfinite().all()
    _KNOWN_TO_RUN.add(key)
