"""The search for lossless decoding: for every stage the budget and the drafts of lowest latency.

The text is the full model's whatever is drafted (see generate.py's `draft_and_verify`), so there is
no target to meet, and stages do not depend on one another. (Ours.)

    python search.py --draft auto --limit 20 --step 8 --out plan-draft.json
"""

from data.prompts import STAGES

COUNTS = [2, 4, 6, 8]  # what --draft auto tries


def find_drafts(search, point, order: list[int], budgets: list[int], counts: list[int]):
    """The chosen point, from one where no stage drafts.

    search: search.py's Search. order: the stages, slowest first. budgets: what a stage may skip
    while it drafts. counts: how many tokens it may draft.
    """
    for stage in order:
        tried = ["none"]
        candidates = [point]
        for budget in budgets:
            for count in counts:
                if budget:
                    tried.append(f"{budget} x {count}")
                    draft = (*point.draft[:stage], count, *point.draft[stage + 1 :])
                    candidates.append(point.at(stage, budget)._replace(draft=draft))
        point = search.scan(STAGES[stage].name, tried, candidates)
    return point
