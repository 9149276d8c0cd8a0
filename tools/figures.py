"""Pictures from JSON reports and plans: what eval.py, search.py and tools/sweep.py measured.

From a report of `eval.py --compare` accuracy against speed-up, a line for every method; from one of
tools/sweep.py accuracy and tokens against the skips of each stage; from a plan which sub-layers
each stage skips; from a plan or a sweep the importance of every sub-layer. Readable in black and
white. Drawing needs matplotlib, which is not among the requirements.

    python tools/figures.py compare.json sweep.json plan.json --out figures
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: F401  # isort: skip  (first: Ctrl-C is one line while torch loads)

import io

import torch

from model import InputError, expect, read_json
from skip import Importance, Setting, litestage
from tools.command import run
from tools.files import write_bytes
from tools.flags import make_parser
from tools.tables import method_of

STYLES = {  # method and variant: (marker, line, label)
    "litestage": ("*", "-", "LiteStage"),
    "litestage-loss": ("P", "--", "LiteStage, by loss"),
    "litestage-uniform": ("o", "--", "LiteStage, one budget"),
    "litestage-no-exit": ("x", "none", "LiteStage, no exit"),
    "litestage-loss-uniform": ("p", ":", "LiteStage by loss, one budget"),
    "litestage-loss-no-exit": ("1", "none", "LiteStage by loss, no exit"),
    "litestage-draft": ("d", "none", "LiteStage, lossless"),
    "adaskip": ("s", "-.", "AdaSkip"),
    "early-exit": ("^", ":", "early exit"),
    "skipdecode": ("v", "--", "SkipDecode"),
    "unified": ("D", "-.", "Unified Layer Skipping"),
    "random": ("+", ":", "random"),
    "gateskip": ("<", "-", "GateSkip, trained"),
    "dlo": (">", "-", "DLO, trained"),
}
STAGE_MARKERS = "os^Dv*"
RANKINGS = {  # of a sweep: method: (line, label)
    "litestage": ("-", "by similarity"),
    "litestage-loss": ("--", "by loss"),
}
FIRST_STAGES = ["recall", "analyze", "summarize"]  # of the first format, which has no names
NEAR = 5  # percentage points below the full model: the second panel of a comparison

# ---------------------------------------------------------------- a comparison


def points_by_method(runs: list[dict]) -> dict[str, list[dict]]:
    """The runs beside the full model's, the first, by method and variant, those that skip less in
    front."""
    methods: dict[str, list[dict]] = {}
    for entry in runs[1:]:
        methods.setdefault(method_of(entry), []).append(entry)
    for entries in methods.values():
        entries.sort(key=lambda entry: sum(entry["budgets"]))
    return methods


def draw_comparison(plt, report: dict):
    """Accuracy against speed-up: all runs, and beside them those near the full model's accuracy."""
    figure, (whole, near) = plt.subplots(1, 2, figsize=(10, 5.4))
    full = 100 * report["runs"][0]["accuracy"]
    methods = points_by_method(report["runs"])
    for axes in (whole, near):
        axes.axhline(full, color="black", linewidth=0.8)
        axes.axhspan(full - NEAR, full, color="0.92", zorder=0)
        for i, (name, entries) in enumerate(methods.items()):
            draw_method(axes, name, entries, gray=0.25 + 0.08 * (i % 5))
        axes.set_xlabel("speed-up over the full model, end to end")
    zoom(near, report["runs"], full)
    whole.set_ylabel("accuracy, % (95% interval)")
    whole.set_title("all runs", fontsize=10)
    near.set_title(f"no more than {NEAR} points below the full model (gray)", fontsize=10)
    figure.suptitle(title_of(report), fontsize=11)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def draw_method(axes, name: str, entries: list[dict], gray: float) -> None:
    """One method's runs as points with their intervals."""
    marker, line, label = STYLES.get(name, ("o", "-", name))
    color = str(gray)
    if name.startswith("litestage"):
        color = "black"
    size = 5
    width = 1
    if name in ("litestage", "litestage-loss"):
        size = 10
        width = 2
    axes.errorbar(
        [entry["speedup"] for entry in entries],
        [100 * entry["accuracy"] for entry in entries],
        yerr=error_bars(entries),
        marker=marker,
        markersize=size,
        linestyle=line,
        linewidth=width,
        elinewidth=0.6,
        color=color,
        label=label,
    )


