"""What a user sees of a run: a progress bar on a terminal, and one short line per log line elsewhere.

The trackers get every measurement; here stand step, loss, loops, gradient norm, learning rate and speed.
"""

import sys
from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.utils.logging import disable_progress_bar

_SHOWN = {
    "loss": ("loss", ".4f"),
    "loops/mean": ("loops", ".2f"),
    "grad_norm": ("grad norm", ".3f"),
    "learning_rate": ("learning rate", ".2e"),
    "train_tokens_per_second": ("tokens/s", ",.0f"),
    "skipped_steps": ("skipped", ".0f"),
}


class ConsoleCallback(TrainerCallback):
    """Shows progress on stderr, on the main process only."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar, where somebody can see it move."""
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, disable=not sys.stderr.isatty())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move it."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Say how it stands."""
        if not state.is_world_process_zero or not logs:
            return
        parts = [f"{label} {logs[name]:{form}}" for name, (label, form) in _SHOWN.items() if name in logs]
        parts += [
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in logs.items() if name.startswith("eval_loss")
        ]
        if not parts:
            return
        text = ", ".join(parts)
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            print(f"step {state.global_step}/{state.max_steps}: {text}", file=sys.stderr, flush=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it is."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def show_progress(trainer: Trainer, wanted: bool) -> None:
    """Put the short display in the place of the one of transformers, or none, not even of files being written."""
    for other in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(other)
    if wanted:
        trainer.add_callback(ConsoleCallback())
    else:
        disable_progress_bar()
