"""`hansa profile`: what a step of a script costs, measured on this machine. The work is `training.lab.profiling`'s."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from broker.cli.errors import UsageError
from broker.cli.output import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from training.lab.profiling import Profile

CPU_SLOT: Final = "cpu-slot"
SECONDS_MAX: Final = 20.0


def profile(
    job_file: Annotated[Path, typer.Argument(help="the job as YAML", metavar="JOB.yaml")],
    *,
    gpu_type: Annotated[
        str, typer.Option(help="what this machine's slot is called on the market; left out, one CPU core")
    ] = CPU_SLOT,
    seconds: Annotated[float, typer.Option(min=1, max=SECONDS_MAX, help="for how long the slot trains")] = SECONDS_MAX,
    write: Annotated[bool, typer.Option("--write", help="put the result into the job file")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run the job's own script on one slot of this machine for some seconds, and say what a step costs.

    It runs as in the market, through training.join as one rank; its setup is not run. With the result in the job file,
    quotes and rounds start from it in place of the catalogue.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    from training.catalogue import GPU_TYPES
    from training.jobfile import load_job_file, with_profile
    from training.lab import profiling

    if gpu_type not in GPU_TYPES:
        raise UsageError(f"the market knows no {gpu_type[:40]!r}", next_step=f"it knows {', '.join(sorted(GPU_TYPES))}")
    file = load_job_file(job_file)
    spec = file.spec("0" * 64)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.1f} of {task.total:.0f} s"))
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        task = bars.add_task(f"profiling {spec.name} on one {gpu_type}", total=seconds)
        found = profiling.profile(
            spec,
            job_file.parent / file.workdir,
            gpu_type,
            seconds=seconds,
            progress=lambda used_s: bars.update(task, completed=used_s),
        )
    if write:
        job_file.write_text(with_profile(job_file.read_text(), found.terms()))
    rows = [row.model_dump() for row in found.terms()]
    if as_json:
        print_json({"profile": rows, "used_s": round(found.used_s, 3)})
        return
    _print(found, write=write)


def _print(found: Profile, *, write: bool) -> None:
    print_table(
        (">batch", ">step", ">samples/s", ">steps timed"),
        [
            (
                str(cost.batch_per_gpu),
                f"{cost.step_s * 1e3:.2f} ms",
                f"{cost.batch_per_gpu / cost.step_s:.1f}",
                cost.steps,
            )
            for cost in found.costs
        ],
        title=f"One {found.gpu_type}, {found.used_s:.1f} s of training",
    )
    typer.echo(f"a step costs {found.overhead_s * 1e3:.2f} ms, and {found.sample_s * 1e3:.3f} ms for each sample")
    if write:
        typer.echo("written into the job file as market.profile")
        return
    typer.echo("for the job file (or --write):\n  profile:")
    for row in found.terms():
        entry = ", ".join(f"{name}: {value}" for name, value in row.model_dump().items())
        typer.echo(f"    - {{{entry}}}")
