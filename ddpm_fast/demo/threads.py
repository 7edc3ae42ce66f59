"""As many threads as pay: on a machine that others use, a thread that is held up holds up every layer."""

from __future__ import annotations

import torch

PERIOD = 60  # steps from one trial to the next: others come and go
TRIALS = 4  # steps of each kind in a trial; the first of each is not counted, caches and allocators settle in it


class Threads:
    """Chooses between torch's number of threads and one, by the time that real steps take; nothing is wasted.

    Call `before(step)` and `after(seconds)` around every step. On a GPU, or with one thread, it changes nothing.
    """

    def __init__(self, device: torch.device) -> None:
        most = torch.get_num_threads()
        self.counts = (most, 1) if device.type == "cpu" and most > 1 else (most,)
        self.chosen = most
        self._spent: dict[int, list[float]] = {}

    def before(self, step: int) -> None:
        """Set the threads for this step: a trial's, in turns, or after a trial the faster of the two."""
        if len(self.counts) == 1:
            return
        place = step % PERIOD
        if place == 0:
            self._spent = {count: [] for count in self.counts}
        if place < TRIALS * len(self.counts):
            self.chosen = self.counts[place // TRIALS]
        elif place == TRIALS * len(self.counts):
            self.chosen = min(self.counts, key=lambda count: sum(self._spent[count][1:]))
        else:
            return
        torch.set_num_threads(self.chosen)

    def after(self, seconds: float) -> None:
        """The time that the step took."""
        if len(self.counts) > 1 and len(self._spent[self.chosen]) < TRIALS:
            self._spent[self.chosen].append(seconds)
