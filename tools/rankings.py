"""What each plan's ranking loses for the time that it saves: KL to the full model, stage by stage.

A stage alone skips, by its ranking, until a share of its decoding step is saved; what that does to
the text is its loss, KL(full || skipped) in nats per token, in teacher-forced decoding of what the
full model wrote. Rankings that save the same time can then be compared without any accuracy. Take
other questions than the rankings were found with.

    python tools/rankings.py --plan plan.json plan-loss.json --limit 20 --json rankings.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

from data.prompts import STAGES
from skip import litestage
from tools.command import run
from tools.files import write_json
from tools.flags import MODEL_FLAGS, make_parser
from tools.losses import skip_loss, sublayer_seconds, whole
from tools.progress import progress
from tools.setup import Wanted, answer_all, configure, load_asked, read_asked

SHARES = (0.1, 0.15, 0.2, 0.25, 0.3)  # of a decoding step


def budget_saving(share: float, setting, step_s: float, seconds) -> int:
    """The smallest budget whose skip set saves this share of a step; seconds: (n_layers, 2)."""
    for budget in range(2 * setting.n_layers):
        if float(seconds[litestage(setting, budget)].sum()) >= share * step_s:
            return budget
    return 2 * setting.n_layers


def main() -> None:
    own = ("--plan", "--limit", "--granularity", "--split", "--json")
    parser = make_parser(__doc__, *MODEL_FLAGS, *own)
    parser.set_defaults(limit=20)
    args = parser.parse_args()
    asked = read_asked(args.data, args.split, args.limit, args.shots, args.shots_file)
    pipeline = load_asked(args, asked)
    wanted = Wanted(args.plan or [], granularity=args.granularity, compare=not args.plan)
    plans = configure(pipeline, args.model, wanted, asked)
    questions, answered = [], []
    for question, stages in zip(asked.questions, answer_all(pipeline, asked.questions)):
        if all(whole(stage) for stage in stages):
            questions.append(question)
            answered.append(stages)
    said = [[stage.texts for stage in stages] for stages in answered]
    step_s, seconds = sublayer_seconds(pipeline, questions, said)
    rows = []
    for share in SHARES:
        for plan in plans:
            rows.append({"saved": share, "ranking": plan.ranking_by, "budgets": [], "loss": []})
    with progress(total=len(STAGES) * len(rows), desc="losses") as bar:
        for index in range(len(STAGES)):
            loss = skip_loss(pipeline, index, questions, answered)
            for row, plan in zip(rows, plans * len(SHARES)):
                setting = plan.setting(args.seed).at(index)
                budget = budget_saving(row["saved"], setting, step_s[index].item(), seconds[index])
                row["budgets"].append(budget)
                row["loss"].append(loss(litestage(setting, budget)))
                bar.update()
    print_rows(rows)
    if args.json:
        write_json(args.json, {"kind": "rankings", "n": len(questions), "rows": rows})


def print_rows(rows: list[dict]) -> None:
    """A line for each share and ranking: nats per token and budget of each stage, and their sum."""
    names = "".join(f"{stage.name:>14}" for stage in STAGES)
    print(f"{'time saved':10}  {'ranking':10}{names}{'sum':>8}")
    for row in rows:
        cells = ""
        for loss, budget in zip(row["loss"], row["budgets"]):
            cells += f"{loss:8.3f} ({budget:3})"
        print(f"{row['saved']:10.0%}  {row['ranking']:10}{cells}{sum(row['loss']):8.3f}")


if __name__ == "__main__":
    run(main)
