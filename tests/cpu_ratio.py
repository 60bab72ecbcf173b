"""How long a call takes compared with another: their ratio is the same on slow machines and beside other processes."""

import math
import time
from collections.abc import Callable


def cpu_ratio(one: Callable[[], object], other: Callable[[], object], turns: int = 5) -> float:
    """Return the CPU time of `one` divided by that of `other`: of each the least of several turns."""
    least = [math.inf, math.inf]
    for _ in range(turns):
        for side, call in enumerate((one, other)):
            began = time.process_time()
            call()
            least[side] = min(least[side], time.process_time() - began)
    return least[0] / least[1]
