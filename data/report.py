"""Reports: intervals, and the tables that eval.py and search.py print, 80 columns wide at most.

Entries are those of the JSON report's "runs" and of a plan's "trials".

    python eval.py --json report.json
"""

import math
import shlex
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from data.cli import rank
from data.prompts import STAGES

Z = 1.959964  # of a 95% interval


def wilson(right: int, n: int) -> list[float]:
    """Wilson's 95% interval of an accuracy, `right` of n."""
    p, spread = right / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / n / 4) / (1 + spread)
    return [middle - half if right else 0.0, middle + half if right < n else 1.0]


def paired(base: Sequence[bool], other: Sequence[bool]) -> list[float]:
    """95% interval of accuracy(other) - accuracy(base) over the same questions.

    Wald's interval with half a question added to each kind of disagreement (Agresti and Min 2005),
    so that it does not vanish when the two never disagree.
    """
    gained = 0.5 + sum(b < o for b, o in zip(base, other))
    lost = 0.5 + sum(b > o for b, o in zip(base, other))
    n = len(base) + 2
    half = Z * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    middle = (gained - lost) / n
    return [max(middle - half, -1.0), min(middle + half, 1.0)]


def describe_stage(stages: list) -> dict:
    """One stage's means per question; ms_per_token is decoding time by the tokens of all rows."""
    tokens, decode_s = sum(s.tokens for s in stages), sum(s.timings.decode_s for s in stages)
    steps = sum(len(s.timings.step_s) for s in stages)
    skipped = sum(s.timings.skipped * len(s.timings.step_s) for s in stages)
    stops = [stop for s in stages for stop in s.stops]
    return {
        "name": stages[0].name,
        "tokens": tokens / len(stages),
        "prefill_s": mean(s.timings.prefill_s for s in stages),
        "decode_s": decode_s / len(stages),
        "ms_per_token": 1e3 * decode_s / max(tokens, 1),
        "skipped_sublayers": skipped / max(steps, 1),
        "exit_rate": stops.count("confidence") / len(stops),
    }


def describe(r, full, correct: Sequence[str]) -> dict:
    """One run's entry in the report; differences and speed-up are against the full model."""
    right = [given == label for given, label in zip(r.answers, correct)]
    base = [given == label for given, label in zip(full.answers, correct)]
    latency, full_latency = (
        mean(sum(stage.latency_s for stage in stages) for stages in run.stages) for run in (r, full)
    )
    return {
        "method": r.method,
        "budgets": list(r.budgets),
        "exit": r.exit and r.exit._asdict(),
        "accuracy": sum(right) / len(right),
        "accuracy_ci95": wilson(sum(right), len(right)),
        "no_answer": r.answers.count(None),
        "too_long": sum(any("context" in s.stops for s in stages) for stages in r.stages),
        "latency_s": latency,
        "speedup": full_latency / latency if latency else 1.0,
        "accuracy_delta": sum(right) / len(right) - sum(base) / len(base),
        "accuracy_delta_ci95": paired(base, right),
        "stages": [describe_stage([stages[i] for stages in r.stages]) for i in range(3)],
    }


def make_report(args, model, entries: list[dict], n: int, batch: int) -> dict:
    """The report that --json writes; `ranks` processes shared the questions."""
    return {
        "model": args.model,
        "data": args.data,
        "split": None if Path(args.data).is_file() else args.split,
        "n": n,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "seed": args.seed,
        "command": shlex.join(["python", *sys.argv]),
        "batch": batch,
        "ranks": rank()[1],
        "runs": entries,
    }


def name_of(run: dict) -> str:
    """A run's method and its budgets."""
    return f"{run['method']} {','.join(map(str, run['budgets']))}"


def in_columns(value: float, digits: int, most: int) -> str:
    """A number with so many digits after its point, or fewer where it would be too long."""
    while digits and len(f"{value:.{digits}f}") > most:
        digits -= 1
    return f"{value:.{digits}f}"


def print_runs(runs: list[dict]) -> None:
    """A line for every run: accuracy with its interval, cost, speed-up, sub-layers skipped."""
    print(
        f"{'method and budgets':<26}{'accuracy [95%]':>19}{'tokens':>7}{'ms':>7}{'speed':>6}"
        f"{'skipped':>15}"
    )
    for r in runs:
        low, high = r["accuracy_ci95"]
        accuracy = f"{100 * r['accuracy']:.1f} [{100 * low:.1f},{100 * high:.1f}]"
        tokens = sum(stage["tokens"] for stage in r["stages"])
        skipped = ",".join(f"{round(stage['skipped_sublayers'], 1):g}" for stage in r["stages"])
        name = name_of(r) if len(name_of(r)) <= 26 else f"{name_of(r)}\n{'':26}"
        ms, speedup = in_columns(1e3 * r["latency_s"], 1, 6), in_columns(r["speedup"], 2, 4)
        print(
            f"{name:<26}{accuracy:>19}{in_columns(tokens, 1, 6):>7}{ms:>7}{speedup:>5}x"
            f"{skipped:>15}"
        )


def print_stages(runs: list[dict]) -> None:
    """Where the time goes: a line for every stage of every run; means per question."""
    print(
        f"\n{'stage':<11}{'method':<12}{'tokens':>7}{'prefill ms':>11}{'decode ms':>10}"
        f"{'ms/token':>9}{'skipped':>8}{'exits':>6}"
    )
    for stages in zip(*(r["stages"] for r in runs)):
        for r, s in zip(runs, stages):
            print(
                f"{s['name']:<11}{r['method']:<12.11}{s['tokens']:>7.1f}"
                f"{1e3 * s['prefill_s']:>11.2f}"
                f"{1e3 * s['decode_s']:>10.2f}{s['ms_per_token']:>9.3f}"
                f"{s['skipped_sublayers']:>8.1f}{s['exit_rate']:>6.0%}"
            )


