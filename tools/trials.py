"""What surrounds a search: its flags and files, and the texts that it need not generate twice.

A generation depends on its prompt, its skip set and the exit's threshold alone, so one that an
earlier trial made after the same texts is taken from there.

    python search.py --limit 20 --step 8
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.prompts import STAGES, find_answer
from data.questions import Question
from generate import Draft, Exit, Pipeline, StageResult
from model import expect
from skip import Setting, litestage
from tools.clock import verify_times
from tools.drafts import COUNTS
from tools.flags import MODEL_FLAGS, SEARCH_FLAGS, make_parser
from tools.journal import Journal
from tools.plan import checkpoint_digests, conditions, open_journal, read_setting, write_plans
from tools.ranks import gather, interleave, rank
from tools.setup import Asked, keep_threads, load_asked, note, read_asked

PER_ROUND = 20  # answers of a scan that make a round of timing steps worth its time


class Key(NamedTuple):
    """All that a stage of a question depends on."""

    question: int
    stage: int
    budget: int
    threshold: float
    count: int  # of tokens to draft
    said: str  # before


class Answers:
    """The answers of a pipeline to fixed questions at any budgets, each text generated once.

    window: of the exit. batch: questions generated side by side; their texts count, not their
    times. generated counts the question-stages that ran.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        questions: list[Question],
        setting: Setting,
        window: int,
        batch: int,
    ):
        self.pipeline = pipeline
        self.questions = questions
        self.setting = setting
        self.window = window
        self.caches = pipeline.new_caches(batch)
        self.made: dict[Key, StageResult] = {}
        self.generated = 0

    def growing(self, budgets, threshold: float, draft=None) -> Iterator[list[list[StageResult]]]:
        """All stages of the first questions, some more each time, shared out among the ranks."""
        number, world = rank()
        n = len(self.questions)
        together = len(self.caches) * world
        done: list[list[StageResult]] = []
        for start in range(0, n, together):
            chosen = list(range(start, min(start + together, n)))
            done += interleave(self.at(chosen[number::world], budgets, threshold, draft))
            yield done

    def count_right(self, done: list[list[StageResult]]) -> int:
        """How many of the first questions are answered right."""
        right = 0
        for question, stages in zip(self.questions, done):
            right += find_answer(stages[-1].texts[0], question.labels) == question.answer
        return right

    def at(self, chosen: list[int], budgets, threshold: float, draft) -> list[list[StageResult]]:
        """All stages of the chosen questions, `batch` at most, with a budget for each stage."""
        counts = draft or [0] * len(budgets)
        done: list[list[StageResult]] = [[] for _ in chosen]
        for index, budget in enumerate(budgets):
            keys = []
            missing = []
            for number, stages in zip(chosen, done):
                said = [stage.texts for stage in stages]
                key = Key(number, index, budget, threshold, counts[index], str(said))
                keys.append(key)
                if key not in self.made:
                    missing.append((key, said))
            self.generate(missing)
            for key, stages in zip(keys, done):
                stages.append(self.made[key])
        return done

    def generate(self, missing: list[tuple[Key, list[list[str]]]]) -> None:
        """Runs a stage of questions side by side; each comes with what was said before."""
        if not missing:
            return
        first = missing[0][0]  # but for the question and what was said, all are the same
        exit = None
        if first.threshold:
            exit = Exit(self.window, first.threshold)
        questions = [self.questions[key.question] for key, _ in missing]
        said = [texts for _, texts in missing]
        skip = litestage(self.setting.at(first.stage), first.budget)
        if first.count:
            skip = Draft(skip, first.count)
        results = self.pipeline.run_stage(first.stage, questions, said, self.caches, skip, exit)
        for (key, _), result in zip(missing, results):
            self.made[key] = result
        self.generated += len(missing)


class Trials:
    """The trial of any point for a target: from the journal, or run now; never twice.

    run: run_trial of search.py, which is given answers, measured, the point and the target.
    """

    def __init__(self, run: Callable, answers: Answers, measured: dict, journal: Journal):
        self.run = run
        self.answers = answers
        self.measured = measured
        self.journal = journal
        self.asked = 0  # how often a trial was asked for
        self.known = {}
        for trial in journal.find("trial"):
            draft = trial.get("draft")
            point = (tuple(trial["budgets"]), trial["threshold"], draft and tuple(draft))
            self.known[point] = trial

    def __call__(self, point: tuple, target: float) -> dict:
        """A point's trial. An abandoned one will do where its bound misses the target, too."""
        self.asked += 1
        trial = self.known.get(point)
        if trial and not (trial["abandoned"] and trial["accuracy"] >= target - 1e-9):
            return trial
        trial = self.run(self.answers, self.measured, point, target)
        self.known[point] = trial
        self.journal.append("trial", trial)
        return trial


