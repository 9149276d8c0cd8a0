"""Is a budget for each stage worth it? A plan against one budget for all stages, on validation.

Every uniform budget is a trial of the search that found the plan: the same questions, the same step
times, the same journal, and the exit that the plan has.

    python data/uniform.py --out plan.json --step 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli
from data.plan import journal_of, read_plan
from data.report import print_scan
from data.setup import load, load_questions
from generate import Exit
from model import expect
from search import Evaluator


def main() -> None:
    own = ("--limit", "--granularity", "--exit-window", "--out", "--step")
    parser = cli.make_parser(__doc__, *cli.MODEL_FLAGS, *own)
    parser.set_defaults(granularity="sublayer", exit_window=Exit().window)
    args = parser.parse_args()
    pipeline, folder = load(args)
    n_sublayers = 2 * pipeline.model.args.n_layers
    plan = read_plan(args.out, folder, n_sublayers // 2)
    file, questions = load_questions(args, pipeline, "valid", args.limit)
    journal, _ = journal_of(args, pipeline, folder, file, len(questions))
    if not journal.lines:
        journal.path.unlink(missing_ok=True)
    found = f"{journal.path}: no step times; run search.py with the same flags first"
    expect(bool(journal.find("measured")), found)
    evaluator = Evaluator(pipeline, questions, journal, args)
    threshold = plan["exit"]["threshold"] if plan["exit"] else 0.0
    budgets = list(range(0, n_sublayers, args.step))
    trials = [evaluator(((b, b, b), threshold), 0.0) for b in cli.progress(budgets, "uniform")]
    chosen = evaluator((tuple(plan["budgets"]), threshold), 0.0)
    names = [*map(str, budgets), ",".join(map(str, plan["budgets"]))]
    target = plan["full"]["accuracy"] - plan["epsilon"]
    noise = evaluator.measured["noise"]
    print_scan("one budget for all, and the plan", names, [*trials, chosen], target, chosen, noise)


if __name__ == "__main__":
    cli.run(main)