def print_differences(runs: list[dict], n: int) -> None:
    """Every run against the full model over the same questions, and what was not answered."""
    print()
    for r in runs[1:]:
        low, high = r["accuracy_delta_ci95"]
        print(
            f"{name_of(r)} against full: accuracy {100 * r['accuracy_delta']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    for r in runs:
        if r["no_answer"] or r["too_long"]:
            print(
                f"{name_of(r)}: {r['no_answer']} of {n} with no answer, "
                f"{r['too_long']} did not fit the context"
            )


def print_report(report: dict) -> None:
    """All tables of a report; the stages only where there are few runs."""
    runs = report["runs"]
    print_runs(runs)
    if len(runs) <= 3:
        print_stages(runs)
    print_differences(runs, report["n"])
    if report["ranks"] > 1 or report["batch"] > 1:
        print(f"latencies: {report['ranks']} processes at once, batches of {report['batch']}")


def print_full(full: dict, order: Sequence[int], noise: float) -> None:
    """The full model on the validation questions, and the order in which stages are searched."""
    took = full["stage_s"]
    slowest = ", ".join(f"{STAGES[i]} {1e3 * took[i]:.2f} ms" for i in order)
    total = f"{1e3 * full['latency_s']:.2f} ms/question"
    print(f"full model: accuracy {full['accuracy']:.1%}, {total}, measuring noise {noise:.1%}")
    print(f"slowest stage first: {slowest}")
    if full["accuracy"] == 0:
        print("it answers none of the questions right: every budget meets the target")
    for slower, faster in zip(order, order[1:]):
        if took[slower] <= took[faster] * (1 + noise):
            both = f"{STAGES[slower]} and {STAGES[faster]}"
            print(f"{both} are equally slow, within the noise:\n  another run may swap them")


def meets(trial: dict, target: float) -> bool:
    """Whether a trial ran to its end and is accurate enough."""
    return not trial["abandoned"] and trial["accuracy"] >= target - 1e-9


def print_scan(title: str, tried: list, trials: list[dict], target: float, chosen, noise: float):
    """What a search tried: the paper's table for one stage, `tried` its budgets or thresholds."""
    print(f"\n{title}: target accuracy {target:.1%}")
    print(
        f"{'tried':>10}{'accuracy':>11}{'tokens':>9}{'ms':>9}{'exits':>7}{'meets':>7}{'chosen':>8}"
    )
    close = []
    for knob, t in zip(tried, trials):
        took = "-" if t["abandoned"] else f"{1e3 * t['latency_s']:.2f}"
        accuracy = f"{'<=' if t['abandoned'] else ''}{t['accuracy']:.1%}"
        print(
            f"{knob:>10}{accuracy:>11}{t['tokens']:>9.1f}{took:>9}{t['exit_rate']:>7.0%}"
            f"{'yes' if meets(t, target) else 'no':>7}{'  <--' if t is chosen else ''}"
        )
        if chosen and t is not chosen and meets(t, target):
            close += [str(knob)] if t["latency_s"] < chosen["latency_s"] * (1 + noise) else []
    if chosen is None:
        print("none meets the target: nothing changes")
    if close:
        print(f"as fast or faster, within the measuring noise: {', '.join(close)}")


def print_plan(out, plan: dict) -> None:
    """What a search chose, on the validation questions."""
    chosen, full, exit = plan["chosen"], plan["full"], plan["exit"]
    print(
        f"\n{out}: budgets {plan['budgets']}, "
        f"{'exit at {threshold}'.format(**exit) if exit else 'no exit'}; accuracy "
        f"{chosen['accuracy']:.1%}\n  (full {full['accuracy']:.1%}, epsilon {plan['epsilon']:g}), "
        f"speed-up {full['latency_s'] / chosen['latency_s']:.2f}x, on validation"
    )


def print_importance(similarity, ranking: list) -> None:
    """The similarity of every sub-layer, and the order in which they are skipped."""
    names = ("attention", "ffn")
    print(f"{'layer':>5}  {'attention':<36}ffn")
    for layer, row in enumerate(similarity):
        bars = (f"{float(s):7.4f} {'#' * round(26 * max(float(s), 0)):<28}" for s in row)
        print(f"{layer:>5}  {''.join(bars)}".rstrip())
    order = " ".join(f"{layer}{names[sub][0]}" for layer, sub in ranking)
    print(textwrap.fill(f"skipped first to last (a: attention, f: ffn): {order}", 78))


def print_stage(stage, labels: Sequence[str], n_sublayers: int) -> None:
    """One stage of one question, as it was generated."""
    print(stage.name)
    for label, text, stop in zip(labels, stage.texts, stage.stops):
        option = f"({label}) " if stage.name == "analyze" else ""
        line = f"{option}{text.strip()} [{stop}]"
        print(textwrap.fill(line, 78, initial_indent="    ", subsequent_indent="    "))
    per_token = 1e3 * stage.timings.decode_s / max(stage.tokens, 1)
    print(
        f"  {stage.tokens} tokens, {per_token:.2f} ms/token, "
        f"{stage.timings.skipped:g} of {n_sublayers} sub-layers skipped\n"
    )
