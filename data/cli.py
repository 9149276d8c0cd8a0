"""What the commands share: flags, one-line errors, whole files, ranks, progress bars.

python eval.py -h
"""

import argparse
import io
import json
import os
import signal
import sys
import textwrap
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from data import stop
from model import DTYPES, InputError
from skip import POLICIES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LONGEST_NAME = 230  # of a file; file systems take 255, and .tmp or .123456789abc.journal follow


def positive(text: str, least: int = 1) -> int:
    """A whole number above zero, or from `least` on, for argparse."""
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1
    if not least <= value < 1 << 31:
        wanted = f"a whole number from {least} to 2^31 - 1"
        raise argparse.ArgumentTypeError(f"expected {wanted}, found {text}")
    return value


def natural(text: str) -> int:
    """A whole number from zero, for argparse."""
    return positive(text, 0)


def number(text: str, most: float = 1e6) -> float:
    """A number from 0 to `most`, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= most:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to {most:g}, found {text}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    return number(text, 1)


def utf8(text: str) -> str:
    """A text that can be encoded, for argparse."""
    if text != text.encode(errors="replace").decode():
        raise argparse.ArgumentTypeError("expected UTF-8")
    return text


def output(text: str) -> Path:
    """A file that can be written when the work is done, for argparse."""
    path = Path(text)
    folder = path.absolute().parent
    if len(os.fsencode(path.name)) > LONGEST_NAME:
        raise argparse.ArgumentTypeError(f"expected a name of {LONGEST_NAME} bytes or fewer")
    if path.is_dir() or not folder.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, found {text!r}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"expected a file that can be written, found {text!r}")
    return path


def threshold(text: str) -> float | None:
    """A fraction, or auto: the search chooses, other commands take the plan's; for argparse."""
    return None if text == "auto" else fraction(text)


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
    "--data": ("demo", str, "DATA", "questions file or folder, or demo, obqa, csqa, strategyqa"),
    "--split": ("test", ("train", "valid", "test"), None, "which questions of a data set"),
    "--limit": (
        None,
        positive,
        "N",
        "only the first N questions (default: all; eval.py: 200 of the demo; skip.py: 32)",
    ),
    "--seed": (0, natural, "N", "seed of everything random"),
    "--device": ("cpu", str, "DEV", "cpu, cuda, cuda:1, ..."),
    "--dtype": (None, tuple(DTYPES), None, "dtype to compute in (default: as stored)"),
    "--plan": (
        None,
        Path,
        "FILE",
        "budgets and exit that search.py found (default: the demo's own; else nothing is skipped)",
    ),
    "--stage-budgets": (
        None,
        budgets,
        "R,A,S",
        "sub-layers each stage skips, e.g. 2,4,1 (default: the plan's)",
    ),
    "--method": (
        None,
        tuple(POLICIES),
        "NAME",
        f"{', '.join(POLICIES)} (default: litestage; --compare: all)",
    ),
    "--granularity": (None, ("sublayer", "layer"), None, "what is ranked (default: sublayer)"),
    "--exit-threshold": (
        None,
        threshold,
        "T",
        "mean confidence that ends a stage; 0: never; auto (default): the plan's, or 0.5 "
        "without a plan; search.py: searched; --compare: of LiteStage only",
    ),
    "--exit-window": (None, positive, "N", "last confidences in that mean (default: 5)"),
    "--max-new-tokens": (64, positive, "N", "the most that one generation may have"),
    "--shots": (0, natural, "K", "worked examples before each question, for an untuned model"),
    "--compile": (
        False,
        bool,
        None,
        "replay decoding steps as CUDA graphs, where a skip set stays the same",
    ),
    "--json": (None, output, "FILE", "write the report there"),
    "--compare": (
        False,
        bool,
        None,
        "every method, or the one --method names, at six budgets and at the plan's",
    ),
    "--batch": (1, positive, "N", "questions side by side; latencies are then shares of a batch"),
    "--temperature": (0.0, number, "T", "of a continued text; 0 is greedy"),
    "--out": (Path("plan.json"), output, "FILE", "file of the plan"),
    "--epsilon": (
        [0.01],
        fractions,
        "E,...",
        "accuracy that may be lost (default: 0.01); of several the first is the plan",
    ),
    "--max-budget": (None, positive, "N", "the largest budget (default: all sub-layers but two)"),
    "--step": (1, positive, "N", "distance between the budgets that are tried"),
    "--refine": (
        0.0,
        number,
        "MIN",
        "minutes for trying neighbours of the chosen budgets (default: none; without a number: 5)",
    ),
}
MODEL_FLAGS = ("--model", "--data", "--seed", "--device", "--dtype", "--compile")
MODEL_FLAGS += ("--max-new-tokens", "--shots")
METHOD_FLAGS = ("--plan", "--stage-budgets", "--method")
SEARCH_FLAGS = ("--limit", "--granularity", "--exit-threshold", "--exit-window")


class Parser(argparse.ArgumentParser):
    """A mistake on the command line is one line, too."""

    def error(self, message: str):
        fail(message)


