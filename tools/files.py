"""Files that are written whole or not at all, and digests of what was read.

python -c "from tools.files import *; write_json(Path('a.json'), {'a': 1})"
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from model import InputError


def write_json(path: Path, value: dict) -> None:
    """Writes one value as JSON; see `write_bytes`."""
    write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())


def write_lines(path: Path, rows: Iterable) -> None:
    """Writes one JSON value a line; see `write_bytes`."""
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all: to a temporary one first, which then takes its name. A
    link stays a link; a device or a pipe is written to directly. Raises InputError if it cannot."""
    part = None
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        path = Path(os.path.realpath(path))
        part = Path(f"{path}.tmp")
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def digest_of(files: Iterable[Path]) -> str:
    """SHA-256 of the SHA-256 of files, in the order given. Raises InputError for one that cannot
    be read."""
    total = hashlib.sha256()
    for path in files:
        try:
            with open(path, "rb") as f:
                total.update(hashlib.file_digest(f, "sha256").digest())
        except OSError as e:
            raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    return total.hexdigest()
