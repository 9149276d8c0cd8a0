"""Plans, and what a result depends on: the model, the questions, the prompts, the code.

A plan is what search.py writes and `--plan` reads: budgets and exit of a checkpoint, with the
rankings of the sub-layers that the budgets count in. It belongs to that checkpoint alone; what
else it was found with is stored, and a difference is said when it is used.

    python search.py --out plan.json
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from data.prompts import STAGES, stage_prompts, worked
from data.questions import Question
from generate import Exit
from model import InputError, expect, read_json, weight_files
from skip import Importance, Setting, SubLayer, rank
from tools.checkpoint import ROUTERS
from tools.files import digest_of, write_json
from tools.journal import Journal
from tools.ranks import rank as rank_here
from tools.tables import print_plan

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "data" / "demo" / "plan.json"
CODE = [f"{name}.py" for name in ("model", "skip", "generate", "search", "eval")]
CODE += [f"data/{name}.py" for name in ("prompts", "questions", "tokenizer")]
CODE += [
    f"tools/{name}.py" for name in ("clock", "fast", "losses", "plan", "report", "setup", "trials")
]
CODE += [f"tools/{name}.py" for name in ("drafts", "refine", "runs")]
CODE += [f"tools/{name}.py" for name in ("gates", "routers", "tokenwise", "trained")]

TOKENIZER_SETTINGS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")


@dataclass
class Choice:
    """What a search chose: a budget for each stage, and the exit."""

    budgets: list[int]
    exit: Exit | None


@dataclass
class Plan:
    """Budgets and an exit for a checkpoint, and what the budgets count in."""

    name: str  # its file's; "" if flags made it
    importance: Importance
    rankings: list[list[SubLayer]]  # one for each stage
    ranking_by: str  # "similarity" or "loss"
    granularity: str  # "sublayer" or "layer"
    budgets: list[int]
    exit: Exit | None
    frontier: list[Choice]  # of several epsilons; at least the plan's own
    found_with: dict  # of `conditions`
    draft: list[int] | None = None  # tokens that each stage drafts
    only_drafts: bool = False  # its budgets were chosen for drafts: without them they are too many
    trained: dict = field(default_factory=dict)  # see tools/trained.py

    @property
    def method(self) -> str:
        """The name of a run of it."""
        if self.ranking_by == "loss":
            return "litestage-loss"
        return "litestage"

    def setting(self, seed: int) -> Setting:
        """What policies see of it."""
        setting = Setting(self.importance, self.rankings, self.granularity, seed)
        return replace(setting, trained=self.trained)

    def by_similarity(self) -> "Plan":
        """The paper's ranking of the same importance, without budgets chosen for it."""
        plan = replace(self, frontier=[])
        plan.rank_by_similarity(self.granularity)
        return plan

    def rank_by_similarity(self, granularity: str) -> None:
        """Takes the paper's ranking, the same in all stages."""
        ranking = rank(self.importance.similarity, granularity)
        self.rankings = [ranking for _ in STAGES]
        self.ranking_by = "similarity"
        self.granularity = granularity


