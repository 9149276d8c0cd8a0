"""The tables that commands print, 80 columns wide at most, and nothing that is computed for them.

A run is an entry of the JSON report's "runs", a trial one of a plan's "trials". Numbers and
intervals come from eval.py and search.py.

    python eval.py --json report.json
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from data.prompts import STAGES

WIDTH = 80
SUB_LAYERS = ("attention", "ffn")
TRAINED = ("gateskip", "dlo", "dlo-published")  # methods whose decisions cost multiply-adds

# ---------------------------------------------------------------- numbers


def in_columns(value: float, digits: int, most: int) -> str:
    """A number with so many digits after its point, or fewer where it would be too long."""
    while digits and len(f"{value:.{digits}f}") > most:
        digits -= 1
    return f"{value:.{digits}f}"


def count(value: float) -> str:
    """A count that may be a mean: 6.76923 is 6.8, 6.0 is 6."""
    return f"{value:.1f}".removesuffix(".0")


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    """A share, and its interval where there is one: 55.0 [47.2,62.1]."""
    if interval is None:
        return f"{100 * value:.1f}"
    low, high = interval
    return f"{100 * value:.1f} [{100 * low:.1f},{100 * high:.1f}]"


def commas(values: Sequence) -> str:
    return ",".join(map(str, values))


def method_of(run: dict) -> str:
    """A run's method, and which variant of it: litestage-uniform."""
    if run.get("variant"):
        return f"{run['method']}-{run['variant']}"
    return run["method"]


def name_of(run: dict) -> str:
    """A run's method and its budgets."""
    return f"{method_of(run)} {commas(run['budgets'])}"


# ---------------------------------------------------------------- eval.py


def print_report(report: dict) -> None:
    """All tables of a report, as eval.py writes it; the stages only where there are few runs."""
    runs = report["runs"]
    print_runs(runs)
    if len(runs) <= 3:
        print_stages(runs)
    print_differences(runs, report["n"])
    if any(run["method"] in TRAINED for run in runs):
        print_multiply_adds(runs)
    if report["ranks"] > 1 or report["batch"] > 1:
        print(f"latencies: {report['ranks']} processes at once, batches of {report['batch']}")


def print_runs(runs: list[dict]) -> None:
    """A line for every run: accuracy with its interval, cost, speed-up, sub-layers skipped.

    runs: the report's, of which method, budgets, accuracy, accuracy_ci95, latency_s, speedup and
    each stage's tokens and skipped_sublayers are shown.
    """
    skips = []
    for run in runs:
        skips.append(commas([count(stage["skipped_sublayers"]) for stage in run["stages"]]))
    last = max(15, 1 + max(map(len, skips)))  # columns of the last one; the first has what is left
    first = WIDTH - 39 - last
    print(
        f"{'method and budgets':<{first}.{first}}{'accuracy [95%]':>19}{'tokens':>7}{'ms':>7}"
        f"{'speed':>6}{'skipped':>{last}}"
    )
    for run, skipped in zip(runs, skips):
        name = name_of(run)
        if len(name) > first:
            print(name)
            name = ""
        accuracy = percent(run["accuracy"], run["accuracy_ci95"])
        tokens = in_columns(sum(stage["tokens"] for stage in run["stages"]), 1, 6)
        ms = in_columns(1e3 * run["latency_s"], 1, 6)
        speedup = in_columns(run["speedup"], 2, 4)
        print(f"{name:<{first}}{accuracy:>19}{tokens:>7}{ms:>7}{speedup:>5}x{skipped:>{last}}")


def print_stages(runs: list[dict]) -> None:
    """Where the time goes: a line for every stage of every run; means per question."""
    print(
        f"\n{'stage':<11}{'method':<18}{'tokens':>7}{'prefill ms':>11}{'decode ms':>10}"
        f"{'ms/token':>9}{'skipped':>8}{'exits':>6}"
    )
    for stages in zip(*(run["stages"] for run in runs)):
        for run, stage in zip(runs, stages):
            print(
                f"{stage['name']:<11.10}{method_of(run):<18.17}{stage['tokens']:>7.1f}"
                f"{1e3 * stage['prefill_s']:>11.2f}{1e3 * stage['decode_s']:>10.2f}"
                f"{stage['ms_per_token']:>9.3f}{stage['skipped_sublayers']:>8.1f}"
                f"{stage['exit_rate']:>6.0%}"
            )


