"""What the commands share: flags, one-line errors, files written whole or not at all.

python eval.py -h
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from model import DTYPES, InputError
from skip import POLICIES


def positive(text: str) -> int:
    """A whole number above zero, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, found {text}")
    return value


def fractions(text: str) -> list[float]:
    """Numbers from 0 to 1, separated by commas, for argparse."""
    return [fraction(part) for part in text.split(",")]


def budgets(text: str) -> list[int]:
    """Three budgets, such as 2,4,1, for argparse."""
    parts = text.split(",")
    if len(parts) != 3 or not all(
        part.strip().isascii() and part.strip().isdigit() for part in parts
    ):
        raise argparse.ArgumentTypeError(
            f"expected three counts, for recall, analyze and summarize, such as 2,4,1, found {text}"
        )
    return [int(part) for part in parts]


# name: (default, type or choices, metavar, help); the default is added to the help
FLAGS = {
    "--model": ("demo", str, "DIR", "checkpoint folder, hub id ORG/NAME, or demo"),
    "--data": ("demo", str, "DATA", "questions file, folder, or name of a data set"),
    "--split": ("test", ("train", "valid", "test"), None, "which questions of a data set"),
    "--limit": (None, positive, "N", "only the first N questions"),
    "--seed": (0, int, "N", "of everything random"),
    "--device": ("cpu", str, "DEV", "cpu, cuda, cuda:1, ..."),
    "--dtype": (None, tuple(DTYPES), None, "to compute in (default: as stored)"),
    "--plan": (None, Path, "FILE", "budgets and exit that search.py found"),
    "--stage-budgets": (None, budgets, "R,A,S", "sub-layers each stage skips, e.g. 2,4,1"),
    "--method": ("litestage", tuple(POLICIES), "NAME", "one of " + ", ".join(POLICIES)),
    "--granularity": (None, ("sublayer", "layer"), None, "what is ranked (default: sublayer)"),
    "--exit-threshold": (None, fraction, "T", "mean confidence that ends a stage; 0: never"),
    "--exit-window": (None, positive, "N", "last confidences in that mean (default: 5)"),
    "--max-new-tokens": (64, positive, "N", "the most that one generation may have"),
    "--shots": (0, int, "K", "worked examples before each question, for an untuned model"),
    "--compile": (False, bool, None, "on a GPU replay each stage's step as a CUDA graph"),
    "--json": (None, Path, "FILE", "write the report there"),
}


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, too."""

    def error(self, message: str):
        self.exit(2, f"error: {message}\n")


def make_parser(doc: str, *flags: str) -> Parser:
    """A parser with the named flags of FLAGS, which mean the same in every command."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in flags:
        default, kind, metavar, text = FLAGS[flag]
        text += " (default: %(default)s)" if default not in (None, False) else ""
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif isinstance(kind, tuple):
            parser.add_argument(flag, default=default, choices=kind, metavar=metavar, help=text)
        else:
            parser.add_argument(flag, default=default, type=kind, metavar=metavar, help=text)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake or Ctrl-C is one line on stderr, a closed pipe none."""
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head -1`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def write_json(path: Path, value: dict) -> None:
    """Writes a file whole or not at all: to a temporary one first, which then takes its name."""
    part = Path(f"{path}.tmp")
    try:
        part.write_text(json.dumps(value, indent=1) + "\n")
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        if part.exists():
            part.unlink()


class Journal:
    """JSON lines, each fsynced before the work goes on; a torn last line is dropped."""

    def __init__(self, path: Path):
        self.path = path
        try:
            raw = path.read_bytes() if path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            self.lines = [json.loads(line) for line in whole.splitlines()]
            self.file = open(path, "r+b" if path.exists() else "w+b")
            self.file.truncate(len(whole))
            self.file.seek(0, os.SEEK_END)
        except OSError as e:
            raise InputError(f"{path}: the journal cannot be opened ({e.strerror})") from None
        except ValueError as e:
            raise InputError(f"{path}: not a journal of ours ({e}); delete it") from None

    def find(self, kind: str) -> list:
        """All values of a kind, in the order they were appended."""
        return [line[kind] for line in self.lines if kind in line]

    def append(self, kind: str, value) -> None:
        try:
            self.file.write(json.dumps({kind: value}).encode() + b"\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from None
        self.lines.append(json.loads(json.dumps({kind: value})))