def zoom(axes, runs: list[dict], full: float) -> None:
    """Narrows a panel to the runs that are near the full model's accuracy, `full` percent."""
    speedups, tops = [], []
    for entry in runs:
        if 100 * entry["accuracy"] >= full - NEAR:
            speedups.append(entry["speedup"])
            tops.append(100 * entry["accuracy_ci95"][1])
    room = 0.05 * (max(speedups) - min(speedups)) + 0.02
    axes.set_xlim(min(speedups) - room, max(speedups) + room)
    axes.set_ylim(full - NEAR, max(tops) + 0.3)


def error_bars(entries: list[dict]) -> list[list[float]]:
    """How far the 95% intervals reach below and above, in percentage points."""
    below, above = [], []
    for entry in entries:
        low, high = entry["accuracy_ci95"]
        below.append(max(100 * (entry["accuracy"] - low), 0.0))
        above.append(max(100 * (high - entry["accuracy"]), 0.0))
    return [below, above]


# ---------------------------------------------------------------- a sweep


def draw_sweep(plt, report: dict, field: str):
    """Against the sub-layers that one stage alone skips: field "accuracy" of the answers, with its
    95% interval, or the "tokens" that the stage generates. A line for each stage and ranking."""
    figure, axes = plt.subplots(figsize=(6.5, 4.5))
    full = report["runs"][0]
    methods = points_by_method(report["runs"])
    for name in methods:
        line, ranked = RANKINGS.get(name, (":", name))
        for i, stage in enumerate(full["stages"]):
            entries = [full]
            for entry in methods[name]:
                if entry["budgets"][i] == sum(entry["budgets"]) > 0:
                    entries.append(entry)
            label = stage["name"]
            if len(methods) > 1:
                label += f", {ranked}"
            look = {"linestyle": line, "marker": STAGE_MARKERS[i % len(STAGE_MARKERS)]}
            look |= {"color": str(0.25 * (i % 3)), "markersize": 5, "label": label}
            budgets = [entry["budgets"][i] for entry in entries]
            if field == "accuracy":
                values = [100 * entry["accuracy"] for entry in entries]
                spread = error_bars(entries)
            else:
                values = [entry["stages"][i]["tokens"] for entry in entries]
                spread = [half_width(entry["stages"][i]) for entry in entries]
            axes.errorbar(budgets, values, spread, elinewidth=0.6, capsize=2, **look)
    axes.set_xlabel("sub-layers skipped in this stage alone")
    axes.set_ylabel("tokens of the stage, per question (95% interval)")
    if field == "accuracy":
        axes.set_ylabel("accuracy, % (95% interval)")
    axes.set_title(title_of(report), fontsize=10)
    axes.legend(frameon=False, fontsize=8, handlelength=3.5)
    return figure


def half_width(stage: dict) -> float:
    """Of the 95% interval of a stage's tokens; earlier reports have none."""
    low, high = stage.get("tokens_ci95", (0.0, 0.0))
    return (high - low) / 2


# ---------------------------------------------------------------- a plan


def draw_plan(plt, plan: dict, title: str):
    """Which sub-layers every stage skips: layers across, stages down, attention above FFN."""
    names, masks = skipped_sublayers(plan)
    n_layers = len(masks[0])
    figure, axes = plt.subplots(figsize=(max(6, 0.28 * n_layers + 2), 0.8 * len(names) + 1.4))
    ticks, labels = [], []
    for stage, mask in enumerate(masks):
        for sub, sub_name in enumerate(("attention", "FFN")):
            top = 2.4 * stage + sub  # a gap between the stages
            ticks.append(top)
            labels.append(sub_name)
            for layer, skipped in enumerate(mask[:, sub].tolist()):
                color = "0.35"
                if skipped:
                    color = "white"
                axes.barh(top, 0.9, 0.9, layer - 0.45, color=color, edgecolor="0.35", linewidth=0.7)
        text = f"{names[stage]}\nskips {int(mask.sum())}"
        axes.text(n_layers - 0.2, 2.4 * stage + 0.5, text, va="center", fontsize=9)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.set_xlim(-0.6, n_layers - 0.4)
    axes.set_ylim(ticks[-1] + 0.6, -0.6)
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel("layer (dark: runs, white: skipped)")
    axes.set_title(title, fontsize=10)
    return figure


