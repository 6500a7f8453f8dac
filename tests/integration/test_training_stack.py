"""The training tools around transformers take the model as it is: Trainer, PEFT, packing collator, TRL.

The toy language counts upwards modulo a number that the first token gives, so twenty steps are enough to see the loss
fall and everything is computed in seconds on one core.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from transformers import DataCollatorWithFlattening, Trainer, TrainerCallback, TrainingArguments
from transformers.utils.generic import find_labels

from cognexis import (
    CognexisForCausalLM,
    CognexisForQuestionAnswering,
    CognexisForSequenceClassification,
    CognexisForTokenClassification,
)
from tests.batteries.tiny import tiny_config, tiny_model
from tests.batteries.without_package import run_without_package

NAMES = ["q_proj", "v_proj", "down_proj", "injection_proj"]


def counting(rows: int, length: int = 12) -> list[list[int]]:
    """Sequences ``m, x, x + 1, ...`` modulo m, in tokens from 4."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for _ in range(rows):
        modulus = int(torch.randint(3, 9, (), generator=generator))
        start = int(torch.randint(0, modulus, (), generator=generator))
        result.append([4 + modulus, *(20 + (start + i) % modulus for i in range(length - 1))])
    return result


def toy_data(rows: int = 64, masked: bool = False) -> Dataset:
    """Rows of the toy language with a column that no model knows; with ``masked``, prompts of various length."""
    items = []
    for number, ids in enumerate(counting(rows)):
        prompt = number % 7 if masked else 0
        labels = [-100] * prompt + ids[prompt:]
        items.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "origin": "toy"})
    return Dataset.from_list(items)


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**settings | overrides)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(folder: Path, model: Any = None, data: Dataset | None = None, **overrides: Any) -> Trainer:
    trainer = Trainer(
        model=tiny_model() if model is None else model,
        args=arguments(folder, **overrides),
        train_dataset=toy_data() if data is None else data,
    )
    trainer.train()
    return trainer


def assert_same_weights(left: Any, right: Any, tolerance: float) -> None:
    for (name, a), (_, b) in zip(left.named_parameters(), right.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


# ---- Trainer ----


def test_loss_falls_in_twenty_steps(tmp_path):
    trainer = trained(tmp_path)
    steps = losses(trainer)
    assert len(steps) == 20
    assert sum(steps[-3:]) / 3 < 0.5 * steps[0]
    assert trainer.model.lm_head.weight is trainer.model.model.embed_tokens.weight


def test_accumulated_steps_equal_large_ones(tmp_path):
    data = toy_data(masked=True)  # batches with unequal numbers of targets
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}
    large = trained(tmp_path, data=data, per_device_train_batch_size=8, **settings)
    small = trained(tmp_path, data=data, per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)
    assert losses(small) == pytest.approx(losses(large), abs=1e-4)
    assert_same_weights(small.model, large.model, 1e-5)


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}, {"every_k_loops": 2}], ids=str)
def test_activation_checkpointing_changes_no_step(tmp_path, options):
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5}
    plain = trained(tmp_path, **settings)
    again = trained(tmp_path, **settings, **{name: True, f"{name}_kwargs": options})
    assert again.model.model.recurrent.gradient_checkpointing
    assert losses(again) == pytest.approx(losses(plain), abs=1e-5)
    assert_same_weights(again.model, plain.model, 1e-6)


def test_training_in_bfloat16_autocast_stays_finite_and_learns(tmp_path):
    steps = losses(trained(tmp_path, bf16=True))
    assert sum(steps[-3:]) / 3 < 0.6 * steps[0]


def test_evaluate_gives_the_loss_and_predict_the_logits_alone(tmp_path):
    model = tiny_model()
    data = toy_data(16)
    trainer = Trainer(model=model, args=arguments(tmp_path), eval_dataset=data)
    with torch.no_grad():
        expected = model(torch.tensor(data["input_ids"]), labels=torch.tensor(data["labels"]))
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-4)
    result = trainer.predict(data)
    assert result.predictions.shape == (16, 12, 64) and result.label_ids.shape == (16, 12)
    torch.testing.assert_close(torch.from_numpy(result.predictions), expected.logits, rtol=1e-4, atol=1e-4)