def print_differences(runs: list[dict], n: int) -> None:
    """Every run against the full model, the first, over the same n questions: accuracy_delta and
    accuracy_delta_ci95; then no_answer and too_long, where a run has any."""
    print()
    for run in runs[1:]:
        low, high = run["accuracy_delta_ci95"]
        print(
            f"{name_of(run)} against full: accuracy {100 * run['accuracy_delta']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}]"
        )
    for run in runs:
        if run["no_answer"] or run["too_long"]:
            print(
                f"{name_of(run)}: {run['no_answer']} of {n} with no answer, "
                f"{run['too_long']} did not fit the context"
            )
        if run["draft"]:
            shares = []
            for stage in run["stages"]:
                shares.append("-" if stage["accepted"] is None else f"{stage['accepted']:.0%}")
            print(
                f"{name_of(run)} drafts {commas(run['draft'])}, accepted {', '.join(shares)}; "
                f"texts changed in {run['texts_changed']} of {n}"
            )


def print_multiply_adds(runs: list[dict]) -> None:
    """What a decoded token costs in every run, by its "macs", and by the full model's, the first:
    a trained method computes its gates or routers to save the rest."""
    print(f"\n{'multiply-adds a token':<48}{'millions':>12}{'of full':>10}")
    for run in runs:
        if run["macs"] is not None and runs[0]["macs"]:
            share = run["macs"] / runs[0]["macs"]
            print(f"{name_of(run):<48.47}{run['macs'] / 1e6:>12.3f}{share:>10.2f}")


# ---------------------------------------------------------------- search.py


def print_full(full: dict, order: Sequence[int], noise: float) -> None:
    """The full model on the validation questions, and the order in which stages are searched.

    full: its trial: accuracy, latency_s and stage_s (seconds per question, in all and by stage),
    accuracy_ci95 if it is known. order: stage numbers, slowest first. noise: of times, relative.
    """
    seconds = full["stage_s"]
    accuracy = f"accuracy {percent(full['accuracy'], full.get('accuracy_ci95'))}"
    total = f"{1e3 * full['latency_s']:.2f} ms/question"
    print(f"full model: {accuracy}%, {total}, measuring noise {noise:.1%}")
    slowest = [f"{STAGES[i].name} {1e3 * seconds[i]:.2f} ms" for i in order]
    print(textwrap.fill(f"slowest stage first: {', '.join(slowest)}", WIDTH))
    if full["accuracy"] == 0:
        print("it answers none of the questions right: every budget meets the target")
    for slower, faster in zip(order, order[1:]):
        if seconds[slower] <= seconds[faster] * (1 + noise):
            both = f"{STAGES[slower].name} and {STAGES[faster].name}"
            print(f"{both} are equally slow, within the noise:\n  another run may swap them")


