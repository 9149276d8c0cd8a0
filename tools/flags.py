"""The flags of all commands: a flag has one name, one meaning and one explanation everywhere.

python eval.py -h
"""

import argparse
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data.prompts import STAGES
from model import DTYPES
from skip import POLICIES
from tools.command import fail
from tools.trained import METHODS

LONGEST_NAME = 230  # of a file; file systems take 255, and .tmp or .123456789abc.journal follow
WIDTH = 78  # of a help text
IN_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")

# ---------------------------------------------------------------- what a flag's value may be


def positive(text: str, least: int = 1) -> int:
    """A whole number above zero, or from `least` on."""
    value = -1
    if text.isascii() and text.isdigit() and len(text) < 20:
        value = int(text)
    if not least <= value < 1 << 31:
        wanted = f"a whole number from {least} to 2^31 - 1"
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
    return value


def natural(text: str) -> int:
    """A whole number from zero."""
    return positive(text, 0)


def number(text: str, most: float = 1e6) -> float:
    """A number from 0 to `most`."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {most:g}, found {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    return number(text, 1)


def fractions(text: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas."""
    return [fraction(part) for part in text.split(",")]


def threshold(text: str) -> float | None:
    """A fraction; auto is what no flag means, too: None."""
    if text == "auto":
        return None
    return fraction(text)


