"""`ringcompile`, `python -m ringcompile`, and `torchrun -m ringcompile`."""

from __future__ import annotations

import atexit
import os
import sys
from typing import TYPE_CHECKING

from ringcompile.interrupt import end_on_interrupt
from ringcompile.later import Later

if TYPE_CHECKING:
    from ringcompile import cli
else:
    cli = Later("ringcompile.cli")


class _QuickEnd:
    """Ends the process before Python collects garbage, which takes a second where torch is there.

    It is registered before anything else, so it is called last: other threads have ended by then
    and all other functions of `atexit` have run.
    """

    def __init__(self) -> None:
        self.code: int | None = None
        atexit.register(self)

    def __call__(self) -> None:
        torch = sys.modules.get("torch")
        if self.code is None or (torch is not None and torch.cuda.is_initialized()):
            return  # a traceback is to be printed, or a GPU's driver has to be shut down
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:  # a closed pipe: Python has a message and an exit code for it
            return
        os._exit(self.code)


def main() -> None:
    """Run the command line in a process of its own."""
    end_on_interrupt()  # before all that takes long to import
    # torch's C++ code warns each time that a rank waits half a second for another to join.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    end = _QuickEnd()
    try:
        cli.main()
    except SystemExit as request:
        if request.code is None or isinstance(request.code, int):
            end.code = request.code or 0
        raise


if __name__ == "__main__":
    main()
