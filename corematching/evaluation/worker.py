"""A worker of ``executor=processes``: the program itself, which ends when the process that started it does.

The parent holds the other end of this process's standard input and never writes to it; the kernel closes it however
the parent ends, so that no worker goes on alone.
"""

import os
import signal
import sys
import threading
import time

from corematching.evaluation.stopping import GRACE_SECONDS


def main() -> int:
    """Run the program with this process's arguments until it is done or the parent is gone."""
    from corematching import cli

    threading.Thread(target=_end_with_parent, daemon=True).start()
    return cli.main()


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)  # where that is not enough, the cell in flight is computed again
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