# ---------------------------------------------------------------- what a result depends on


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer: what a result belongs to."""
    folder = Path(folder)
    files = {
        "config": [folder / "config.json", folder / "generation_config.json"],
        "weights": sorted(weight_files(folder)),
        "tokenizer": [folder / "tokenizer.json", folder / "tokenizer.model"],
    }
    if (folder / ROUTERS).exists():
        files["routers"] = [folder / ROUTERS]
    files["tokenizer_settings"] = [folder / name for name in TOKENIZER_SETTINGS]
    digests = {}
    for key, paths in files.items():
        digests[key] = digest_of(filter(Path.exists, paths))
    return digests


def digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prompts_digest() -> str:
    """SHA-256 of the prompts of all stages, as they come out for a made-up question."""
    question = Question("0", "stem", ("A", "B"), ("one", "two"), "A", "recall", ("first", "second"))
    said = []
    prompts = []
    for index, stage in enumerate(STAGES):
        asked = stage_prompts(index, question, said)
        said.append(["said"] * len(asked))
        prompts.append([stage.name, stage.quoted, asked])
    return digest_of_text(json.dumps([prompts, worked(question)]))


def conditions(data: str, file: Path | None, n_shots: int, shots: str, most: int) -> dict:
    """What a plan is found or used with, beside the model.

    data, file: the questions, as --data names them, and their file, None if there is none.
    n_shots, shots: how many worked examples there are, and their text. most: --max-new-tokens.
    """
    found = {
        "data": data,
        "shots": n_shots,
        "max_new_tokens": most,
        "shots_digest": digest_of_text(shots),
        "prompts_digest": prompts_digest(),
    }
    if file is not None:
        found["data_digest"] = digest_of([file])
    return found


def differences(plan: Plan, now: dict, tested: Path | None) -> list[str]:
    """What a plan was not found with, a line each; nothing is said of what it does not know.

    now: the `conditions` of today, with the data set's validation questions, if it has any.
    tested: the file of the questions under test.
    """
    then = plan.found_with
    lines = []
    digest = then.get("data_digest")
    if tested is not None and digest == digest_of([tested]):
        lines.append("found on the very questions under test")
    elif digest is not None and "data_digest" in now:
        if digest != now["data_digest"]:
            lines.append(f"found for other questions ({Path(then['data']).name})")
    elif then.get("data", now["data"]) != now["data"]:
        lines.append(f"found for other questions ({Path(then['data']).name})")
    named = {"shots": "--shots", "max_new_tokens": "--max-new-tokens", "dtype": "--dtype"}
    for key, what in named.items():
        if key in now and then.get(key, now[key]) != now[key]:
            lines.append(f"found with {what} {then[key]}, used with {now[key]}")
    for key, what in (("shots_digest", "worked examples"), ("prompts_digest", "prompts")):
        same = then.get(key, now[key]) == now[key]
        told = key == "shots_digest" and then.get("shots") != now["shots"]
        if not same and not told:
            lines.append(f"found with other {what}")
    return [f"{plan.name} was {line}" for line in lines]


# ---------------------------------------------------------------- reading


def read_plan(path: Path, folder: Path, n_layers: int) -> Plan:
    """The plan that search.py wrote for the checkpoint in `folder`. Raises InputError for any
    other. Of the first format, whose one ranking serves all stages, or the second."""
    stored = read_json(path)
    version = stored.get("format")
    expect(version in (1, 2), f"{path}: 'format' must be 1 or 2, found {version!r}")
    try:
        check_model(path, stored, folder)
        importance = read_importance(path, stored, n_layers)
        choices = []
        for point in [stored, *stored.get("frontier", [])]:
            check_budgets(f"{path}: 'budgets'", point["budgets"], n_layers)
            choices.append(Choice(point["budgets"], read_exit(path, point["exit"])))
        granularity = stored["granularity"]
        fits = granularity in ("sublayer", "layer")
        expect(fits, f"{path}: 'granularity' must be sublayer or layer, found {granularity!r:.40}")
        plan = Plan(
            name=path.name,
            importance=importance,
            rankings=[],
            ranking_by=stored.get("ranking_by", "similarity"),
            granularity=granularity,
            budgets=choices[0].budgets,
            exit=choices[0].exit,
            frontier=choices[1:] or choices,
            found_with=stored,
            draft=read_draft(path, stored.get("draft")),
        )
        plan.only_drafts = plan.draft is not None
        if version == 1:
            plan.rank_by_similarity(granularity)
        else:
            plan.rankings = read_rankings(path, stored["rankings"], n_layers)
            fits = plan.ranking_by in ("similarity", "loss")
            expect(fits, f"{path}: 'ranking_by' must be similarity or loss")
            check_conditions(path, stored)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise InputError(f"{path}: not a plan of search.py ({type(e).__name__}: {e})") from None
    return plan


def check_model(path: Path, stored: dict, folder: Path) -> None:
    """Raises InputError if a plan is of another checkpoint."""
    digests = checkpoint_digests(folder)
    known = {"tokenizer_settings": digests["tokenizer_settings"]}  # earlier plans have none
    of_plan = {"routers": "none", **known, **stored["model"]}
    for key, digest in digests.items():
        found = of_plan[key]
        which = f"its {key} digest is {found!s:.12}, that of {folder} is {digest:.12}"
        expect(found == digest, f"{path}: a plan of another model: {which}")


def read_importance(path: Path, stored: dict, n_layers: int) -> Importance:
    tables = {}
    for key, rows in stored["importance"].items():
        table = torch.tensor(rows, dtype=torch.float64)
        fits = table.shape == (n_layers, 2) and bool(table.isfinite().all())
        expect(fits, f"{path}: 'importance' must be {n_layers} x 2 numbers")
        tables[key] = table
    return Importance(**tables)


def read_rankings(path: Path, stored: list, n_layers: int) -> list[list[SubLayer]]:
    """One ranking of all sub-layers for each stage."""
    every = {(layer, sub) for layer in range(n_layers) for sub in (0, 1)}
    rankings = []
    for rows in stored:
        ranking = [(layer, sub) for layer, sub in rows]
        whole = len(ranking) == len(every) and set(ranking) == every
        expect(whole, f"{path}: 'rankings' must name each of {len(every)} sub-layers once a stage")
        rankings.append(ranking)
    sizes = f"expected {len(STAGES)}, one a stage, found {len(rankings)}"
    expect(len(rankings) == len(STAGES), f"{path}: 'rankings': {sizes}")
    return rankings


def read_exit(path: Path, stored: dict | None) -> Exit | None:
    if stored is None:
        return None
    exit = Exit(**stored)
    fits = type(exit.window) is int and 0 < exit.window < 1 << 31
    fits = fits and 0 <= exit.threshold <= 1
    expect(fits, f"{path}: 'exit' must hold a window and a threshold, found {exit}")
    if exit.threshold == 0:
        return None
    return exit


def read_draft(path: Path, stored: list | None) -> list[int] | None:
    if stored is None:
        return None
    fits = isinstance(stored, list) and len(stored) == len(STAGES)
    for count in stored if fits else ():
        fits = fits and type(count) is int and 0 <= count < 1 << 31
    expect(fits, f"{path}: 'draft' must be null or {len(STAGES)} counts, found {stored!r:.40}")
    return stored


def store_setting(setting: Setting, ranking_by: str) -> dict:
    """What `read_setting` reads again, as JSON."""
    tables = setting.importance._asdict()
    return {
        "importance": {key: table.tolist() for key, table in tables.items()},
        "ranking_by": ranking_by,
        "rankings": setting.rankings,
    }


def read_setting(measured: dict, granularity: str) -> Setting:
    """What `litestage` needs, of what a search measured: importance and rankings."""
    tables = {}
    for key, rows in measured["importance"].items():
        tables[key] = torch.tensor(rows, dtype=torch.float64)
    rankings = []
    for rows in measured["rankings"]:
        rankings.append([(layer, sub) for layer, sub in rows])
    return Setting(Importance(**tables), rankings, granularity)


def check_conditions(path: Path, stored: dict) -> None:
    """Raises InputError unless what a plan was found with is there, each of its kind."""
    kinds = {"data": str, "data_digest": str, "prompts_digest": str, "shots_digest": str}
    kinds |= {"shots": int, "max_new_tokens": int}
    for key, kind in kinds.items():
        fits = type(stored[key]) is kind
        expect(fits, f"{path}: '{key}' must be of type {kind.__name__}, found {stored[key]!r:.40}")


def check_budgets(name: str, budgets: list[int], n_layers: int) -> None:
    """Raises InputError unless there is a budget for each stage, from 0 to 2 x n_layers."""
    most = 2 * n_layers
    fits = isinstance(budgets, list) and len(budgets) == len(STAGES)
    for budget in budgets:
        fits = fits and type(budget) is int and 0 <= budget <= most
    wanted = f"expected {len(STAGES)} numbers from 0 to {most}, a stage each"
    expect(fits, f"{name} {budgets}: {wanted}")


def shipped_stages() -> int:
    """For how many stages the demo's plan was found."""
    return len(read_json(SHIPPED)["budgets"])


