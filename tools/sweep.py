"""The motivating measurement: each stage alone skips more and more, the others skip nothing.

Writes a report like eval.py's, from which tools/figures.py draws how sensitive each stage is and
how its outputs grow; of several plans, a ranking each. Accuracy and tokens are what counts here:
questions are answered side by side, so the latencies are shares of batches.

    python tools/sweep.py --limit 200 --step 4 --json sweep.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

from data.prompts import STAGES
from eval import describe, evaluate, make_run
from model import expect
from tools.command import run
from tools.files import write_json
from tools.flags import MODEL_FLAGS, make_parser
from tools.ranks import rank
from tools.report import make_report
from tools.setup import Wanted, configure, load_asked, read_asked
from tools.tables import print_runs

BATCH = 20  # questions side by side


def main() -> None:
    own = ("--plan", "--limit", "--granularity", "--split", "--json", "--step", "--max-budget")
    parser = make_parser(__doc__, *MODEL_FLAGS, *own)
    parser.set_defaults(json=Path("sweep.json"))
    args = parser.parse_args()
    asked = read_asked(args.data, args.split, args.limit, args.shots, args.shots_file)
    pipeline = load_asked(args, asked, few=False)
    wanted = Wanted(args.plan or [], granularity=args.granularity, compare=True)
    plans = configure(pipeline, args.model, wanted, asked)
    nothing = [0] * len(STAGES)
    runs = [make_run("full", plans[0].setting(args.seed), nothing)]
    for plan in plans:
        setting = plan.setting(args.seed)
        n_sublayers = 2 * setting.n_layers
        most = args.max_budget or n_sublayers - 2
        wanted = f"--max-budget {most}: the model has {n_sublayers} sub-layers"
        expect(most <= n_sublayers, wanted)
        for stage in range(len(STAGES)):
            for budget in range(args.step, most + 1, args.step):
                budgets = list(nothing)
                budgets[stage] = budget
                runs.append(make_run("litestage", setting, budgets, None, plan.method))
    evaluate(pipeline, asked.questions, runs, BATCH)
    entries = [describe(each, runs[0], asked.questions) for each in runs]
    report = {"kind": "sweep"} | make_report(args, pipeline, asked.questions, entries, BATCH)
    report["similarity"] = plans[0].importance.similarity.tolist()
    if rank()[0] == 0:
        write_json(args.json, report)
    print_runs(entries)
    print(f"drawn by: python tools/figures.py {args.json}")


if __name__ == "__main__":
    run(main)