def test_trainer_finds_the_labels_of_each_head():
    assert find_labels(CognexisForCausalLM) == ["labels"]
    assert find_labels(CognexisForSequenceClassification) == ["labels"]
    assert find_labels(CognexisForTokenClassification) == ["labels"]
    assert find_labels(CognexisForQuestionAnswering) == ["start_positions", "end_positions"]


@pytest.mark.parametrize(
    ("cls", "targets"),
    [
        (CognexisForSequenceClassification, {"labels": 2}),
        (CognexisForTokenClassification, {"labels": [0] * 12}),
        (CognexisForQuestionAnswering, {"start_positions": 5, "end_positions": 7}),
    ],
)
def test_trainer_hands_the_padding_mask_to_every_head(tmp_path, cls, targets):
    model = tiny_model(tiny_config(num_labels=3), cls=cls)
    mask = [0] * 4 + [1] * 8  # left padding, which changes every later position when it is not masked
    rows = [{"input_ids": ids, "attention_mask": mask, **targets} for ids in counting(8)]
    data = Dataset.from_list(rows)
    result = Trainer(model=model, args=arguments(tmp_path)).predict(data)
    with torch.no_grad():
        expected = model(torch.tensor(data["input_ids"]), attention_mask=torch.tensor(data["attention_mask"]))
    logits = [result.predictions] if "logits" in expected else list(result.predictions)
    wanted = [expected[name] for name in ("logits", "start_logits", "end_logits") if name in expected]
    for got, want in zip(logits, wanted, strict=True):
        if want.shape[1:2] == (12,):
            got, want = got[:, 4:], want[:, 4:]
        torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-4)