def counts(text: str) -> list[int] | None:
    """Whole numbers, separated by commas; None if there is anything else."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdigit() and len(part) < 20):
            return None
    return [int(part) for part in parts]


def budgets(text: str) -> list[int]:
    """A count for every stage, such as 2,4,1."""
    found = counts(text)
    if found is None or len(found) != len(STAGES):
        wanted = f"{stages_in_words()}, such as {example()}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
    return found


def uniform(text: str) -> list[int]:
    """Counts, such as 8,13,20."""
    found = counts(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected counts, such as 8,13,20, found {text}")
    return found


def drafts(text: str) -> list[int] | None:
    """Tokens that a stage drafts at once: a count for every stage, or one for all of them; auto,
    which is None: the search chooses, other commands take the plan's."""
    if text == "auto":
        return None
    found = counts(text)
    n_stages = len(STAGES)
    if found is None or len(found) not in (1, n_stages):
        wanted = f"auto, one count, or {stages_in_words()}"
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
    return found * (n_stages // len(found))


def utf8(text: str) -> str:
    """A text that can be encoded."""
    if text != text.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError("expected UTF-8")
    return text


def output(text: str) -> Path:
    """A file that can be written when the work is done."""
    path = Path(text)
    folder = path.absolute().parent
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"expected a name of {LONGEST_NAME} bytes or fewer")
    if path.is_dir() or not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, found {text!r}")
    touched = folder
    if path.exists():
        touched = path
    if not os.access(touched, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, found {text!r}")
    return path


# ---------------------------------------------------------------- stages, as the list has them now


def stage_names() -> list[str]:
    return [stage.name for stage in STAGES]


def stages_in_words() -> str:
    """three counts, for recall, analyze and summarize"""
    *names, last = stage_names()
    size = len(names) + 1
    count = str(size)
    if size < len(IN_WORDS):
        count = IN_WORDS[size]
    if not names:
        return f"{count} count, for {last}"
    return f"{count} counts, for {', '.join(names)} and {last}"


def example() -> str:
    """Budgets to show in a help text, one for each stage: 2,4,1."""
    shown = (2, 4, 1)
    return ",".join(str(shown[i % 3]) for i in range(len(STAGES)))


# ---------------------------------------------------------------- the flags


@dataclass(frozen=True)
class Flag:
    """One flag, for argparse.

    text: its explanation; {stages}, {example} and {default} are filled in when it is shown.
    kind: the type of its value; bool: it has none; a tuple: the values that it may have.
    several: it takes one value or more, as a list. alone: its value if none is given.
    """

    text: str
    default: object = None
    kind: type | tuple | Callable = str
    metavar: str | None = None
    several: bool = False
    alone: object = None


FLAGS = {
    # the model
    "--model": Flag("checkpoint folder, hub id ORG/NAME, or demo", "demo", metavar="DIR"),
    "--seed": Flag("seed of everything random", 0, natural, "N"),
    "--device": Flag("cpu, cuda, cuda:1, ...", "cpu", metavar="DEV"),
    "--dtype": Flag("dtype to compute in (default: as stored)", kind=tuple(DTYPES)),
    "--threads": Flag(
        "threads of the CPU (default: one or all, whichever decodes faster when the model is "
        "loaded)",
        kind=positive,
        metavar="N",
    ),
    "--compile": Flag(
        "decoding steps as CUDA graphs or, on a CPU, as C++, compiled in a minute a skip set",
        False,
        bool,
    ),
    "--plain": Flag("the plain model of model.py, as it is read, not the packed one", False, bool),
    "--max-new-tokens": Flag("the most that one generation may have", 64, positive, "N"),
    # the questions
    "--data": Flag(
        "questions file or folder, or demo, obqa, csqa, strategyqa", "demo", metavar="DATA"
    ),
    "--split": Flag("which questions of a data set", "test", ("train", "valid", "test")),
    "--limit": Flag(
        "only the first N questions (default: all; eval.py: 200 of the demo; skip.py: 32)",
        kind=positive,
        metavar="N",
    ),
    "--shots": Flag("worked examples before each question, for an untuned model", 0, natural, "K"),
    "--shots-file": Flag(
        "where they come from (default: shots.jsonl beside the questions)",
        kind=Path,
        metavar="FILE",
    ),
    "--batch": Flag(
        "questions side by side; latencies are then shares of a batch", 1, positive, "N"
    ),
    # what is skipped
    "--plan": Flag(
        "budgets and exit that search.py found, one plan or several (default: the demo's own; "
        "else nothing is skipped)",
        kind=Path,
        metavar="FILE",
        several=True,
    ),
    "--stage-budgets": Flag(
        "sub-layers that each stage ({stages}) skips, e.g. {example} (default: the plan's)",
        kind=budgets,
        metavar="B,...",
    ),
    "--method": Flag(
        f"{', '.join(POLICIES)}; of a checkpoint that was trained for it {', '.join(METHODS)} "
        "(default: litestage; --compare: all)",
        kind=(*POLICIES, *METHODS),
        metavar="NAME",
    ),
    "--compare": Flag(
        "every method, or the one --method names, at these budgets, each for all stages (default: "
        "one to six eighths of all sub-layers), and at the plan's",
        kind=uniform,
        metavar="B,...",
        alone=(),
    ),
    "--granularity": Flag("what is ranked (default: sublayer)", kind=("sublayer", "layer")),
    "--ranking": Flag(
        "what ranks the sub-layers: the paper's cosine similarity, or the loss of each, per time "
        "and stage (default: the plan's, or similarity)",
        kind=("similarity", "loss"),
    ),
    "--exit-threshold": Flag(
        "mean confidence that ends a stage; 0: never; auto (default): the plan's, never without a "
        "plan; search.py: searched; --compare: of LiteStage only",
        kind=threshold,
        metavar="T",
    ),
    "--exit-window": Flag("last confidences in that mean (default: 5)", kind=positive, metavar="N"),
    "--draft": Flag(
        "lossless: tokens that a stage drafts while it skips, before all layers verify them; one "
        "count, or one a stage (default: the plan's; search.py: 0, none; auto: searched)",
        kind=drafts,
        metavar="K",
    ),
    "--temperature": Flag("of a continued text; 0 is greedy", 0.0, number, "T"),
    # what comes out
    "--json": Flag("write the report there", kind=output, metavar="FILE"),
    "--texts": Flag(
        "write every stage's prompts, texts, tokens and confidences there, a JSON line for each "
        "question and run",
        kind=output,
        metavar="FILE",
    ),
    "--show-prompts": Flag("print every prompt before its text", False, bool),
    # the search
    "--out": Flag("file of the plan", Path("plan.json"), output, "FILE"),
    "--epsilon": Flag(
        "accuracy that may be lost (default: 0.01); of several the first is the plan",
        [0.01],
        fractions,
        "E,...",
    ),
    "--max-budget": Flag(
        "the largest budget (default: all sub-layers but two)", kind=positive, metavar="N"
    ),
    "--step": Flag("distance between the budgets that are tried", 1, positive, "N"),
    "--refine": Flag(
        "minutes for trying neighbours of the chosen budgets (default: none; without a number: 5)",
        0.0,
        number,
        "MIN",
        alone=5.0,
    ),
}
MODEL_FLAGS = ("--model", "--data", "--seed", "--device", "--dtype", "--threads", "--compile")
MODEL_FLAGS += ("--plain", "--max-new-tokens", "--shots", "--shots-file")
METHOD_FLAGS = ("--plan", "--stage-budgets", "--method", "--draft")
SEARCH_FLAGS = ("--limit", "--granularity", "--exit-threshold", "--exit-window")

# ---------------------------------------------------------------- parsers


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, too."""

    def error(self, message: str) -> NoReturn:
        fail(message)


def make_parser(doc: str, *flags: str, one_plan: bool = False) -> Parser:
    """A parser with the named flags of FLAGS, and a command's docstring as its help.

    The docstring ends in a paragraph with the command to copy. one_plan: --plan takes a single
    file, in a list all the same; for a command whose other arguments would be taken for plans.
    """
    *paragraphs, command = doc.strip().split("\n\n")
    parser = Parser(
        description="\n\n".join(map(filled, paragraphs)),
        epilog=textwrap.dedent(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in flags:
        flag = FLAGS[name]
        text = help_text(flag)
        if flag.kind is bool:
            parser.add_argument(name, action="store_true", help=text)
            continue
        options: dict = {"default": flag.default, "metavar": flag.metavar, "help": text}
        if isinstance(flag.kind, tuple):
            options["choices"] = flag.kind
        else:
            options["type"] = flag.kind
        if flag.several:
            options["nargs"] = "+"
        if flag.several and one_plan:
            options["nargs"] = 1
        if flag.alone is not None:
            options |= {"nargs": "?", "const": flag.alone}
        parser.add_argument(name, **options)
    return parser


def help_text(flag: Flag) -> str:
    """A flag's explanation, for the stages of today, with its default."""
    text = flag.text.format(stages=", ".join(stage_names()), example=example())
    if flag.default is None or flag.default is False or "default" in text:
        return text
    default = flag.default
    if isinstance(default, list):
        default = ",".join(map(str, default))
    return f"{text} (default: {default})"


def filled(paragraph: str) -> str:
    """A paragraph of a docstring at the help's width; a list or a drawing stays as it is."""
    longest = max(map(len, paragraph.splitlines()))
    if paragraph.startswith(" ") and longest <= WIDTH:
        return paragraph
    return textwrap.fill(" ".join(paragraph.split()), WIDTH)
