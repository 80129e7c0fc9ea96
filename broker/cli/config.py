"""Where the broker is and who asks: `~/.config/hansa/config.toml` with named contexts, and the environment over it.

    current = "lab"

    [contexts.lab]
    url = "https://market.example:7400"
    token = "…"
    ca = "/etc/hansa/ca.pem"          # left out: the system's certificate authorities

`HANSA_URL`, `HANSA_TOKEN` and `HANSA_CA` win over the file, `HANSA_CONTEXT` chooses in it and `HANSA_CONFIG` names
another file. The file holds secrets and is written readable by its owner alone.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from broker.cli.errors import UsageError

CONFIG_BYTES_MAX: Final = 1_000_000
DEFAULT_URL: Final = "https://127.0.0.1:7400"
DEFAULT_CONTEXT: Final = "default"
_CONTEXT_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_FIELDS: Final = ("url", "token", "ca")


@dataclass(frozen=True, slots=True)
class Context:
    """One market as one caller sees it. `ca` is the file of the authority to trust, None the system's."""

    url: str = DEFAULT_URL
    token: str = ""
    ca: Path | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The whole file."""

    current: str
    contexts: Mapping[str, Context]


def config_path(environment: Mapping[str, str]) -> Path:
    """Return where the configuration lies, there or not."""
    if named := environment.get("HANSA_CONFIG"):
        return Path(named)
    root = environment.get("XDG_CONFIG_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".config")
    return Path(root) / "hansa" / "config.toml"


def load(environment: Mapping[str, str]) -> Context:
    """Return the context in force. Raises UsageError for a damaged file or an unknown context."""
    config = read(config_path(environment))
    name = environment.get("HANSA_CONTEXT") or config.current
    if name not in config.contexts and name != DEFAULT_CONTEXT:
        known = ", ".join(sorted(config.contexts)) or "none"
        raise UsageError(
            f"there is no context {name!r} (known: {known})", next_step="`hansa config set --context NAME`"
        )
    context = config.contexts.get(name, Context())
    if url := environment.get("HANSA_URL"):
        context = replace(context, url=url)
    if token := environment.get("HANSA_TOKEN"):
        context = replace(context, token=token)
    if ca := environment.get("HANSA_CA"):
        context = replace(context, ca=Path(ca))
    return context


def read(path: Path) -> Config:
    """Return the file's content, or an empty configuration where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Config(DEFAULT_CONTEXT, {})
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    try:
        if len(content) > CONFIG_BYTES_MAX:
            raise UsageError(f"{path} is larger than {CONFIG_BYTES_MAX} bytes")
        document = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}", next_step="mend it or move it away") from None
    rows = document.get("contexts", {})
    if not isinstance(rows, dict):
        raise UsageError(f"{path}: `contexts` must be tables such as [contexts.lab]")
    contexts = {str(name): _context(path, str(name), row) for name, row in rows.items()}
    return Config(str(document.get("current", DEFAULT_CONTEXT)), contexts)


def write(path: Path, config: Config) -> None:
    """Replace the file, readable by its owner alone."""
    lines = [f"current = {json.dumps(config.current)}"]
    for name, context in sorted(config.contexts.items()):
        lines += ["", f"[contexts.{name}]", f"url = {json.dumps(context.url)}"]
        lines += [f"token = {json.dumps(context.token)}"] if context.token else []
        lines += [f"ca = {json.dumps(str(context.ca))}"] if context.ca else []
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as stream:
        stream.write("\n".join(lines) + "\n")
    partial.replace(path)


def checked_name(name: str) -> str:
    """Return `name` if a context may be called so. Raises UsageError."""
    if not _CONTEXT_NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot name a context; use letters, digits, - and _")
    return name


def _context(path: Path, name: str, row: object) -> Context:
    if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
        raise UsageError(f"{path}: [contexts.{name}] must hold only text values: {', '.join(_FIELDS)}")
    if unknown := sorted(set(row) - set(_FIELDS)):
        raise UsageError(f"{path}: [contexts.{name}] has an unknown key {unknown[0]!r}; known: {', '.join(_FIELDS)}")
    return Context(
        url=row.get("url", DEFAULT_URL), token=row.get("token", ""), ca=Path(row["ca"]) if row.get("ca") else None
    )