def search_journal(args, pipeline: Pipeline, asked: Asked) -> tuple[Journal, dict]:
    """The journal of a search with these flags, beside its plan; and what the plans of the search
    have in common. Everything that a trial depends on is in the journal's key."""
    model = pipeline.model
    digests = checkpoint_digests(model.folder)
    found_with = conditions(
        asked.data, asked.file, asked.n_shots, asked.shots, pipeline.max_new_tokens
    )
    n = len(asked.questions)
    key = digests | found_with
    del key["data"]  # its content counts
    key |= {
        "n": n,
        "ranking": getattr(args, "ranking", "similarity"),
        "granularity": args.granularity,
        "exit_window": args.exit_window,
        "device": [str(model.device), args.compile, args.plain],
        "dtype": str(model.dtype),
        "threads": args.threads,
    }
    journal = open_journal(args.out, key)
    keep_threads(journal)
    shared = {
        "model": {"name": args.model, **digests},
        **found_with,
        "dtype": str(model.dtype).removeprefix("torch."),
        "split": "valid",
        "n": n,
        "stages": [stage.name for stage in STAGES],
        "granularity": args.granularity,
        "command": shlex.join(["python", *sys.argv]),
    }
    return journal, shared


class Session:
    """A run of search.py: its flags, model and questions, its journal, and the plans it writes.

    doc: the command's help. Raises InputError for flags that do not fit the model or one another.
    """

    def __init__(self, doc: str):
        self.began = time.monotonic()
        self.args = read_flags(doc)
        args = self.args
        asked = read_asked(args.data, "valid", args.limit, args.shots, args.shots_file)
        self.questions = asked.questions
        self.pipeline = load_asked(args, asked, few=False)
        n_sublayers = 2 * self.pipeline.model.args.n_layers
        args.max_budget = args.max_budget or n_sublayers - 2
        wanted = f"--max-budget {args.max_budget}: the model has {n_sublayers} sub-layers"
        expect(args.max_budget <= n_sublayers, wanted)
        self.journal, self.shared = search_journal(args, self.pipeline, asked)
        self.found: dict[float, dict] = {}  # by epsilon, what is a plan's own
        n = len(self.questions)
        for epsilon in sorted(args.epsilon, reverse=True):
            if 0 < epsilon < 1 / n:
                note(f"epsilon {epsilon:g} is less than one question of {n}: none may be lost")

    def measured(self, measure: Callable, most: int) -> dict:
        """Step 1 of search.py, from the journal or now, in rounds that fit the search's size."""
        args = self.args
        enough = len(self.questions) * (args.max_budget // args.step + 1) // PER_ROUND
        rounds = min(most, max(3, enough))
        given = (self.pipeline, self.questions, self.args, rounds, self.journal)
        measured = self.journal.once("measured", measure, *given)
        counts = args.draft
        if counts:
            said = self.journal.find("ranked")[0]["said"]
            times = verify_times(self.pipeline, self.questions, said, counts, self.journal)
            measured = measured | {"verify_s": times}
        return measured

    def trials(self, run: Callable, measured: dict, batch: int, gpu_batch: int) -> Trials:
        """See there. batch: questions side by side, of which a GPU takes more."""
        if self.pipeline.model.device.type != "cpu":
            batch = gpu_batch
        setting = read_setting(measured, self.args.granularity)
        window = self.args.exit_window
        answers = Answers(self.pipeline, self.questions, setting, window, batch)
        return Trials(run, answers, measured, self.journal)

    def keep(self, epsilon: float, chosen: dict, trials: dict) -> None:
        """What was found for an epsilon: the chosen trial, and all trials."""
        exit = None
        if chosen["threshold"]:
            exit = Exit(self.args.exit_window, chosen["threshold"])._asdict()
        self.found[epsilon] = {
            "epsilon": epsilon,
            "budgets": chosen["budgets"],
            "exit": exit,
            "draft": chosen["draft"],
            "chosen": chosen,
            "trials": list(trials.values()),
        }

    def close(self, measured: dict, trials: Trials) -> None:
        """Writes the plans, and says what they cost."""
        found = [self.found[epsilon] for epsilon in self.args.epsilon]
        write_plans(self.args.out, self.shared | measured, found)
        ran = sum(gather(trials.answers.generated))
        naive = trials.asked * len(STAGES) * len(self.questions)
        took = time.monotonic() - self.began
        print(f"\n{ran} question-stages generated, naively {naive}; {took:.0f} s")


def read_flags(doc: str) -> argparse.Namespace:
    """The flags of search.py."""
    own = ("--ranking", "--draft", "--out", "--epsilon", "--max-budget", "--step", "--refine")
    parser = make_parser(doc, *MODEL_FLAGS, *SEARCH_FLAGS, *own)
    parser.set_defaults(ranking="similarity", granularity="sublayer", exit_window=Exit().window)
    parser.set_defaults(draft=[0])
    args = parser.parse_args()
    by_layer = args.ranking == "loss" and args.granularity == "layer"
    wanted = "--granularity layer: expected sublayer, which is what --ranking loss ranks"
    expect(not by_layer, wanted)
    args.draft = COUNTS if args.draft is None else sorted(set(args.draft) - {0})
    if args.draft:
        one = len(args.epsilon) == 1 and not args.refine
        expect(one, "--draft: expected one --epsilon and no --refine: nothing is lost")
    return args
