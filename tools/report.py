"""What an evaluation leaves behind: the report, every text, and a journal while it runs.

python eval.py --json report.json --texts texts.jsonl
"""

import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

import torch

from data.questions import Question
from generate import Generation, Pipeline, StageResult, Timings
from model import ModelArgs
from tools.files import digest_of, write_json, write_lines
from tools.journal import Journal
from tools.plan import Plan, checkpoint_digests, open_journal
from tools.ranks import rank
from tools.setup import Asked, conditions_of, keep_threads
from tools.tables import print_report
from tools.trained import multiply_adds


def make_report(
    args, pipeline: Pipeline, questions: list[Question], entries: list[dict], batch: int
) -> dict:
    """The report that --json writes; `ranks` processes shared the questions. args: the flags, for
    what was asked for; entries: a run each."""
    model = pipeline.model
    for entry in entries:
        count_multiply_adds(model.args, entry)
    split = args.split
    if Path(args.data).is_file():
        split = None
    return {
        "model": args.model,
        "data": args.data,
        "split": split,
        "n": len(questions),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "shots": args.shots,
        "max_new_tokens": args.max_new_tokens,
        "batch": batch,
        "ranks": rank()[1],
        "ids": [question.id for question in questions],
        "runs": entries,
    }


def make_entry(run, full, numbers: dict) -> dict:
    """A run's entry in the report. numbers: what eval.py computes of it, against the full run."""
    too_long = 0
    for stages in run.stages:
        too_long += any("context" in stage.stops for stage in stages)
    changed = None
    if run.draft:
        changed = 0
        for stages, others in zip(run.stages, full.stages):
            changed += list(map(ids_of, stages)) != list(map(ids_of, others))
    stages = []
    for i, results in enumerate(zip(*run.stages)):
        stages.append(describe_stage(results, run.draft[i] if run.draft else 0))
    return {
        "method": run.method,
        "variant": run.variant,
        "budgets": run.budgets,
        "exit": run.exit and run.exit._asdict(),
        "draft": run.draft,
        "texts_changed": changed,  # by drafts: questions, 0 but for near-ties in half precision
        **numbers,
        "no_answer": run.answers.count(None),
        "too_long": too_long,
        "answers": run.answers,
        "stages": stages,
    }


def ids_of(stage: StageResult) -> list[list[int]]:
    return [row.ids for row in stage.rows]


def describe_stage(stages: list[StageResult], count: int = 0) -> dict:
    """One stage's means per question; ms_per_token is decoding time by the tokens of all rows;
    accepted is the share of the drafts, `count` in a round."""
    n = len(stages)
    tokens = sum(stage.tokens for stage in stages)
    decode_s = sum(stage.timings.decode_s for stage in stages)
    steps = 0
    skipped = 0.0
    skipped_ffn = 0.0
    accepted = 0
    drafted = 0
    stops = []
    for stage in stages:
        steps += len(stage.timings.skips)
        for attention, ffn in stage.timings.skips:
            skipped += attention + ffn
            skipped_ffn += ffn
        stops += stage.stops
        for row in stage.rows:
            accepted += row.accepted
            drafted += row.steps * count
    return {
        "name": stages[0].name,
        "tokens": tokens / n,
        "tokens_ci95": mean_ci95([stage.tokens for stage in stages]),
        "prefill_s": sum(stage.timings.prefill_s for stage in stages) / n,
        "decode_s": decode_s / n,
        "ms_per_token": 1e3 * decode_s / max(tokens, 1),
        "skipped_sublayers": skipped / max(steps, 1),
        "skipped_ffn": skipped_ffn / max(steps, 1),
        "exit_rate": stops.count("confidence") / len(stops),
        "accepted": accepted / drafted if drafted else None,
    }


def mean_ci95(values: list[float]) -> list[float]:
    """The normal 95% interval of a mean; of a single value there is none, so both ends are it."""
    half = 1.96 * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return [fmean(values) - half, fmean(values) + half]


def count_multiply_adds(shape: ModelArgs, entry: dict) -> None:
    """Adds "macs" to a run and to its stages: multiply-adds of a decoded token, in the mean over
    the tokens of the stage, or of all stages. A round of drafts runs each draft, then these and the
    token before them by all layers, and says what was accepted and one token more."""
    total = 0.0
    for i, stage in enumerate(entry["stages"]):
        skipped = stage["skipped_sublayers"]
        stage["macs"] = multiply_adds(shape, entry["method"], skipped, stage["skipped_ffn"])
        if stage["accepted"] is not None:
            count = entry["draft"][i]
            by_all = multiply_adds(shape, "full", 0, 0)
            drafting = (count + 1) * stage["macs"] - by_all  # a step of the mean is the verifying
            stage["macs"] = (drafting + (count + 1) * by_all) / (1 + count * stage["accepted"])
        total += stage["macs"] * stage["tokens"]
    tokens = sum(stage["tokens"] for stage in entry["stages"])
    entry["macs"] = total / tokens if tokens else None


