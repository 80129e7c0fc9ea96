"""`hansa lab`: a researcher's laboratory on this machine. The work is `training.lab`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from broker.cli.errors import UsageError
from broker.cli.output import JsonOption, print_json, print_table

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

_ALL: Final = "all"
_GB: Final = 1e9
_ROWS: Final = 20
"""Lines of a table that a person reads; the JSON document has all points."""


@app.callback()
def lab() -> None:
    """Try synchronisation strategies on this machine, without a market."""


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="the job file; its script must report a loss")],
    *,
    sites: Annotated[int, typer.Option(min=1, max=8, help="sites, each with a gateway and one rank of its own")] = 2,
    samples: Annotated[int | None, typer.Option(min=1, help="samples of the job, in place of the file's")] = None,
    link: Annotated[
        str | None,
        typer.Option(help="emulate a network with such links between the sites, as in 100mbit,50ms,0.1%; needs root"),
    ] = None,
    congestion: Annotated[
        str | None, typer.Option(help="TCP's congestion control on that network, as in cubic; else the kernel's own")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of parameters and of the samples' order")] = 1,
    kill: Annotated[
        list[str] | None,
        typer.Option(help="kill a site's processes once a round is applied, as in site-2@3; may be given again"),
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="keep the whole round log in this new folder, for hansa lab replay")
    ] = None,
    record_gb: Annotated[
        float, typer.Option(min=0, max=10_000, help="the most contributions that the record keeps, in GB")
    ] = 4.0,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bar")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run one job on several sites of this machine as its file says, and print its loss against bytes and wall time.

    Sites are processes that speak through real gateways, on this machine's loopback or over the network that --link
    describes; the job's setup is not run. Bytes are payload that site-1 posted and fetched (or the first site that --kill
    leaves). A site that is killed is out of the next view, as in the market.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from training.jobfile import load_job_file
    from training.lab import compare as comparison
    from training.lab.kills import Kill
    from training.lab.link import LinkSpec
    from training.lab.run_record import new_record

    if congestion is not None and link is None:
        raise UsageError(
            "--congestion is of the emulated network", next_step="name its links too, as in --link 100mbit"
        )
    emulated = None if link is None else LinkSpec.parse(link)
    file = load_job_file(job)
    spec = comparison.job_of(file, samples)
    strategy = "local" if sites == 1 else spec.market.sync.between_sites
    kills = [Kill.parse(each) for each in kill or ()]
    kept = None if record is None else new_record(record)
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        task = bars.add_task(strategy, total=spec.market.workload.samples)
        (outcome,) = comparison.compare(
            spec,
            job.parent / file.workdir,
            [strategy],
            sites=sites,
            seed=seed,
            progress=lambda _, done: bars.update(task, completed=done),
            link=emulated,
            congestion_control=congestion,
            kills=kills,
            record=kept,
            record_bytes_max=int(record_gb * _GB),
        )
    if as_json:
        print_json(comparison.as_document(outcome))
        return
    title = f"{spec.name} on {sites} sites, {strategy} ({outcome.codec}), {spec.market.workload.samples} samples, seed {seed}"
    if outcome.network is not None:
        title += f", links {outcome.network.link} ({outcome.network.congestion_control})"
    typer.echo(title)
    print_table(
        (">samples", f">{'held-out loss' if outcome.held_out else 'loss'}", ">payload bytes", ">seconds"),
        [
            (f"{point.samples:,}", f"{point.loss:.4f}", f"{point.payload_bytes:,}", f"{point.seconds:.1f}")
            for point in comparison.thinned(outcome.points, _ROWS)
        ],
    )
    wire = "" if outcome.network is None else f", {outcome.network.wire_bytes:,} bytes sent on its cable"
    smaller = "" if outcome.ratio is None else f", {outcome.ratio:.1f} times smaller than fp32"
    typer.echo(
        f"{outcome.rounds} rounds, {outcome.payload_bytes:,} payload bytes of site-1{smaller}{wire}; "
        f"{outcome.seconds:.1f} s, of which it waited {outcome.stall_s:.1f} s"
    )
    if kept is not None:
        typer.echo(f"its round log is kept: hansa lab replay {record}")


@app.command()
def replay(
    run_folder: Annotated[Path, typer.Argument(help="a folder that hansa lab run --record wrote", metavar="RUN")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Replay a recorded run without its sites: check every seal and contribution, and do every merge and outer step again.

    It ends with the run's own final hash, or names the first round that differs. Inner steps are not repeated.
    """
    from training.lab.replayed import replay_apart

    found = replay_apart(run_folder)
    if as_json:
        print_json(found.model_dump(mode="json"))
        return
    typer.echo(
        f"{found.job}, {found.strategy}: {found.rounds} rounds in {found.views} views, {found.samples_done:,} samples"
    )
    for fault in found.faults:
        typer.echo(f"fault: {fault}")
    for dropped in found.dropped:
        typer.echo(f"dropped by a later view: {dropped}")
    typer.echo(
        f"{found.contributions} contributions, {found.payload_bytes:,} bytes; {found.rounds_without_a_member} rounds went "
        "without a member of their view"
    )
    typer.echo(f"replayed: {found.reproduced}")
    last = "as the run ended" if found.has_end else "the last in the record, which does not say how the run ended"
    typer.echo(f"chain {found.chain_hash}")
    typer.echo(f"state {found.outer_hash}, {last}")