class StopAfter(TrainerCallback):
    """Ends training after a number of steps, as an interruption would."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_training_stop = state.global_step >= self.steps
        return control


def test_resumed_training_equals_uninterrupted_training(tmp_path):
    config = tiny_config(ffn_dropout=0.1, recurrent_stochastic_depth=0.2, prelude_stochastic_depth=0.2)
    settings = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "learning_rate": 1e-3}
    whole = trained(tmp_path / "whole", tiny_model(config), **settings)
    first = Trainer(
        model=tiny_model(config),
        args=arguments(tmp_path / "parts", **settings),
        train_dataset=toy_data(),
        callbacks=[StopAfter(5)],
    )
    first.train()
    second = Trainer(
        model=CognexisForCausalLM(config),
        args=arguments(tmp_path / "parts", **settings),
        train_dataset=toy_data(),
    )
    second.train(resume_from_checkpoint=True)
    assert losses(first) == losses(whole)[:5]
    assert losses(second) == pytest.approx(losses(whole), abs=1e-4)
    assert_same_weights(second.model, whole.model, 1e-4)


# ---- packed documents ----

DOCUMENTS = [[5, 21, 22, 23, 24, 25], [7, 30, 31], [6, 40, 41, 42, 43, 44, 45]]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(
    "options",
    [{}, {"return_seq_idx": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}],
    ids=["positions", "seq_idx", "all"],
)
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {
            "sliding_window": 3,
            "prelude_layer_types": ["sliding_attention"] * 2,
            "core_layer_types": ["sliding_attention"],
        },
        {"input_injection": "attention_memory"},
        {"recurrent_init": "random"},
    ],
    ids=["plain", "sliding window", "attention memory", "random start"],
)
def test_packed_documents_equal_separate_ones(training, options, overrides):
    model = tiny_model(tiny_config(**overrides)).train(training and "recurrent_init" not in overrides)
    batch = DataCollatorWithFlattening(**options)([{"input_ids": ids} for ids in DOCUMENTS])
    batch = {name: value for name, value in batch.items() if name != "attention_mask"}
    output = model(**batch)
    alone = [model(torch.tensor([ids]), labels=torch.tensor([ids])) for ids in DOCUMENTS]
    logits = torch.cat([part.logits for part in alone], dim=1)
    torch.testing.assert_close(output.logits, logits, rtol=1e-4, atol=1e-4)
    targets = [len(ids) - 1 for ids in DOCUMENTS]
    loss = sum(part.loss * n for part, n in zip(alone, targets, strict=True)) / sum(targets)
    torch.testing.assert_close(output.loss, loss)


def test_trainer_trains_and_evaluates_packed_batches_like_padded_ones(tmp_path):
    data = Dataset.from_list([{"input_ids": ids} for ids in DOCUMENTS * 2])
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 3}
    model = tiny_model()
    packed = Trainer(
        model=model,
        args=arguments(tmp_path, per_device_eval_batch_size=3, **settings),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DataCollatorWithFlattening(),
    )

    def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [2] * (length - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        ids, mask = torch.tensor(ids), torch.tensor(mask)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    other = Trainer(
        model=tiny_model(),
        args=arguments(tmp_path, per_device_eval_batch_size=3, **settings),
        train_dataset=data,
        eval_dataset=data,
        data_collator=padded,
    )
    assert packed.evaluate()["eval_loss"] == pytest.approx(other.evaluate()["eval_loss"], abs=1e-4)
    packed.train()
    other.train()
    assert losses(packed) == pytest.approx(losses(other), abs=1e-4)
    assert_same_weights(packed.model, other.model, 1e-4)


# ---- PEFT ----


def lora(model: Any, targets: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=TaskType.CAUSAL_LM))


def logits_of(model: Any, loops: int | None = None) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor(counting(2)), num_loops=loops).logits


@pytest.mark.parametrize("targets", ["all-linear", NAMES], ids=["all-linear", "names"])
def test_lora_trains_saves_reloads_and_merges(tmp_path, targets):
    tiny_model().save_pretrained(tmp_path / "base")
    model = lora(CognexisForCausalLM.from_pretrained(tmp_path / "base"), targets)
    adapted = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapted and all("lora_" in name for name in adapted)
    assert not any("lm_head" in name for name in adapted)
    assert any("recurrent.blocks.0.attention.q_proj" in name for name in adapted)
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    steps = losses(trained(tmp_path / "run", model, max_steps=10, learning_rate=5e-2))
    assert sum(steps[-3:]) / 3 < 0.9 * steps[0]
    assert [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])] == []
    expected = {loops: logits_of(model, loops) for loops in (1, 4)}
    prompt = torch.tensor(counting(2))[:, :6]
    tokens = {n: model.generate(input_ids=prompt, num_loops=n, max_new_tokens=5, do_sample=False) for n in (1, 4)}
    model.save_pretrained(tmp_path / "adapter")
    fresh = CognexisForCausalLM.from_pretrained(tmp_path / "base").eval()
    for loaded in (
        PeftModel.from_pretrained(fresh, tmp_path / "adapter"),
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"),
    ):
        for loops, logits in expected.items():
            torch.testing.assert_close(logits_of(loaded, loops), logits, rtol=0, atol=0)
            given = loaded.generate(input_ids=prompt, num_loops=loops, max_new_tokens=5, do_sample=False)
            assert torch.equal(given, tokens[loops])
    merged = model.merge_and_unload()
    assert isinstance(merged, CognexisForCausalLM) and not any("lora" in name for name, _ in merged.named_parameters())
    for loops, logits in expected.items():
        torch.testing.assert_close(logits_of(merged, loops), logits, rtol=1e-5, atol=1e-5)


def test_adapters_of_the_core_are_shared_by_all_loops():
    counts = []
    for loops in (1, 8):
        model = lora(CognexisForCausalLM(tiny_config(trained_max_loops=loops)), "all-linear")
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("options", [None, {"use_reentrant": True}], ids=str)
def test_lora_gradients_are_the_same_with_activation_checkpointing(options):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model = lora(tiny_model(), NAMES).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        ids = torch.tensor(counting(2))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=1e-6, msg=name)


def test_model_takes_adapters_by_itself(tmp_path):
    model = tiny_model()
    plain = logits_of(model)
    model.add_adapter(LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False))
    adapted = logits_of(model)
    assert not torch.equal(adapted, plain)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    model.disable_adapters()
    torch.testing.assert_close(logits_of(model), plain)
    other = tiny_model()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits_of(other), adapted)


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
        PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_virtual_tokens_are_trained_and_used_in_generation(config):
    model = get_peft_model(tiny_model(), config)
    ids = torch.tensor(counting(2))
    mask = torch.ones_like(ids)
    model.train()
    model(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    model.eval()
    tokens = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (2, 16)
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1])).logits
    logits[..., model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
    assert torch.equal(logits[:, -4:].argmax(-1), tokens[:, -4:])


# ---- what training leaves behind loads elsewhere ----

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

expected = torch.load(sys.argv[1])
seen = {}
for folder, (logits, tokens) in expected["outputs"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        same_logits = torch.equal(model(expected["ids"]).logits, logits)
    given = model.generate(expected["ids"], num_loops=2, max_new_tokens=5, do_sample=False)
    seen[folder] = [type(model).__module__.partition(".")[0], same_logits, torch.equal(given, tokens)]
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_folders_of_trainer_and_peft_load_without_the_package(tmp_path):
    trainer = trained(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4)
    trainer.save_model(tmp_path / "saved")
    adapted = trained(tmp_path / "lora", lora(tiny_model(), "all-linear"), max_steps=2).model
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    checkpoint = tmp_path / "run" / "checkpoint-4"
    assert json.loads((checkpoint / "config.json").read_text())["auto_map"]
    ids = torch.tensor(counting(2))
    outputs = {}
    for folder, model in {
        checkpoint: trainer.model,
        tmp_path / "saved": trainer.model,
        tmp_path / "merged": merged,
    }.items():
        tokens = model.eval().generate(ids, num_loops=2, max_new_tokens=5, do_sample=False)
        outputs[str(folder)] = (logits_of(model), tokens)
    torch.save({"ids": ids, "outputs": outputs}, tmp_path / "expected.pt")
    seen = run_without_package(LOAD, tmp_path / "expected.pt", hf_home=tmp_path / "home")
    assert seen == {folder: ["transformers_modules", True, True] for folder in outputs}


# ---- TRL ----


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_supervised_fine_tuning_with_trl(tmp_path, packing, adapter):
    trl = pytest.importorskip("trl")
    from tests.integration.test_loading import word_tokenizer

    tokenizer = word_tokenizer(64)
    texts = ["the sun and the moon and the stars", "the stars shine over the sea", "the moon and the sea"] * 24
    settings = arguments(tmp_path).to_dict()
    names = {field.name for field in dataclasses.fields(trl.SFTConfig)}
    keep = {"max_steps", "learning_rate", "logging_steps", "save_strategy", "report_to", "use_cpu", "disable_tqdm"}
    config = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_length=32,
        packing=packing,
        bf16=False,
        dataset_text_field="text",
        **{name: settings[name] for name in keep & names},
    )
    trainer = trl.SFTTrainer(
        model=tiny_model(),
        args=config,
        train_dataset=Dataset.from_list([{"text": text} for text in texts]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=NAMES, task_type=TaskType.CAUSAL_LM) if adapter else None,
    )
    trainer.train()
    steps = losses(trainer)
    assert sum(steps[-3:]) / 3 < (0.95 if adapter else 0.6) * steps[0]
    assert all(loss < 50 for loss in steps)
    trainer.save_model(tmp_path / "saved")
    if not adapter:
        loaded = CognexisForCausalLM.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(logits_of(loaded), logits_of(trainer.model))
