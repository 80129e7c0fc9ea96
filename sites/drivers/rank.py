"""Start one rank and note how it ended: `python -I -S rank.py EXITS PROGRAM ARG…`. Standard library only.

Between hosts (`slurm.py`) torchrun starts the ranks, and it ends with 1 whatever its ranks ended
with, yet the broker's next step depends on it (75: the round log was lost, try again). So each rank
runs below this small program, which writes the exit code and the time to EXITS/RANK; the warden
takes the earliest failure, since torchrun ends the other ranks because of it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(exits: Path, argv: list[str]) -> int:
    """Run `argv` to its end and return its exit code, 128 + n for signal n."""
    process = subprocess.Popen(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _frame: process.send_signal(received))
    code = process.wait()
    path = exits / os.environ.get("RANK", "0")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps([code, time.monotonic()]))
    partial.replace(path)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