@app.command()
def compare(
    job: Annotated[Path, typer.Argument(help="the job file; its script must report a loss")],
    *,
    sites: Annotated[int, typer.Option(min=1, max=8, help="sites, each with a gateway of its own")] = 2,
    ranks: Annotated[int, typer.Option(min=1, max=16, help="ranks of each site, as torchrun would start them")] = 1,
    strategies: Annotated[
        str, typer.Option(help="strategies, joined by commas; auto lets links and step times choose")
    ] = _ALL,
    samples: Annotated[int | None, typer.Option(min=1, help="samples of the job, in place of the file's")] = None,
    link: Annotated[
        str | None,
        typer.Option(help="emulate a network with such links between the sites, as in 100mbit,50ms,0.1%; needs root"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of parameters and of the samples' order")] = 1,
    out: Annotated[
        Path, typer.Option(help="folder for the picture (PNG), the page (HTML) and the figures (JSON)")
    ] = Path("lab-compare"),
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON document instead of text")] = False,
) -> None:
    """Run one job under several strategies, with equal seeds and samples, and draw loss over samples, bytes and time.

    Sites are processes that speak through real gateways, on this machine's loopback or over the network that --link
    describes; the job's setup is not run.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from training.jobfile import load_job_file
    from training.lab import chart
    from training.lab import compare as comparison
    from training.lab.link import LinkSpec

    emulated = None if link is None else LinkSpec.parse(link)
    file = load_job_file(job)
    spec = comparison.job_of(file, samples)
    known = {str(each): each for each in (*comparison.STRATEGIES, *comparison.CHOSEN)}
    names = (
        list(map(str, comparison.STRATEGIES))
        if strategies == _ALL
        else [name.strip() for name in strategies.split(",")]
    )
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UsageError(
            f"no strategy is called {', '.join(unknown) or 'nothing'}", next_step=f"known are {', '.join(known)}"
        )
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet) as bars:
        tasks = {name: bars.add_task(name, total=spec.market.workload.samples, start=False) for name in names}

        def progress(strategy: str, done: int) -> None:
            bars.start_task(tasks[strategy])
            bars.update(tasks[strategy], completed=done)

        outcomes = comparison.compare(
            spec,
            job.parent / file.workdir,
            [known[name] for name in names],
            sites=sites,
            seed=seed,
            progress=progress,
            link=emulated,
            ranks=ranks,
        )
    out.mkdir(parents=True, exist_ok=True)
    title = f"{spec.name} on {sites} sites{'' if ranks == 1 else f' of {ranks} ranks'}, {spec.market.workload.samples} samples, seed {seed}"
    if outcomes[0].network is not None:
        title += f", links {outcomes[0].network.link} ({outcomes[0].network.congestion_control})"
    about = "Each run is a federation of its own on one machine; bytes are payload that site-1 posted and fetched."
    (out / "compare.png").write_bytes(chart.png(chart.shapes(outcomes, title)))
    (out / "compare.html").write_text(chart.page(outcomes, title, about))
    (out / "compare.json").write_text(comparison.as_json(outcomes))
    rows = [
        (
            each.strategy,
            each.codec,
            f"{each.last_loss:.4f}",
            f"{each.payload_bytes:,}",
            "-" if each.network is None else f"{each.network.wire_bytes:,}",
            "-" if each.ratio is None else f"{each.ratio:.1f}",
            each.rounds,
            f"{each.seconds:.1f}",
            f"{each.stall_s:.1f}",
        )
        for each in outcomes
    ]
    if as_json:
        print_json(
            [
                dict(
                    zip(
                        ("strategy", "codec", "loss", "bytes", "wire_bytes", "ratio", "rounds", "seconds", "waiting"),
                        row,
                        strict=True,
                    )
                )
                for row in rows
            ]
        )
        return
    kind = "held-out loss" if all(each.held_out for each in outcomes) else "loss"
    print_table(
        (
            "strategy",
            "codec",
            f">{kind}",
            ">bytes of one site",
            ">sent on the wire",
            ">x smaller than fp32",
            ">rounds",
            ">seconds",
            ">waiting",
        ),
        rows,
        title=title,
    )
    for reason in (reason for each in outcomes for reason in each.reasons):
        typer.echo(f"auto: {reason}")
    typer.echo(f"{out / 'compare.png'}, {out / 'compare.html'} and {out / 'compare.json'} are written")