def fail(message: str, status: int = 2) -> None:
    """Ends the command with one printable line on stderr; under torchrun rank 0 speaks for all."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(str(message).split()))
    if rank()[0] == 0:
        print(f"error: {line[:1000]}", file=sys.stderr)
    sys.exit(status)


def make_parser(doc: str, *flags: str) -> Parser:
    """A parser with the named flags of FLAGS, which mean the same in every command."""
    *paragraphs, command = doc.strip().split("\n\n")
    lists = [part.startswith(" ") and max(map(len, part.splitlines())) <= 78 for part in paragraphs]
    filled = [textwrap.fill(" ".join(part.split()), 78) for part in paragraphs]
    text = "\n\n".join(part if raw else fill for part, raw, fill in zip(paragraphs, lists, filled))
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=text, epilog=textwrap.dedent(command), formatter_class=raw)
    for flag in flags:
        default, kind, metavar, text = FLAGS[flag]
        named = default is None or default is False or "default" in text
        text += "" if named else " (default: %(default)s)"
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=text)
        elif flag == "--refine":  # alone it means five minutes
            parser.add_argument(
                flag, nargs="?", const=5.0, default=default, type=kind, metavar=metavar, help=text
            )
        elif isinstance(kind, tuple):
            parser.add_argument(flag, default=default, choices=kind, metavar=metavar, help=text)
        else:
            parser.add_argument(flag, default=default, type=kind, metavar=metavar, help=text)
    return parser


def run(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake or Ctrl-C is one line on stderr, a closed pipe none."""
    try:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if rank()[0] > 0 or sys.stdout is None:
            sys.stdout = open(os.devnull, "w")
        if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal that lacks a letter
            sys.stdout.reconfigure(errors="backslashreplace")
        main()
        sys.stdout.flush()
    except InputError as e:
        fail(e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except OSError as e:  # of stdout: `| head -1`, a full disk; files report their own
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if not isinstance(e, BrokenPipeError):
            fail(e)
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, MemoryError) and "memory" not in str(e):
            raise
        reason = str(e).strip()[:200]
        fail(f"out of memory ({reason})" if reason else "out of memory")


def rank() -> tuple[int, int]:
    """(this process's number, how many there are): (0, 1) unless torchrun started several."""
    world = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # batch systems set one
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("gloo")  # only small objects travel, whatever the device
    return (dist.get_rank(), world) if world > 1 else (0, 1)


def gather(value) -> list:
    """The values of all ranks, in their order, on every rank."""
    world = rank()[1]
    values = [value] * world
    if world > 1:
        dist.all_gather_object(values, value)
    return values


def interleave(mine: list) -> list:
    """The items of all ranks, where rank k has items k, k + world, ..., in their order."""
    shards = gather(mine)
    return [shards[i % len(shards)][i // len(shards)] for i in range(sum(map(len, shards)))]


def timer(seconds: float) -> Callable[[], bool]:
    """Tells whether time is left, by the first rank's clock, so that all ranks do the same."""
    deadline = time.monotonic() + seconds
    return lambda: gather(time.monotonic() < deadline)[0]


def progress(*args, **kwargs) -> tqdm:
    """A progress bar on stderr: of the first rank, and only where somebody can see it."""
    return tqdm(*args, leave=False, disable=True if rank()[0] else None, **kwargs)


def write_json(path: Path, value: dict) -> None:
    """Writes a file whole or not at all: to a temporary one first, which then takes its name. A
    link stays a link; a device or a pipe is written to directly."""
    text = json.dumps(value, indent=1) + "\n"
    part = None
    try:
        if path.exists() and not path.is_file():
            path.write_text(text)
            return
        path = Path(os.path.realpath(path))
        part = Path(f"{path}.tmp")
        part.write_text(text)
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def checksum(line) -> int:
    return zlib.crc32(json.dumps(line).encode())


class Journal:
    """JSON lines, each fsynced before the work goes on; a torn last line is dropped."""

    def __init__(self, path: Path):
        self.path, self.file = path, None
        if rank()[0] > 0:  # one rank reads and writes, the others are told
            self.lines = gather(None)[0]
            return
        try:
            self.file = open(path, "a+b")
            if fcntl is not None:  # until this process ends
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.file.seek(0)
            raw = self.file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            self.lines = [self.unsealed(json.loads(line)) for line in whole.splitlines()]
            self.file.truncate(len(whole))
        except BlockingIOError:
            raise InputError(f"{path}: another search is writing to it") from None
        except OSError as e:
            raise InputError(f"{path}: the journal cannot be opened ({e.strerror})") from None
        except ValueError as e:
            raise InputError(f"{path}: not a journal of ours ({e}); delete it") from None
        gather(self.lines)

    @staticmethod
    def unsealed(line) -> dict:
        """A line as it was appended. Raises ValueError if it is another now."""
        found = line.pop("crc32", None) if isinstance(line, dict) else None
        if found != checksum(line):
            raise ValueError("a line is damaged")
        return line

    def find(self, kind: str) -> list:
        """All values of a kind, in the order they were appended."""
        return [line[kind] for line in self.lines if kind in line]

    def append(self, kind: str, value) -> None:
        value = gather(value)[0]
        try:
            if self.file is not None:
                line = {kind: value}
                self.file.write(json.dumps(line | {"crc32": checksum(line)}).encode() + b"\n")
                self.file.flush()
                os.fsync(self.file.fileno())
        except OSError as e:
            raise InputError(f"{self.path}: cannot be written ({e.strerror})") from None
        self.lines.append(json.loads(json.dumps({kind: value})))
