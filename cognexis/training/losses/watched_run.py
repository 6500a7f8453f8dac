"""What a training forward leaves for further loss terms: the state after every loop, and how it would be read.

    normed(t) = final_norm(coda(h_t)),      logits(t) = head(normed(t))

The states are those of the run's own graph, so a loss on an earlier one trains the loops before it. Reading a state
runs the coda once more, except for the last one. Letters: B rows, T tokens, H hidden width, L loops.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from cognexis.training.loop_states import loops_watched


class WatchedRun:
    """The loops of one forward pass.

    Attributes:
        h0: ``[B, T, H]``, the prelude's output.
        states: ``[B, T, H]`` after loops 1 .. L.
        final: ``[B, T, H]``, the normed state after the last loop.
    """

    h0: Tensor
    final: Tensor

    def __init__(self, model: Any) -> None:
        self.model = model
        self.states: list[Tensor] = []
        self._arguments: dict[str, Any] = {}
        self._is_over = False

    @property
    def num_loops(self) -> int:
        """L."""
        return len(self.states)

    def normed(self, loop: int) -> Tensor:
        """What the head would consume if the run ended after ``loop`` (from 1), ``[B, T, H]``."""
        if loop == self.num_loops:
            return self.final
        body = self.model.model
        return body.final_norm(body.coda(self.states[loop - 1], **self._arguments))

    def _begin(self, h0: Tensor, arguments: dict[str, Any]) -> None:
        self.h0 = h0
        self._arguments = dict(arguments)

    def _visit(self, state: Tensor, _: Any) -> None:
        self.states.append(state)

    def _end(self, module: Any, args: Any, output: Tensor) -> None:
        if not self._is_over:  # later calls of the norm read other states
            self.final, self._is_over = output, True


@contextmanager
def watched(model: Any) -> Iterator[WatchedRun]:
    """Watch one forward pass of ``model``, a causal language model, in fixed mode."""
    run = WatchedRun(model)
    handle = model.model.final_norm.register_forward_hook(run._end)
    try:
        with loops_watched(model, run._visit, run._begin):
            yield run
    finally:
        handle.remove()
