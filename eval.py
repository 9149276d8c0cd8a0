"""Evaluation: accuracy and latency of LiteStage against the full model, side by side.

The methods answer the same questions in the same run, alternating question by question, so that a
slow minute of the machine hits all of them. A stage's latency is its prefill + decoding steps x
median step time. `python eval.py` alone runs the plan that ships with the demo.

    python eval.py --stage-budgets 2,4,1
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean

import numpy as np
import torch
from tqdm import tqdm

from data.questions import Question, locate, read_questions
from generate import (
    FLAGS,
    STAGES,
    Exit,
    Stage,
    Tokenizer,
    answer,
    configure,
    load,
    make_parser,
    run,
    write_json,
)
from model import Llama
from skip import POLICIES

Z = 1.959964  # of a 95% interval


@dataclass
class Run:
    """One method on the questions, and what came of it."""

    method: str
    budgets: Sequence[int]
    skips: Sequence
    exit: Exit | None = None
    answers: list[str | None] = field(default_factory=list)
    stages: list[list[Stage]] = field(default_factory=list)  # one list of three a question

    def latencies(self) -> np.ndarray:
        """Seconds of every question (n,), its three stages together."""
        return np.array([sum(stage.latency_s for stage in stages) for stages in self.stages])


def evaluate(
    model: Llama,
    tokenizer: Tokenizer,
    questions: list[Question],
    runs: list[Run],
    max_new_tokens: int = 64,
) -> None:
    """Answers every question with every run in turn, after a warm-up that is not counted."""
    for i, question in enumerate(tqdm([questions[0], *questions], "questions", disable=None)):
        for r in runs[i % len(runs) :] + runs[: i % len(runs)]:  # nobody is always first
            label, stages = answer(model, tokenizer, question, r.skips, r.exit, max_new_tokens)
            if i > 0:
                r.answers.append(label)
                r.stages.append(stages)


# ---------------------------------------------------------------- statistics


def wilson(right: int, n: int) -> list[float]:
    """Wilson's 95% interval of an accuracy."""
    p, spread = right / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / n / 4) / (1 + spread)
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


def paired(base: Sequence[bool], other: Sequence[bool]) -> list[float]:
    """95% interval of accuracy(other) - accuracy(base) over the same questions.

    Wald's interval with half a question added to each kind of disagreement (Agresti and Min 2005),
    so that it does not vanish when the two never disagree.
    """
    gained = 0.5 + sum(b < o for b, o in zip(base, other))
    lost = 0.5 + sum(b > o for b, o in zip(base, other))
    n = len(base) + 2
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    return [(gained - lost) / n - half, (gained - lost) / n + half]


# ---------------------------------------------------------------- report


def describe_stage(stages: list[Stage]) -> dict:
    """One stage's means per question. ms_per_token is decoding time by tokens of all rows."""
    tokens, decode_s = sum(s.tokens for s in stages), sum(s.timings.decode_s for s in stages)
    stops = [stop for s in stages for stop in s.stops]
    steps = sum(len(s.timings.step_s) for s in stages)
    skipped = sum(s.timings.skipped * len(s.timings.step_s) for s in stages)
    return {
        "name": stages[0].name,
        "tokens": tokens / len(stages),
        "prefill_s": mean(s.timings.prefill_s for s in stages),
        "decode_s": decode_s / len(stages),
        "ms_per_token": 1e3 * decode_s / max(tokens, 1),
        "skipped_sublayers": skipped / max(steps, 1),
        "exit_rate": stops.count("confidence") / len(stops),
        "context_rate": stops.count("context") / len(stops),
    }


def describe(r: Run, full: Run, questions: list[Question]) -> dict:
    """One run's entry in the report; differences and speed-up are against the full model."""
    right = [label == q.answer for label, q in zip(r.answers, questions)]
    base = [label == q.answer for label, q in zip(full.answers, questions)]
    latency = r.latencies()
    return {
        "method": r.method,
        "budgets": list(r.budgets),
        "exit": r.exit and r.exit._asdict(),
        "accuracy": mean(right),
        "accuracy_ci95": wilson(sum(right), len(right)),
        "no_answer": r.answers.count(None),
        "too_long": sum(any("context" in s.stops for s in stages) for stages in r.stages),
        "latency_s": float(latency.mean()),
        "speedup": float(full.latencies().mean() / latency.mean()),
        "accuracy_delta": mean(right) - mean(base),
        "accuracy_delta_ci95": paired(base, right),
        "stages": [describe_stage([stages[i] for stages in r.stages]) for i in range(3)],
    }


def print_table(entries: list[dict], n: int) -> None:
    """The comparison, 80 columns wide at most."""
    print(
        f"{'method':<12}{'budgets':>10}{'accuracy [95%]':>22}{'tokens':>8}{'ms/q':>8}"
        f"{'speed-up':>9}{'no answer':>10}"
    )
    for e in entries:
        low, high = e["accuracy_ci95"]
        interval = f"{e['accuracy']:6.1%} [{100 * low:.1f}, {100 * high:.1f}]"
        tokens = sum(stage["tokens"] for stage in e["stages"])
        budgets = ",".join(map(str, e["budgets"]))
        print(
            f"{e['method']:<12}{budgets:>10}{interval:>22}{tokens:>8.1f}"
            f"{1e3 * e['latency_s']:>8.1f}{e['speedup']:>8.2f}x{e['no_answer']:>10}"
        )
    print(
        f"\n{'stage':<12}{'method':<12}{'tokens':>8}{'prefill ms':>12}{'decode ms':>11}"
        f"{'ms/token':>10}{'skipped':>9}{'exits':>6}"
    )
    for i, name in enumerate(STAGES):
        for e in entries:
            s = e["stages"][i]
            print(
                f"{name:<12}{e['method']:<12}{s['tokens']:>8.1f}{1e3 * s['prefill_s']:>12.2f}"
                f"{1e3 * s['decode_s']:>11.2f}{s['ms_per_token']:>10.3f}"
                f"{s['skipped_sublayers']:>9.1f}{s['exit_rate']:>6.0%}"
            )
    print()
    for e in entries[1:]:
        low, high = e["accuracy_delta_ci95"]
        print(
            f"{e['method']} against full on the same {n} questions: accuracy "
            f"{100 * e['accuracy_delta']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
            f"speed-up {e['speedup']:.2f}x"
        )
    for e in entries:
        if e["too_long"]:
            print(f"{e['method']}: {e['too_long']} of {n} questions did not fit the context")


def main() -> None:
    args = make_parser(__doc__, *FLAGS).parse_args()
    folder, model, tokenizer = load(args)
    questions = read_questions(locate(args.data, args.split))[: args.limit]
    setting, budgets, exit = configure(args, folder, model, tokenizer)
    nothing = [None] * 3
    runs = [Run("full", [0, 0, 0], nothing)]
    skips = [POLICIES[args.method](setting, budget) for budget in budgets]
    runs.append(Run(args.method, budgets, skips, exit))
    evaluate(model, tokenizer, questions, runs, args.max_new_tokens)
    entries = [describe(r, runs[0], questions) for r in runs]
    report = {
        "model": args.model,
        "data": args.data,
        "n": len(questions),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "runs": entries,
    }
    print_table(entries, len(questions))
    if args.json:
        write_json(args.json, report)


if __name__ == "__main__":
    run(main)
