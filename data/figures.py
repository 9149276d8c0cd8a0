"""Pictures from JSON reports and plans: what eval.py, search.py and data/sweep.py measured.

From a report of `eval.py --compare` accuracy against speed-up, a line for every method; from one of
data/sweep.py accuracy and tokens against the skips of each stage; from a plan or a sweep the
importance of every sub-layer. Readable in black and white.

    python data/figures.py compare.json sweep.json --out figures
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import cli
from data.prompts import STAGES
from model import InputError, read_json

STYLES = {  # method: (marker, line, label)
    "litestage": ("*", "-", "LiteStage"),
    "litestage-uniform": ("o", "--", "LiteStage, one budget"),
    "litestage-no-exit": ("x", "none", "LiteStage, no exit"),
    "adaskip": ("s", "-.", "AdaSkip"),
    "early-exit": ("^", ":", "early exit"),
    "skipdecode": ("v", "--", "SkipDecode"),
    "unified": ("D", "-.", "Unified Layer Skipping"),
    "random": ("+", ":", "random"),
}


def points_by_method(runs: list[dict]) -> dict[str, list[dict]]:
    methods: dict[str, list[dict]] = {}
    for r in runs[1:]:
        methods.setdefault(r["method"], []).append(r)
    return {name: sorted(rs, key=lambda r: sum(r["budgets"])) for name, rs in methods.items()}


def draw_comparison(plt, report: dict, path: Path) -> None:
    """Accuracy against speed-up; the full model and the four points below it are marked."""
    figure, axes = plt.subplots(figsize=(8.5, 4.6))
    full = 100 * report["runs"][0]["accuracy"]
    axes.axhline(full, color="black", linewidth=0.8)
    axes.axhspan(full - 4, full, color="0.9", zorder=0)
    where = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 8}
    axes.annotate("full model, and 4 points below", (1.0, full), (0, 4), ha="right", **where)
    methods = points_by_method(report["runs"])
    for i, (name, runs) in enumerate(methods.items()):
        marker, line, label = STYLES.get(name, ("o", "-", name))
        accuracy = [100 * r["accuracy"] for r in runs]
        ends = [[100 * abs(r["accuracy_ci95"][k] - r["accuracy"]) for r in runs] for k in (0, 1)]
        ours = name.startswith("litestage")
        axes.errorbar(
            [r["speedup"] for r in runs],
            accuracy,
            yerr=ends,
            marker=marker,
            markersize=10 if name == "litestage" else 5,
            linestyle=line,
            linewidth=2 if name == "litestage" else 1,
            elinewidth=0.6,
            color="black" if ours else str(0.25 + 0.08 * (i % 5)),
            label=label,
        )
    axes.set_xlabel("speed-up over the full model, end to end")
    axes.set_ylabel("accuracy, % (95% interval)")
    named = [Path(report["data"]).name, *filter(None, [report.get("split")])]
    axes.set_title(f"{' '.join(named)}, n = {report['n']}", fontsize=10)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 0.85))
    finish(plt, figure, axes, path)


def draw_stages(plt, report: dict, field: str, path: Path) -> None:
    """Accuracy, or the tokens a stage generates, against the sub-layers it alone skips."""
    figure, axes = plt.subplots(figsize=(6, 4))
    full = report["runs"][0]
    for i, (name, marker, line) in enumerate(zip(STAGES, "os^", ("-", "--", ":"))):
        alone = [r for r in report["runs"] if r is full or r["budgets"][i] == sum(r["budgets"]) > 0]
        values = {
            r["budgets"][i]: 100 * r["accuracy"]
            if field == "accuracy"
            else r["stages"][i]["tokens"]
            for r in alone
        }
        budgets = sorted(values)
        axes.plot(
            budgets, [values[b] for b in budgets], line, marker=marker, color="black", label=name
        )
    axes.set_xlabel("sub-layers skipped in this stage alone")
    axes.set_ylabel("accuracy, %" if field == "accuracy" else "tokens the stage generates")
    axes.legend(frameon=False)
    finish(plt, figure, axes, path)


def draw_importance(plt, similarity: list, path: Path) -> None:
    """A heat map of how much every sub-layer changes its input, 1 - similarity, darker for more;
    on a logarithmic scale, for most change little."""
    figure, axes = plt.subplots(figsize=(7, 2.2))
    changes = [[max(1 - row[sub], 1e-6) for row in similarity] for sub in (0, 1)]
    image = axes.imshow(changes, aspect="auto", cmap="gray_r", norm="log")
    axes.set_yticks([0, 1], ["attention", "feed-forward"])
    axes.set_xlabel("layer")
    figure.colorbar(image, label="1 - cosine similarity")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def finish(plt, figure, axes, path: Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = cli.make_parser(__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="reports and plans, JSON")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        import matplotlib
    except ImportError:
        raise InputError("matplotlib is not installed; pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--out {args.out}: cannot be made ({e.strerror})") from None
    for file in args.files:
        value = read_json(file)
        drawn = []
        try:
            runs = value.get("runs", [])
            alone = [r for r in runs if sum(r["budgets"]) == max(r["budgets"]) > 0]
            if len(runs) > 1 and len(alone) == len(runs) - 1:
                for field in ("accuracy", "tokens"):
                    drawn.append(args.out / f"{file.stem}-{field}.png")
                    draw_stages(plt, value, field, drawn[-1])
            elif runs:
                drawn.append(args.out / f"{file.stem}.png")
                draw_comparison(plt, value, drawn[-1])
            similarity = value.get("similarity") or value.get("importance", {}).get("similarity")
            if similarity:
                drawn.append(args.out / f"{file.stem}-importance.png")
                draw_importance(plt, similarity, drawn[-1])
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{file}: not a report or a plan ({type(e).__name__}: {e})") from None
        if not drawn:
            raise InputError(f"{file}: expected a report of eval.py or a plan of search.py")
        print("\n".join(map(str, drawn)))


if __name__ == "__main__":
    cli.run(main)