def skipped_sublayers(plan: dict) -> tuple[list[str], list[torch.Tensor]]:
    """(each stage's name, each stage's mask (n_layers, 2) of what it skips) of a plan."""
    budgets = plan["budgets"]
    names = plan.get("stages")
    rankings = plan.get("rankings")
    if rankings is None:  # the first format: one for all
        names = FIRST_STAGES
        rankings = [plan["ranking"]] * len(budgets)
    if names is None:
        names = [f"stage {i + 1}" for i in range(len(budgets))]
    tables = {key: torch.tensor(value) for key, value in plan["importance"].items()}
    setting = Setting(Importance(**tables), rankings, plan["granularity"])
    masks = [litestage(setting.at(i), budget) for i, budget in enumerate(budgets)]
    return names, masks


def draw_importance(plt, similarity: list, title: str):
    """A heat map of how much every sub-layer changes its input, 1 - similarity, darker for more;
    on a logarithmic scale, for most change little."""
    figure, axes = plt.subplots(figsize=(7, 2.4))
    changes = [[max(1 - row[sub], 1e-6) for row in similarity] for sub in (0, 1)]
    image = axes.imshow(changes, aspect="auto", cmap="gray_r", norm="log")
    axes.set_yticks([0, 1], ["attention", "FFN"])
    axes.set_xlabel("layer")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="1 - cosine similarity")
    return figure


# ---------------------------------------------------------------- command


def title_of(value: dict) -> str:
    """Model, data set and number of questions of a report or a plan."""
    model = value["model"]
    if isinstance(model, dict):
        model = model["name"]
    words = [Path(value["data"]).name]
    if value.get("split"):
        words.append(value["split"])
    return f"{Path(model).name} on {' '.join(words)}, n = {value['n']}"


def draw(plt, value: dict) -> dict:
    """All pictures of a report or a plan: what is added to the file's name, and the figure."""
    figures = {}
    if value.get("kind") == "sweep":
        figures["-accuracy"] = draw_sweep(plt, value, "accuracy")
        figures["-tokens"] = draw_sweep(plt, value, "tokens")
    elif value.get("runs"):
        figures[""] = draw_comparison(plt, value)
    elif "budgets" in value:
        figures["-plan"] = draw_plan(plt, value, title_of(value))
    similarity = value.get("similarity") or value.get("importance", {}).get("similarity")
    if similarity:
        figures["-importance"] = draw_importance(plt, similarity, title_of(value))
    return figures


def free_path(folder: Path, file: Path, ending: str, taken: list[Path]) -> Path:
    """Where a picture of `file` goes: to its name, or, if that is taken, to one that begins with
    the name of its folder, or ends in a number."""
    name = f"{file.stem}{ending}"
    path = folder / f"{name}.png"
    if path in taken:
        name = f"{file.absolute().parent.name}-{name}"
        path = folder / f"{name}.png"
    number = 2
    while path in taken:
        path = folder / f"{name}-{number}.png"
        number += 1
    return path


def save(plt, figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    plt.close(figure)
    write_bytes(path, picture.getvalue())


def find_matplotlib():
    """matplotlib.pyplot, drawing to files. Raises InputError if it is not installed."""
    try:
        import matplotlib
        import matplotlib.pyplot as plt
    except ImportError:
        raise InputError("matplotlib is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    plt.rcParams["figure.constrained_layout.use"] = True
    return plt


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="reports and plans, JSON")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="(default: %(default)s)")
    args = parser.parse_args()
    plt = find_matplotlib()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {args.out}: cannot be made ({e.strerror})") from None
    drawn: list[Path] = []
    for file in args.files:
        value = read_json(file)
        try:
            figures = draw(plt, value)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            raise InputError(f"{file}: not a report or a plan ({type(e).__name__}: {e})") from None
        expect(bool(figures), f"{file}: expected a report of eval.py or a plan of search.py")
        for ending, figure in figures.items():
            path = free_path(args.out, file, ending, drawn)
            save(plt, figure, path)
            drawn.append(path)
            print(path)


if __name__ == "__main__":
    run(main)
