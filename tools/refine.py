"""A local search around what the greedy one chose: one stage may give what another takes. (Ours.)

python search.py --limit 20 --step 8 --refine 1
"""

import itertools
from collections.abc import Callable


def refine(search, best: Callable, start, budgets: list[int], time_left: Callable[[], bool]):
    """The point that is reached from `start`: all points one budget off in any of the stages are
    tried, then those around the best of them, until that is none or time is up.

    search: search.py's Search, and its rule `best`. budgets: what a stage may have, in order.
    """
    began = search.evaluate(start, 0.0)
    now = began
    while time_left():
        near = []
        for budget in now["budgets"]:
            i = budgets.index(budget)
            near.append(budgets[max(i - 1, 0) : i + 2])
        trials = [now]
        for tried in itertools.product(*near):
            if time_left():
                trials.append(search.trial("refine", start._replace(budgets=tried)))
        chosen = best(trials, search.target)
        if chosen is None or chosen["budgets"] == now["budgets"]:
            break
        now = chosen
    gain = began["latency_s"] / now["latency_s"]
    print(f"\nrefined from {start.budgets} to {tuple(now['budgets'])}: {gain:.3f}x faster")
    return start._replace(budgets=tuple(now["budgets"]))