def shipped_importance(folder: Path, n_layers: int) -> Importance | None:
    """The importance in the demo's plan; None if the model or the prompts are others by now."""
    stored = read_json(SHIPPED)
    try:
        check_model(SHIPPED, stored, folder)
    except (InputError, KeyError, TypeError):
        return None
    same = stored.get("prompts_digest", prompts_digest()) == prompts_digest()
    if not same or len(stored["budgets"]) != len(STAGES):
        return None
    return read_importance(SHIPPED, stored, n_layers)


# ---------------------------------------------------------------- writing


def write_plans(out: Path, shared: dict, found: list[dict]) -> None:
    """Writes and prints a plan for every epsilon.

    shared: what all of them have in common. found: for every epsilon what is its own: epsilon,
    budgets, exit, draft, chosen, trials. The first is the plan `out`, with the whole frontier in
    it; the others lie beside it, named by their epsilon.
    """
    frontier = []
    for own in sorted(found, key=lambda own: own["epsilon"]):
        frontier.append({key: value for key, value in own.items() if key != "trials"})
    for i, own in enumerate(found):
        plan = {"format": 2, **shared, **own}
        path = out
        if i == 0:
            plan["frontier"] = frontier
        else:
            path = out.with_name(f"{out.stem}-{own['epsilon']:g}{out.suffix}")
        print_plan(path, plan)
        if rank_here()[0] == 0:
            write_json(path, plan)


# ---------------------------------------------------------------- journals


def open_journal(out: Path, key: dict) -> Journal:
    """The journal beside an output file, named by the digest of all that its lines depend on, so
    that nothing stale is taken from it. A new one says what changed since the one before."""
    key = {**key, "code": digest_of(ROOT / name for name in CODE)}
    digest = digest_of_text(json.dumps(key))
    path = Path(f"{out}.{digest[:12]}.journal")
    before = newest_key(out)
    journal = Journal(path)
    if not journal.find("key"):
        if before is not None:
            print(f"note: a new journal, for other {', '.join(changes(before, key))}")
        journal.append("key", key)
    return journal


def newest_key(out: Path) -> dict | None:
    """The key of the journal last written beside an output file, None if there is none."""
    journals = sorted(out.absolute().parent.glob("*.journal"), key=modified)
    for path in reversed(journals):
        if path.name.startswith(f"{out.name}."):
            try:
                with open(path, "rb") as f:
                    return json.loads(f.readline())["key"]
            except (OSError, ValueError, LookupError, TypeError):
                return None
    return None


def modified(path: Path) -> float:
    """When a file was last written; 0 if it is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def changes(before: dict, now: dict) -> list[str]:
    """The names of the entries in which two keys differ, for a reader."""
    names = []
    for key in now:
        if before.get(key) != now[key]:
            names.append(key.replace("_digest", "").replace("_", " "))
    return names or ["format"]
