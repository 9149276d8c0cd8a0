"""What is asked: questions, prompts, tokenizers, benchmarks, the demo.

A command, which is a script here, in tools/ or at the top, imports it first: from then on Ctrl-C
ends the command with one line, until `run` of tools/command.py sees to that. Torch takes a second
to import, and may swallow the exception that Ctrl-C otherwise raises.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
ROOT = os.path.dirname(HERE)
COMMANDS = [ROOT, HERE, os.path.join(HERE, "demo"), os.path.join(ROOT, "tools")]


def stop(*_) -> None:
    """A handler of SIGINT for the time in which there is nothing to clean up."""
    os.write(2, b"interrupted\n")
    os._exit(130)


_script = getattr(sys.modules["__main__"], "__file__", None)  # none in an interactive session
if _script is not None and os.path.dirname(os.path.realpath(_script)) in COMMANDS:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
