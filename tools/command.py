"""How a command ends: a user's mistake is one line on stderr and status 2, Ctrl-C is one, too.

if __name__ == "__main__":
    run(main)
"""

import io
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from data import stop
from model import InputError
from tools.ranks import LostRank, first_to_tell, let_others_hear, rank

LONGEST_LINE = 1000  # characters of a message


def run(main: Callable[[], None]) -> None:
    """Runs a command: a user's mistake or Ctrl-C is one line on stderr, a closed pipe none."""
    try:
        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare_stdout()
        main()
        sys.stdout.flush()
    except InputError as e:
        fail(e)
    except LostRank:
        if rank()[0] > 0:
            sys.exit(2)  # the first one has told why, or was killed
        fail("another of the processes has ended")
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


def prepare_stdout() -> None:
    """Results are printed by the first rank alone, and on any terminal."""
    if rank()[0] > 0 or sys.stdout is None:
        sys.stdout = open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal that lacks a letter
        sys.stdout.reconfigure(errors="backslashreplace")


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the command with one printable line on stderr; of several ranks, one speaks."""
    words = " ".join(str(message).split())
    line = "".join(c if c.isprintable() else "?" for c in words)
    if first_to_tell():
        print(f"error: {line[:LONGEST_LINE]}", file=sys.stderr, flush=True)
    let_others_hear()
    sys.exit(status)
