"""A worker of ``executor=processes``: the program itself, which ends when the process that started it does.

The parent holds the other end of this process's standard input and never writes to it; the kernel closes it however
the parent ends, so that no worker goes on alone.
"""

import os
import signal
import sys
import threading
import time

_GRACE_SECONDS = 60.0
"""To end cleanly, before the process is ended as it is; a cell in flight is then computed again."""


def main() -> int:
    """Run the program with this process's arguments until it is done or the parent is gone."""
    from corematching import cli

    threading.Thread(target=_end_with_parent, daemon=True).start()
    return cli.main()


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os._exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main())
