"""Models with Cortex layers outside the package: loaded from their folder, adapted by PEFT, trained by Trainer."""

import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from tests.batteries.invariance import token_ids
from tests.batteries.state_layers import MIXTURES, overrides
from tests.batteries.tiny import tiny_config, tiny_model
from tests.batteries.without_package import run_without_package

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.set_grad_enabled(False)
expected = torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = expected["ids"]
settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
rule = {"type": "rule_based", "min_delta": 0.3}
seen = {
    "module": type(model).__module__,
    "logits": torch.equal(model(ids, num_loops=3).logits, expected["logits"]),
    "tokens": torch.equal(model.generate(ids, num_loops=3, **settings), expected["tokens"]),
    "adaptive": model.generate(ids, loop_mode="adaptive_token", scheduler=rule, **settings).tolist(),
}
print(json.dumps(seen))
"""
MISSING = """
import json, sys
sys.modules["tensordict"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
    print(json.dumps(""))
except ImportError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
@torch.no_grad()
def test_a_folder_with_memory_layers_loads_where_the_package_is_not_installed(tmp_path) -> None:
    model = tiny_model(tiny_config(**MIXTURES["no_attention_anywhere"]))
    ids = token_ids(model, 2, 7)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model.save_pretrained(tmp_path / "model")
    torch.save(
        {
            "ids": ids,
            "logits": model(ids, num_loops=3).logits,
            "tokens": model.generate(ids, num_loops=3, **settings),
        },
        tmp_path / "expected.pt",
    )
    rule = {"type": "rule_based", "min_delta": 0.3}
    adaptive = model.generate(ids, loop_mode="adaptive_token", scheduler=rule, **settings).tolist()
    seen = run_without_package(LOAD, tmp_path / "model", tmp_path / "expected.pt", hf_home=tmp_path / "home")
    assert seen.pop("module").startswith("transformers_modules.")
    assert seen == {"logits": True, "tokens": True, "adaptive": adaptive}
    message = run_without_package(MISSING, tmp_path / "model", hf_home=tmp_path / "other_home")
    assert "tensordict" in message and "pip install" in message


@pytest.mark.slow
def test_only_folders_with_memory_layers_carry_their_code(tmp_path) -> None:
    for name, settings in (("plain", {}), ("memory", overrides("lstm", "coda"))):
        tiny_model(tiny_config(**settings)).save_pretrained(tmp_path / name)
    assert not list((tmp_path / "plain").glob("*cortex*"))
    assert (tmp_path / "memory" / "cortex_layers_cognexis.py").is_file()
    assert "cortex" in json.loads((tmp_path / "memory" / "config.json").read_text())


@pytest.mark.parametrize("cell", ["column", "mlstm", "slstm_axon", "agalite"])
def test_adapters_reach_the_linear_layers_inside_cells(cell: str) -> None:
    model = tiny_model(tiny_config(**overrides(cell, "core")))
    ids = token_ids(model, 2, 7)
    before = model(ids, num_loops=2).logits
    linear = [
        name
        for name, module in model.model.recurrent.named_modules()
        if type(module) is torch.nn.Linear and ".stack." in name
    ]
    adapted = get_peft_model(model, LoraConfig(target_modules=[f"model.recurrent.{name}" for name in linear], r=2))
    assert torch.equal(adapted(ids, num_loops=2).logits, before)
    adapted.train()
    adapted(ids, labels=ids, num_loops=2).loss.backward()
    reached = [name for name, p in adapted.named_parameters() if "lora_B" in name and p.grad is not None]
    assert len(reached) == len(linear)
    assert all(p.grad.abs().max() > 0 for name, p in adapted.named_parameters() if "lora_B" in name)


def test_an_adapter_around_a_convolution_is_refused() -> None:
    model = tiny_model(tiny_config(**overrides("conv", "core")))
    block = model.model.recurrent.blocks[0].stack.blocks[0].experts[0].cell
    block.conv = torch.nn.Sequential(block.conv)
    with pytest.raises(ValueError, match="target modules"):
        model(token_ids(model, 1, 4))


def test_trainer_trains_cells_and_lowers_the_loss(tmp_path) -> None:
    model = tiny_model(tiny_config(**overrides("column", "core")))
    ids = token_ids(model, 4, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids] * 8
    start = {name: p.detach().clone() for name, p in model.model.recurrent.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        gradient_checkpointing=True,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] - 0.3
    assert all(not torch.equal(p, start[name]) for name, p in model.model.recurrent.named_parameters())
