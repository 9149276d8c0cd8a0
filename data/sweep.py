"""The motivating measurement: each stage alone skips more and more, the others skip nothing.

Writes a report like eval.py's, from which data/figures.py draws how sensitive each stage is and how
its outputs grow. Accuracy and tokens are what counts here: questions are answered side by side, so
the latencies are shares of batches.

    python data/sweep.py --limit 200 --json sweep.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli
from data.report import describe, make_report, print_runs
from data.setup import configure, load, load_questions
from eval import evaluate, make_run


def main() -> None:
    own = ("--plan", "--limit", "--granularity", "--split", "--json", "--step")
    args = cli.make_parser(__doc__, *cli.MODEL_FLAGS, *own).parse_args()
    args.stage_budgets = args.exit_threshold = args.exit_window = None
    args.compare = True  # that is, the importance is needed
    pipeline, folder = load(args)
    setting, *_ = configure(args, pipeline, folder)
    _, questions = load_questions(args, pipeline, args.split, args.limit)
    runs = [make_run("full", setting, [0, 0, 0])]
    for stage in range(3):
        for budget in range(args.step, 2 * setting.n_layers, args.step):
            budgets = [budget if i == stage else 0 for i in range(3)]
            runs.append(make_run("litestage", setting, budgets))
    evaluate(pipeline, questions, runs, batch=20)
    correct = [question.answer for question in questions]
    entries = [describe(r, runs[0], correct) for r in runs]
    print_runs(entries)
    report = make_report(args, pipeline.model, entries, len(questions), batch=20)
    report["similarity"] = setting.importance.similarity.tolist()
    if args.json:
        cli.write_json(args.json, report)


if __name__ == "__main__":
    cli.run(main)
