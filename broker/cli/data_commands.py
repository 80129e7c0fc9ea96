"""`hansa data …`: name a dataset by its manifest, so that a job file can ask for every byte of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from broker.cli.output import JsonOption, print_json

app = typer.Typer(help="Datasets of your jobs.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def data() -> None:
    """Keep `manifest` a command of its own."""


@app.command()
def manifest(
    folder: Annotated[Path, typer.Argument(help="the folder of the dataset; manifest.json is written into it")],
    as_json: JsonOption = False,
) -> None:
    """Read every file of a dataset, write its manifest.json, and print what a job file says of it."""
    import hashlib

    from sites.dataset import MANIFEST_FILE, Manifest, make_manifest

    content = make_manifest(folder)
    (folder / MANIFEST_FILE).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    size_bytes = Manifest.model_validate_json(content).size_bytes
    if as_json:
        print_json({"sha256": digest, "size_bytes": size_bytes})
        return
    # Rounded up: a job states the most that its data may have.
    size_gb = max(1, -(-size_bytes // 1000)) / 1_000_000
    typer.echo(f"data: [{{name: {folder.resolve().name}, sha256: {digest}, size_gb: {size_gb:g}}}]")
