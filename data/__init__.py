"""What lies around the five modules.

A command imports it first: from then on Ctrl-C ends the command with one line, until `cli.run`
sees to that. Torch takes a second to import, and may swallow the exception of a Ctrl-C.
"""

import os
import signal
import sys

HERE = os.path.dirname(os.path.realpath(__file__))
COMMANDS = (os.path.dirname(HERE), HERE)  # the folders of our commands


def stop(*_) -> None:
    """A handler of SIGINT for the time in which there is nothing to clean up."""
    os.write(2, b"interrupted\n")
    os._exit(130)


_script = os.path.realpath(getattr(sys.modules["__main__"], "__file__", None) or "")
if os.path.dirname(_script) in COMMANDS:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
