"""Watching the loops of one run from outside.

A visitor sees the state after every loop, and can read it as if the run ended there: through coda, norm and head.
Letters: B rows, T tokens, H hidden width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def loops_watched(
    model: Any,
    visit: Callable[[Tensor, Callable[[], Tensor]], None],
    begin: Callable[[Tensor, dict[str, Any]], None] = lambda h0, arguments: None,
) -> Iterator[None]:
    """Call ``visit`` after every loop of the runs within.

    Args:
        model: a causal language model.
        visit: gets the state ``[B, T, H]``, and a function that computes its logits ``[B, T, V]``.
        begin: called before the loops with the prelude's output ``[B, T, H]`` and the arguments of the stages.
    """
    body = model.model
    arguments: dict[str, Any] = {}

    def start(module: nn.Module, args: Any, kwargs: dict[str, Any], h0: Tensor) -> None:
        arguments.update(kwargs)
        begin(h0, kwargs)

    def read(module: nn.Module, args: Any, state: Tensor) -> None:
        visit(state, lambda: model.lm_head(body.final_norm(body.coda(state, **arguments))))

    handles = [
        body.prelude.register_forward_hook(start, with_kwargs=True),
        body.recurrent.loop_state.register_forward_hook(read),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
