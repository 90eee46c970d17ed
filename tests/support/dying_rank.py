"""``cogtune train`` whose rank 1 is killed behind a step, the first time a launcher starts it:

torchrun --standalone --nproc-per-node 2 --max-restarts 1 -m tests.support.dying_rank STEP --key value ...
"""

from __future__ import annotations

import logging
import os
import signal
import sys

from cogtune.cli.main import main


class Kill(logging.Handler):
    def __init__(self, step: str) -> None:
        super().__init__()
        self._step = step

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith(f"step {self._step}/"):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    step, flags = sys.argv[1], sys.argv[2:]
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        logging.getLogger("cogtune").addHandler(Kill(step))
    sys.argv = ["cogtune", "train", *flags]
    main()
