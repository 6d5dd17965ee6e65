"""Which steps log, evaluate and save."""

import math
from dataclasses import dataclass

from ray_prefopt.config import Interval, RunConfig


@dataclass(frozen=True)
class Due:
    """What happens after which step; the last step saves in any case, and evaluates unless run.eval_delay is longer."""

    run: RunConfig
    steps_per_epoch: int
    last: int

    def log(self, step: int) -> bool:
        return self._falls_on(self.run.log_steps, step) or (step == 1 and self.run.log_first_step)

    def evaluate(self, step: int) -> bool:
        done = step / self.steps_per_epoch if self.run.eval_steps == "epoch" else step
        return self._falls_on(self.run.eval_steps, step) and done >= self.run.eval_delay

    def save(self, step: int) -> bool:
        return self._falls_on(self.run.save_steps, step)

    def _falls_on(self, interval: Interval | None, step: int) -> bool:
        if step == self.last or interval is None:
            return step == self.last
        if interval == "epoch":
            return step % self.steps_per_epoch == 0
        return step % (interval if isinstance(interval, int) else math.ceil(interval * self.last)) == 0
