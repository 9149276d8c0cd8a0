"""Is a budget for each stage worth it? A plan against one budget for all stages, on validation.

Every uniform budget is a trial of the search that found the plan: the same questions, the same step
times, the same journal, and the exit that the plan has.

    python tools/uniform.py --out plan.json --step 4
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

from data.prompts import STAGES
from generate import Exit
from model import expect, read_json
from search import BATCH, GPU_BATCH, Point, meets, run_trial
from tools.command import run
from tools.flags import MODEL_FLAGS, make_parser
from tools.plan import read_plan, read_setting
from tools.progress import progress
from tools.setup import load_asked, read_asked
from tools.tables import print_scan
from tools.trials import Answers, Trials, search_journal


def main() -> None:
    own = ("--limit", "--granularity", "--exit-window", "--out", "--step")
    parser = make_parser(__doc__, *MODEL_FLAGS, *own)
    parser.set_defaults(granularity="sublayer", exit_window=Exit().window)
    args = parser.parse_args()
    asked = read_asked(args.data, "valid", args.limit, args.shots, args.shots_file)
    pipeline = load_asked(args, asked, few=False)
    n_sublayers = 2 * pipeline.model.args.n_layers
    plan = read_plan(args.out, pipeline.model.folder, n_sublayers // 2)
    stored = read_json(args.out)
    journal, _ = search_journal(args, pipeline, asked)
    measured = journal.find("measured")
    if not measured and not journal.find("ranked"):
        journal.path.unlink(missing_ok=True)  # it was made just now
    missing = f"{journal.path}: no step times; run search.py with the same flags first"
    expect(bool(measured), missing)
    setting = read_setting(measured[0], args.granularity)
    batch = BATCH
    if pipeline.model.device.type != "cpu":
        batch = GPU_BATCH
    answers = Answers(pipeline, asked.questions, setting, args.exit_window, batch)
    evaluate = Trials(run_trial, answers, measured[0], journal)
    threshold = 0.0
    if plan.exit:
        threshold = plan.exit.threshold
    target = stored["full"]["accuracy"] - stored["epsilon"]
    rows = []
    for budget in progress(range(0, n_sublayers, args.step), "uniform"):
        trial = evaluate(Point((budget,) * len(STAGES), threshold), 0.0)
        rows.append(trial | {"tried": budget, "meets": meets(trial, target)})
    chosen = evaluate(Point(tuple(plan.budgets), threshold), 0.0)
    name = ",".join(map(str, plan.budgets))
    rows.append(chosen | {"tried": name, "meets": meets(chosen, target)})
    noise = measured[0]["noise"]
    print_scan("one budget for all, and the plan", target, rows, len(rows) - 1, noise)


if __name__ == "__main__":
    run(main)
