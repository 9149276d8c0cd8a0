"""How far a long job is: a bar on a terminal, a line now and then in a log file.

for question in progress(questions, "questions"):
    ...
with progress(total=100, desc="steps") as bar:
    bar.update(10)
"""

import sys
import time
from collections.abc import Iterable, Iterator

from tqdm import tqdm

from tools.ranks import rank

FIRST_S = 10.0  # seconds until the first line, for a job that nobody watches
EVERY_S = 30.0  # seconds between its lines


class Lines:
    """What a tqdm bar is on a terminal, as plain lines on stderr. A short job prints none."""

    def __init__(self, iterable=None, desc="", total=None, initial=0, silent=False):
        self.iterable = iterable
        self.desc = desc or "progress"
        self.total = total
        self.initial = initial
        self.n = initial
        self.silent = silent
        self.postfix = ""
        self.began = time.monotonic()
        self.next_line = self.began + FIRST_S
        self.printed = -1  # the n of the last line
        if total is None and hasattr(iterable, "__len__"):
            self.total = len(iterable)

    def __iter__(self) -> Iterator:
        try:
            for item in self.iterable:
                yield item
                self.update()
        finally:
            self.close()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """n more are done."""
        self.n += n
        if time.monotonic() >= self.next_line:
            self.print_line()

    def set_postfix(self, **values) -> None:
        """What the next line ends with, e.g. loss=0.5."""
        self.postfix = "".join(f", {key} {value}" for key, value in values.items())

    def print_line(self) -> None:
        took = time.monotonic() - self.began
        self.next_line = time.monotonic() + EVERY_S
        self.printed = self.n
        line = f"{self.desc}: {self.n}"
        if self.total:
            line += f" of {self.total}"
        line += f", {took:.0f} s"
        done = self.n - self.initial
        if self.total and 0 < done and self.n < self.total:
            line += f", about {took / done * (self.total - self.n):.0f} s left"
        self.write(line + self.postfix)

    def write(self, text: str) -> None:
        """Prints a line on stderr, where the progress goes."""
        if not self.silent and sys.stderr is not None:
            print(text, file=sys.stderr, flush=True)

    def clear(self) -> None:
        """A bar makes room for what is printed next; lines need not."""

    def close(self) -> None:
        """The last line, if any was printed before."""
        if 0 <= self.printed < self.n:
            self.print_line()


class Bar(tqdm):
    """tqdm's, whose `write` goes where the bar is."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=self.fp)


def progress(
    iterable: Iterable | None = None,
    desc: str = "",
    total: int | None = None,
    initial: int = 0,
    unit: str = "it",
    delay: float = 0,
) -> Bar | Lines:
    """The progress of a job, on stderr, of the first rank. To iterate over, or a context manager.

    iterable: what is gone through; None: the caller calls update(n).
    desc: a name for the job; total: how many there are; initial: how many are done already.
    unit: what is counted; delay: seconds until a bar is drawn.
    Its methods: update(n=1), set_postfix(**values), write(text), clear(), close().
    """
    if rank()[0] > 0:
        return Lines(iterable, desc, total, initial, silent=True)
    if sys.stderr is None or not sys.stderr.isatty():
        return Lines(iterable, desc, total, initial)
    return Bar(iterable, desc or None, total, initial=initial, unit=unit, delay=delay, leave=False)
