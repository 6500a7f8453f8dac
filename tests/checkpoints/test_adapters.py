"""Adapters: one that belongs to another model is refused before anything is changed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from cognexis import CognexisForCausalLM
from cognexis.errors import CheckpointError, CognexisError
from tests.batteries.tiny import tiny_config, tiny_model

IDS = torch.arange(10).view(2, 5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, num_loops=3).logits


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(folder: Path, base: Path | Any, targets: Any = ("q_proj", "up_proj")) -> Any:
    model = CognexisForCausalLM.from_pretrained(base) if isinstance(base, Path) else base
    adapted = get_peft_model(model, LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False))
    adapted.save_pretrained(folder)
    return adapted.eval()


def test_an_adapter_of_the_same_model_is_loaded(base, tmp_path):
    adapted = save_adapter(tmp_path / "adapter", base)
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(CognexisForCausalLM.from_pretrained(base), tmp_path / "adapter"),
    ):
        assert torch.equal(logits(loaded), logits(adapted))
    assert not torch.equal(logits(adapted), logits(tiny_model()))


def test_an_adapter_of_another_shape_is_refused_and_the_model_is_unchanged(base, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_model(tiny_config(hidden_size=48, intermediate_size=64)))
    model = CognexisForCausalLM.from_pretrained(base)
    before = logits(model)
    with pytest.raises(CheckpointError, match=r"lora_A.weight: shape \[3, 48\], the layer has in_features=32"):
        model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), before) and not hasattr(model, "peft_config")


def test_an_adapter_for_layers_that_do_not_exist_is_refused(base, tmp_path):
    save_adapter(tmp_path / "adapter", tiny_model(tiny_config(num_prelude_blocks=4)))
    model = CognexisForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError, match=r"model\.prelude\.blocks\.2\.\S+: the model has no such layer"):
        model.load_adapter(tmp_path / "adapter")


def test_the_same_name_twice_is_refused(base, tmp_path):
    save_adapter(tmp_path / "adapter", base)
    model = CognexisForCausalLM.from_pretrained(base)
    model.load_adapter(tmp_path / "adapter")
    before = logits(model)
    with pytest.raises(CheckpointError, match="adapter 'default' is already loaded"):
        model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), before)
    model.load_adapter(tmp_path / "adapter", "second")


def test_an_adapter_that_points_at_another_base_is_refused(base, tmp_path):
    save_adapter(tmp_path / "adapter", base)
    tiny_model(tiny_config(hidden_size=48, intermediate_size=64)).save_pretrained(tmp_path / "other")
    path = tmp_path / "adapter" / "adapter_config.json"
    for goal, error in ((tmp_path / "other", CheckpointError), (tmp_path / "nowhere", OSError)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(goal)}))
        with pytest.raises(error):
            CognexisForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("damage", ["weights missing", "weights cut", "config damaged"])
def test_a_damaged_adapter_is_refused(base, tmp_path, damage):
    save_adapter(tmp_path / "adapter", base)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    if damage == "weights missing":
        shutil.move(weights, tmp_path / "adapter" / "adapter_model.bin")
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:100])
    else:
        (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises((CognexisError, OSError)):
        CognexisForCausalLM.from_pretrained(base).load_adapter(tmp_path / "adapter")
