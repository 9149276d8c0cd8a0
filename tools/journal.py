"""The journal of a long job: what is finished is on the disk before the work goes on.

journal = Journal(Path("plan.json.0123456789ab.journal"))
journal.append("trial", {"budgets": [2, 4, 1], "accuracy": 0.5})
journal.find("trial")       # also what an earlier, killed run appended
"""

import errno
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from model import InputError
from tools.ranks import gather, rank

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HELD = (errno.EAGAIN, errno.EACCES)  # what lockf reports where another process has the lock


class Journal:
    """JSON lines, each fsynced before the work goes on; a torn last line is dropped.

    path: its file, made if it is not there. Of several ranks the first reads and writes; all of
    them see the same lines. Raises InputError if the file cannot be opened, is not a journal, or
    another process writes to it.
    """

    def __init__(self, path: Path):
        self.path = path
        self.file: BinaryIO | None = None
        self.lines: list[dict] = []
        if rank()[0] == 0:
            self.open()
        self.lines = gather(self.lines)[0]

    def open(self) -> None:
        try:
            self.file = open(self.path, "a+b")
            if not lock(self.file):
                raise InputError(f"{self.path}: another process is writing to it")
            self.file.seek(0)
            raw = self.file.read()
            whole = raw[: raw.rfind(b"\n") + 1]
            self.lines = [unsealed(json.loads(line)) for line in whole.splitlines()]
            self.file.truncate(len(whole))
        except OSError as e:
            reason = f"the journal cannot be opened ({e.strerror})"
            raise InputError(f"{self.path}: {reason}") from None
        except InputError:
            raise
        except ValueError as e:
            raise InputError(f"{self.path}: not a journal of ours ({e}); delete it") from None

    def find(self, kind: str) -> list:
        """All values of a kind, in the order they were appended."""
        return [line[kind] for line in self.lines if kind in line]

    def once(self, kind: str, make: Callable, *given):
        """The only value of a kind: what the journal has, or else what make(*given) returns now."""
        if not self.find(kind):
            self.append(kind, make(*given))
        return self.find(kind)[0]

    def append(self, kind: str, value) -> None:
        """Adds a value, the first rank's, to the file and to `lines`. Any JSON value will do.
        Raises InputError if it cannot be written."""
        line = gather({kind: value})[0]
        text = json.dumps(line)
        if self.file is not None:
            try:
                self.file.write(json.dumps(line | {"crc32": checksum(line)}).encode() + b"\n")
                self.file.flush()
                os.fsync(self.file.fileno())
            except OSError as e:
                raise InputError(f"{self.path}: cannot be written ({e.strerror})") from None
        self.lines.append(json.loads(text))


def lock(file: BinaryIO) -> bool:
    """Whether no other process writes to a file; then none can until this one ends. Where the
    system has no locks, nobody is kept out."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return e.errno not in HELD
    return True


def checksum(line: dict) -> int:
    return zlib.crc32(json.dumps(line).encode())


def unsealed(line: dict) -> dict:
    """A line as it was appended. Raises ValueError if it is another now."""
    found = None
    if isinstance(line, dict):
        found = line.pop("crc32", None)
    if found != checksum(line):
        raise ValueError("a line is damaged")
    return line
