"""Which runs eval.py makes: its plans', or with --compare those of every method.

python eval.py --compare 4,8,12 --limit 50
"""

from typing import NamedTuple

from data.prompts import STAGES
from generate import Exit, Pipeline
from model import expect
from skip import POLICIES, Setting
from tools.plan import Choice, Plan
from tools.setup import Asked, Wanted, configure, load_asked, read_asked
from tools.trained import budgets_of

DRAFTED = "litestage-draft"
DEMO_LIMIT = 200  # questions of the demo unless --limit asks for more: a minute or two


class Planned(NamedTuple):
    """A run to be made: a policy, and what it is given."""

    policy: str
    setting: Setting
    budgets: list[int]
    exit: Exit | None = None
    name: str = ""  # the run's, if it is not the policy's
    variant: str | None = None  # an ablation of LiteStage: "uniform" or "no-exit"
    draft: list[int] | None = None


def set_up(args) -> tuple[Asked, Pipeline, list[Plan]]:
    """What the flags of an evaluation ask for."""
    limit = args.limit
    if limit is None and args.data == "demo":
        limit = DEMO_LIMIT
    asked = read_asked(args.data, args.split, limit, args.shots, args.shots_file)
    pipeline = load_asked(args, asked)
    most = 2 * pipeline.model.args.n_layers
    for budget in args.compare or ():
        expect(budget <= most, f"--compare {budget}: the model has {most} sub-layers")
    return asked, pipeline, configure(pipeline, args.model, Wanted.of(args), asked)


def plan_runs(plans: list[Plan], args) -> list[Planned]:
    """The runs of an evaluation; the full model's is the first."""
    planned = [Planned("full", plans[0].setting(args.seed), [0] * len(STAGES))]
    if args.compare is not None:
        for each in compared(plans, args) + drafted(plans, args):
            if (each.name or each.policy).startswith(args.method or ""):
                planned.append(each)
        return planned
    policy = args.method or "litestage"
    for plan in plans:
        setting = plan.setting(args.seed)
        name = plan.method if policy == "litestage" else policy
        if not plan.only_drafts:
            planned.append(Planned(policy, setting, plan.budgets, plan.exit, name))
    return planned + drafted(plans, args)


def drafted(plans: list[Plan], args) -> list[Planned]:
    """The runs of the plans that draft, after all others. A stage without drafts skips nothing."""
    planned = []
    for plan in plans:
        if plan.draft:
            budgets = []
            for budget, count in zip(plan.budgets, plan.draft):
                budgets.append(budget if count else 0)
            setting = plan.setting(args.seed)
            given = Planned("litestage", setting, budgets, plan.exit, DRAFTED)
            planned.append(given._replace(draft=plan.draft))
    return planned


def once(choices: list[Choice]) -> list[Choice]:
    """The same without repetitions: several epsilons may have chosen the same."""
    found = []
    for choice in choices:
        if choice not in found:
            found.append(choice)
    return found


def compared(plans: list[Plan], args) -> list[Planned]:
    """The runs of --compare: every method at its uniform budgets, or at one to six eighths of all
    sub-layers, and at --stage-budgets; LiteStage at its plans, by both rankings where there is a
    plan of each, and its ablations: one budget for all stages, and plans without their exit."""
    if "similarity" not in [plan.ranking_by for plan in plans]:
        plans = [plans[0].by_similarity(), *plans]
    setting = plans[0].setting(args.seed)
    counts = args.compare
    if not counts:
        counts = [setting.n_layers * eighths // 4 for eighths in range(1, 7)]
    uniform = [[count] * len(STAGES) for count in counts]
    grid = list(uniform)
    if args.stage_budgets is not None:
        grid.append(args.stage_budgets)
    planned = []
    for method in POLICIES | setting.trained:
        if method not in ("full", "litestage"):
            for budgets in budgets_of(method, grid):
                planned.append(Planned(method, setting, budgets))
    for plan in plans:
        if plan.only_drafts:
            continue
        setting = plan.setting(args.seed)
        lite = Planned("litestage", setting, plan.budgets, plan.exit, plan.method)
        for budgets in uniform:
            planned.append(lite._replace(budgets=budgets, variant="uniform"))
        for choice in once(plan.frontier):
            whole = lite._replace(budgets=choice.budgets, exit=choice.exit)
            if choice.exit:
                planned.append(whole._replace(exit=None, variant="no-exit"))
            planned.append(whole)
    return planned
