"""What wants to know when an iteration begins: Megatron's loop has no hook for it.

The forward step of the first micro-batch of an iteration says so, on every rank.
"""

from collections.abc import Callable

from megatron.training import get_args


class Iterations:
    """Tells its listeners of every iteration of training, before its first micro-batch.

    Between two calls lies one whole iteration: forward, backward, optimizer step, log. Evaluation is
    none, and the time it takes lies between two calls as well (:attr:`evaluated`).
    """

    def __init__(self) -> None:
        self.listeners: list[Callable[[int], None]] = []
        """Each is called with the number of iterations that are done, on every rank."""
        self.over: list[Callable[[], None]] = []
        """Each is called when an iteration is over: before it is evaluated, or the next one begins."""
        self.evaluated = False
        """Whether the model was evaluated since the last call."""
        self._last: int | None = None

    def micro_batch_begins(self, is_training: bool) -> None:
        """Hear of every micro-batch, before its forward."""
        if not is_training:
            if not self.evaluated:
                self._tell_it_is_over()
            self.evaluated = True
            return
        done = get_args().curr_iteration
        if done != self._last:
            if not self.evaluated:
                self._tell_it_is_over()
            self._last = done
            for listener in self.listeners:
                listener(done)
            self.evaluated = False

    def _tell_it_is_over(self) -> None:
        if self._last is not None:
            for listener in self.over:
                listener()
