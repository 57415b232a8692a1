"""Where the engine process begins: `python -m service.engine --fd N`, as its supervisor starts it.

N is the listening socket, inherited; all else comes from the environment: the settings, and in
`CHARLOOM_ENGINE_RESTARTS` how many engines before this one have died. The exit status is 0 where
the last worker has gone, 2 for settings that cannot be used; anything else is a crash.
"""

import argparse
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence

from charloom.errors import CharloomError
from service import logs
from service.engine.process import EngineProcess
from service.settings import read
from service.supervisor import RESTARTS

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread in the background gives Python's lock back to the loop, which asks
for it after every step; without such threads it changes nothing.
"""

_log = logging.getLogger("charloom.engine")


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until the last worker has gone."""
    parser = argparse.ArgumentParser(prog="python -m service.engine", description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the listening socket's descriptor")
    descriptor = parser.parse_args(arguments).fd
    # Ctrl-C reaches all processes of a terminal; the engine ends when its workers have drained.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        settings = read()
        logs.configure(settings)
        listener = socket.socket(fileno=descriptor)
        restarts = int(os.environ.get(RESTARTS, "0"))
        process = EngineProcess(settings, listener, restarts=restarts)
    except CharloomError as error:
        print(error, file=sys.stderr)  # noqa: T201 - the log may not be set up
        return error.exit_status
    try:
        process.run()
    except BaseException:
        _log.critical("The engine process has failed.", exc_info=True)
        raise
    finally:
        process.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
