"""Start a tenant's script as one rank: `python -P -m training.launch SCRIPT ARGUMENTS...`.

The runtime is imported before the workdir is importable, so nothing in a workdir can take its
place. Then the process group is set up from torchrun's environment, the generators are seeded with
the attempt's seed, and the script runs as `__main__`.

Exit codes: 0 the script ended; 1 it raised; 2 the command or environment is unusable; 75
(EX_TEMPFAIL) the round log did not answer within patience; 76 the site left as it was asked to. A script's own sys.exit is passed on.
"""

from __future__ import annotations

import atexit
import os
import random
import runpy
import sys
import traceback
from pathlib import Path
from typing import Final, NoReturn

import torch
import torch.distributed as dist
from pydantic import ValidationError

import training.session  # noqa: F401 - before the workdir is importable: see above
from training.attempt import AttemptContext, current_attempt
from training.errors import Departure, ExchangeError
from training.ranks import group_timeout
from training.spec import SyncPlan

EXIT_SCRIPT_FAILED: Final = 1
EXIT_UNUSABLE: Final = 2
EXIT_TEMPORARY: Final = 75


def main(arguments: list[str]) -> int:
    """Run the script and return the exit code."""
    if not arguments or not Path(arguments[0]).is_file():
        return _unusable(f"no script at {arguments[0] if arguments else '(none named)'}; name a file in the workdir")
    try:
        context = current_attempt()
        _start_group(context)
    except (OSError, ValueError, ValidationError, RuntimeError) as error:
        return _unusable(f"cannot take part in the attempt: {error}")
    seed = context.seed if context else 0
    torch.manual_seed(seed)
    random.seed(seed)
    return _run(arguments)


def _start_group(context: AttemptContext | None) -> None:
    """Initialise torch.distributed where torchrun says that there are several ranks."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    patience_s = context.sync.patience_s if context else float(SyncPlan.model_fields["patience_s"].default)
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl"
    dist.init_process_group(backend, timeout=group_timeout(patience_s))


def _run(arguments: list[str]) -> int:
    script = Path(arguments[0]).resolve()
    sys.argv = [str(script), *arguments[1:]]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except ExchangeError as error:
        sys.stderr.write(f"hansa: {error.code}: {error}\n")
        return EXIT_TEMPORARY
    except Departure as departure:
        sys.stderr.write(f"hansa: left after round {departure.round_number}; its checkpoint goes on elsewhere\n")
        return _exit_code(departure)
    except SystemExit as leaving:
        return _exit_code(leaving)
    except BaseException:  # noqa: BLE001 - whatever a tenant's script raises ends in one documented code
        traceback.print_exc()
        return EXIT_SCRIPT_FAILED
    return 0


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code
    sys.stderr.write(f"{leaving.code}\n")
    return EXIT_SCRIPT_FAILED


def _unusable(message: str) -> int:
    sys.stderr.write(f"hansa: {message}\n")
    return EXIT_UNUSABLE


def _leave(code: int) -> NoReturn:
    """End the process at once. Gloo's threads may outlive the interpreter's own teardown, which then aborts."""
    atexit._run_exitfuncs()  # noqa: SLF001 - what a script registered, it expects to run
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