def print_scan(
    title: str, target: float, trials: list[dict], chosen: int | None, noise: float
) -> None:
    """What a search tried, one line a trial: the paper's table for one stage.

    title: the stage, or what else was scanned. target: the accuracy to reach.
    trials: each a plan's trial (accuracy, tokens, latency_s, exit_rate, abandoned) with "tried",
    the budget or threshold that stands before its line, "meets", whether it reaches the target,
    and "accuracy_ci95", its interval, unless it was abandoned.
    chosen: which of the trials was taken, None if none meets the target.
    noise: of latencies, relative; trials that are as fast within it are named.
    """
    wanted = f"target accuracy {target:.1%}"
    if trials[0].get("draft") is not None:
        wanted = "the texts are the full model's; budget x drafts"
    print(f"\n{title}: {wanted}")
    print(
        f"{'tried':>10}{'accuracy [95%]':>20}{'tokens':>9}{'ms':>10}{'exits':>7}{'meets':>7}"
        f"{'chosen':>8}"
    )
    for i, trial in enumerate(trials):
        took = f"{1e3 * trial['latency_s']:.2f}"
        accuracy = percent(trial["accuracy"], trial.get("accuracy_ci95"))
        if trial["abandoned"]:
            took = "-"
            accuracy = "<=" + percent(trial["accuracy"])
        meets = "no"
        if trial["meets"]:
            meets = "yes"
        arrow = ""
        if i == chosen:
            arrow = "  <--"
        print(
            f"{trial['tried']!s:>10}{accuracy:>20}{trial['tokens']:>9.1f}{took:>10}"
            f"{trial['exit_rate']:>7.0%}{meets:>7}{arrow}"
        )
    if chosen is None:
        print("none meets the target: nothing changes")
        return
    close = []
    for i, trial in enumerate(trials):
        fast = trial["latency_s"] < trials[chosen]["latency_s"] * (1 + noise)
        if i != chosen and trial["meets"] and fast:
            close.append(str(trial["tried"]))
    if close:
        text = f"as fast or faster, within the measuring noise: {', '.join(close)}"
        print(textwrap.fill(text, WIDTH))


def print_plan(path: Path, plan: dict) -> None:
    """What a search chose, on the validation questions: the plan that is written to `path`."""
    chosen = plan["chosen"]
    full = plan["full"]
    exits = "no exit"
    if plan["exit"]:
        exits = f"exit at {plan['exit']['threshold']}"
    if plan["draft"]:
        exits += f", drafts {commas(plan['draft'])}"
    speedup = full["latency_s"] / chosen["latency_s"]
    print(
        f"\n{path}: budgets {plan['budgets']}, {exits}; accuracy {chosen['accuracy']:.1%}\n"
        f"  (full {full['accuracy']:.1%}, epsilon {plan['epsilon']:g}), "
        f"speed-up {speedup:.2f}x, on validation"
    )


# ---------------------------------------------------------------- skip.py and generate.py


def print_importance(similarity, ranking: Sequence[tuple[int, int]]) -> None:
    """The similarity of every sub-layer, (n_layers, 2) numbers or a tensor, as numbers and bars;
    and the order in which they are skipped, (layer, sub) each."""
    print(f"{'layer':>5}  {'attention':<36}ffn")
    for layer, row in enumerate(similarity):
        line = f"{layer:>5}  "
        for value in map(float, row):
            bar = "#" * round(26 * max(value, 0))
            line += f"{value:7.4f} {bar:<28}"
        print(line.rstrip())
    order = " ".join(f"{layer}{SUB_LAYERS[sub][0]}" for layer, sub in ranking)
    print(textwrap.fill(f"skipped first to last (a: attention, f: ffn): {order}", WIDTH - 2))


def print_stage(
    result, labels: Sequence[str], n_sublayers: int, show_prompts: bool = False
) -> None:
    """One stage of one question, as it was generated.

    result: generate.StageResult. labels: the options', shown where the stage has a text for each.
    n_sublayers: how many the model has. show_prompts: each prompt stands before its text, indented
    by a bar and otherwise as the model reads it.
    """
    print(result.name)
    for i, text in enumerate(result.texts):
        if show_prompts:
            print(textwrap.indent(result.prompts[i], "  | ", lambda _: True))
        line = f"{text.strip()} [{result.stops[i]}]"
        if len(result.texts) == len(labels):
            line = f"({labels[i]}) {line}"
        print(textwrap.fill(line, WIDTH - 2, initial_indent="    ", subsequent_indent="    "))
    per_token = 1e3 * result.timings.decode_s / max(result.tokens, 1)
    print(
        f"  {result.tokens} tokens, {per_token:.2f} ms/token, "
        f"{count(result.timings.skipped)} of {n_sublayers} sub-layers skipped\n"
    )