def publish(args, report: dict, runs: list, kept: "Kept") -> None:
    """Writes the files that are asked for, drops the journal, and prints the tables."""
    try:
        write_results(args, report, runs)
        kept.remove()
    finally:  # a closed pipe loses no file, a full disk no table
        print_report(report)


def write_results(args, report: dict, runs: list) -> None:
    """The files that --texts and --json name, by the first rank."""
    if rank()[0] > 0:
        return
    if args.texts:
        write_lines(args.texts, text_rows(report["ids"], runs))
    if args.json:
        write_json(args.json, report)


def text_rows(ids: list[str], runs: list) -> list[dict]:
    """One row for every question and run: all that was generated, and why it stopped."""
    rows = []
    for i, id in enumerate(ids):
        for run in runs:
            stages = []
            for stage in run.stages[i]:
                stages.append(
                    {
                        "name": stage.name,
                        "prompts": stage.prompts,
                        "texts": stage.texts,
                        "tokens": [row.ids for row in stage.rows],
                        "confidences": [row.confidences for row in stage.rows],
                        "stops": stage.stops,
                    }
                )
            row = {"id": id, "method": run.method, "budgets": list(run.budgets)}
            row["draft"] = run.draft
            row |= {"exit": run.exit and run.exit._asdict(), "answer": run.answers[i]}
            rows.append(row | {"stages": stages})
    return rows


# ---------------------------------------------------------------- answers in a journal


def to_json(stage: StageResult) -> dict:
    """A stage's result as JSON: named tuples become dicts."""
    value = asdict(stage)
    value["timings"] = stage.timings._asdict()
    value["rows"] = []
    for row in stage.rows:
        value["rows"].append(row._asdict() | {"timings": None})  # the stage has them
    return value


def from_json(value: dict) -> StageResult:
    """The result that `to_json` was given; its rows share the stage's timings."""
    timings = Timings(**value["timings"])
    rows = [Generation(**(row | {"timings": timings})) for row in value["rows"]]
    return StageResult(**(value | {"timings": timings, "rows": rows}))


class Kept:
    """The answers of an evaluation that is not finished, question by question, if it keeps any.

    A turn is what every run answered to the same few questions: for each run a list of
    (label or None, results of all stages).
    """

    def __init__(self, journal: Journal | None):
        self.journal = journal
        self.turns: list = []
        if journal is not None:
            self.turns = journal.find("answered")

    def get(self, turn: int) -> list | None:
        """The turn with this number, None if it is still to do."""
        if turn >= len(self.turns):
            return None
        answered = []
        for rows in self.turns[turn]:
            answered.append([(label, list(map(from_json, stages))) for label, stages in rows])
        return answered

    def put(self, answered: list) -> None:
        """Keeps the next turn."""
        if self.journal is None:
            return
        turn = []
        for rows in answered:
            turn.append([(label, list(map(to_json, stages))) for label, stages in rows])
        self.journal.append("answered", turn)

    def remove(self) -> None:
        """The report is written: the journal goes."""
        if self.journal is not None and self.journal.file is not None:
            self.journal.path.unlink(missing_ok=True)
            self.journal.file.close()


def ranked(plan: Plan) -> list:
    """What skip sets of a plan depend on, beside their budgets."""
    tables = [table.tolist() for table in plan.importance]
    return [plan.rankings, plan.granularity, tables]


def keep_answers(args, pipeline: Pipeline, asked: Asked, plans: list[Plan], runs: list) -> Kept:
    """A journal beside the report of --json: a killed evaluation goes on where it was. Without a
    report, or where it is no ordinary file, nothing is kept."""
    if not args.json or (args.json.exists() and not args.json.is_file()):
        return Kept(None)
    key = checkpoint_digests(pipeline.model.folder)
    key |= conditions_of(pipeline, asked)
    key |= {
        "questions": [digest_of([asked.file]), len(asked.questions)],
        "runs": [[each.method, each.budgets, each.exit, each.draft] for each in runs],
        "rankings": [ranked(plan) for plan in plans],
        "seed": args.seed,
        "batch": args.batch,
        "ranks": rank()[1],
        "device": [str(pipeline.model.device), args.compile, args.plain],
        "dtype": str(pipeline.model.dtype),
        "threads": args.threads,
    }
    journal = open_journal(args.json, key)
    keep_threads(journal)
    return Kept(journal)
