"""NaN and infinity at every place of a step: in each part of the forward pass, in every loop, in each gradient.

One run; every second step is spoiled at one site. It must be found in that step and, inside the core, in that loop;
the step must change nothing; and the one after it must train.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from cognexis.training.curriculum import CurriculumSettings
from cognexis.training.trainer import CognexisTrainer
from tests.batteries.interrupted_training import Rows, small_model, stacked

pytestmark = pytest.mark.slow

LOOPS = 4
VALUES = (math.nan, math.inf, -math.inf)
SATURATING = "recurrent.gate.proj"  # infinity is an ordinary input of its sigmoid
HIDDEN = "q_proj"  # torch's fused attention on the CPU answers a query of NaN with finite numbers; its gradient is NaN


@dataclass(frozen=True)
class Site:
    """Where and what: ``module`` at its ``call``-th call of the step, or the gradient of ``parameter``."""

    value: float
    module: str = ""
    call: int = 1
    parameter: str = ""

    @property
    def complaint(self):
        """What the alert must say."""
        if self.parameter or self.module.endswith(HIDDEN):
            return "gradient norm"
        if "prelude" in self.module or "embed" in self.module:
            return "entering the recurrent core"
        return f"after loop {self.call} " if "recurrent" in self.module else "loss: "


def sites_of(model):
    found = []
    for name, module in model.named_modules():
        is_layer = isinstance(module, (nn.Linear, nn.Embedding)) or type(module).__name__.endswith(("Norm", "Block"))
        if is_layer:
            calls = LOOPS if "recurrent" in name else 1
            values = VALUES[:1] if name.endswith(SATURATING) else VALUES
            found += [Site(value, name, call) for call in range(1, calls + 1) for value in values]
    return found + [Site(value, parameter=name) for name, _ in model.named_parameters() for value in VALUES[:2]]


class Spoil(TrainerCallback):
    """Spoils each second step, and notes what it changed."""

    def __init__(self, trainer, sites):
        self.trainer, self.sites, self.calls, self.armed = trainer, sites, {}, None
        self.alerts, self.faults = [], []
        for name, module in trainer.model.named_modules():
            module.register_forward_hook(lambda module, args, output, name=name: self.forward(name, output))
        for name, parameter in trainer.model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: self.backward(name, gradient))
        trainer.metrics.alert = lambda kind, message: self.alerts.append(message)

    def forward(self, name, output):
        self.calls[name] = self.calls.get(name, 0) + 1
        if not name or self.armed is None or (self.armed.module, self.armed.call) != (name, self.calls[name]):
            return None
        output = output.clone()
        output[0, 2] = self.armed.value
        return output

    def backward(self, name, gradient):
        if self.armed is None or self.armed.parameter != name:
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = self.armed.value
        return gradient

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.trainer.model.parameters()])

    def on_step_begin(self, args, state, control, **kwargs):
        self.before = self.weights()
        self.calls.clear()
        self.alerts.clear()
        self.armed = self.sites[state.global_step // 2] if state.global_step % 2 == 0 else None

    def on_step_end(self, args, state, control, **kwargs):
        has_changed = not torch.equal(self.before, self.weights())
        if self.armed is None:
            if not has_changed or self.alerts:
                self.faults.append(f"the step after {self.sites[state.global_step // 2 - 1]} did not train")
        elif has_changed or not any(self.armed.complaint in alert for alert in self.alerts):
            self.faults.append(f"{self.armed}: changed={has_changed}, alerts={self.alerts}")


def test_each_site_is_found_in_its_step_and_loop_and_changes_nothing(tmp_path):
    model = small_model()
    sites = sites_of(model)
    assert len(sites) >= 200
    settings = {"max_steps": 2 * len(sites), "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    settings |= {"lr_scheduler_type": "constant", "save_strategy": "no", "logging_steps": 100, "report_to": []}
    trainer = CognexisTrainer(
        model=model,
        args=TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=Rows(),
        data_collator=stacked,
        curriculum=CurriculumSettings(target_max_loops=LOOPS, mode="fixed"),
    )
    spoil = Spoil(trainer, sites)
    trainer.add_callback(spoil)
    trainer.train()
    assert not spoil.faults, "\n".join(spoil.faults[:20])
    assert trainer.skipped_steps == len(sites)
