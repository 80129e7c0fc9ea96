"""The house rules that no linter knows: what must not be written, how files are named, how long they may be."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("broker", "sites", "pricing", "training")
FOLDERS = (*PACKAGES, "tests", "deploy", ".ci")
TEXT_SUFFIXES = {
    ".py",
    ".md",
    ".toml",
    ".yaml",
    ".yml",
    ".sh",
    ".txt",
    ".html",
    ".css",
    ".js",
    ".json",
    ".mako",
    ".cfg",
    "",
}

LINES_MAX = 500
LONGER_FILES: dict[str, str] = {
    "broker/database/migrations/versions/0001_tables.py": "a migration states every table once, in one revision",
    "broker/backtest/report.py": "one page, section by section",
}
"""Path -> why this one file is longer and still one subject."""

NAMES_THAT_SAY_NOTHING = {"utils", "util", "helpers", "helper", "common", "manager", "base", "misc"}

MODULES_THAT_RUN_WHAT_THEY_READ = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal"}
CALLS_THAT_RUN_WHAT_THEY_READ = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "eval",
    "builtins.eval",
}

# Spelled in pieces, so that this file passes its own test.
MACHINE_PATHS = tuple(f"/{folder}/" for folder in ("work", "root", "home"))
REGISTRY_HOSTS = (
    *(f"{host}.org" for host in ("pypi", "files.pythonhosted", "download.pytorch", "registry.npmjs")),
    *(f"{host}.io" for host in ("crates", "proxy.golang", "quay")),
    *(f"{host}.com" for host in ("registry.yarnpkg", "unpkg")),
)


@cache
def _files() -> tuple[Path, ...]:
    below = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    files = (path for path in (*ROOT.glob("*"), *below) if path.is_file() and "__pycache__" not in path.parts)
    return tuple(
        sorted(path for path in files if path.suffix in TEXT_SUFFIXES and not path.name.startswith(".coverage"))
    )


@cache
def _sources() -> tuple[Path, ...]:
    return tuple(path for path in _files() if path.suffix == ".py")


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def banned(tree: ast.Module, *, is_test: bool) -> Iterator[tuple[int, str]]:
    """Each banned thing in `tree` as (line, what)."""
    nodes = list(ast.walk(tree))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.asname or alias.name: full for node in imports for alias, full in _imported(node)}
    for node in imports:
        for _, full in _imported(node):
            if full.partition(".")[0] in MODULES_THAT_RUN_WHAT_THEY_READ:
                yield node.lineno, f"import of {full}: its bytes run code"
    for node in nodes:
        if isinstance(node, ast.Call):
            head, dot, rest = _dotted(node.func).partition(".")
            full = names.get(head, head) + dot + rest
            if full in CALLS_THAT_RUN_WHAT_THEY_READ:
                yield node.lineno, f"{full}: it may run what it reads"
            if is_test and full == "time.sleep":
                yield node.lineno, "time.sleep in a test: wait on a condition with a limit, or move the injected clock"
            if any(keyword.arg == "shell" and not _is_false(keyword.value) for keyword in node.keywords):
                yield node.lineno, "shell=True: pass a list of arguments"


def _dotted(node: ast.expr) -> str:
    """The name that is called, with its dots; "" for what is no name."""
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _imported(node: ast.Import | ast.ImportFrom) -> list[tuple[ast.alias, str]]:
    """Each name that `node` brings, with its full name."""
    module = f"{node.module or ''}." if isinstance(node, ast.ImportFrom) else ""
    return [(alias, module + alias.name) for alias in node.names]


def test_nothing_banned_is_written() -> None:
    found = [
        f"{_name(path)}:{line}: {what}"
        for path in _sources()
        for line, what in banned(_tree(path), is_test=path.is_relative_to(ROOT / "tests"))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load\nload('x')",
        "import torch as t\nt.load('x')",
        "import yaml\nyaml.load('x')",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "eval('1')",
        "import time\ntime.sleep(1)",
        "from time import sleep as wait\nwait(1)",
    ],
)
def test_the_search_for_banned_things_finds_them(source: str) -> None:
    assert list(banned(ast.parse(source), is_test=True))


@pytest.mark.parametrize("source", ["model.eval()", "import json\njson.load(f)", "subprocess.run(['x'], shell=False)"])
def test_the_search_leaves_alone_what_only_looks_alike(source: str) -> None:
    assert not list(banned(ast.parse(source), is_test=True))


def test_every_file_name_says_something() -> None:
    nothing = [_name(path) for path in _sources() if {path.stem, path.parent.name} & NAMES_THAT_SAY_NOTHING]
    assert nothing == []


def test_no_file_is_too_long_to_be_one_subject() -> None:
    lines = {_name(path): len(path.read_text("utf-8").splitlines()) for path in _sources()}
    assert {name: count for name, count in lines.items() if count > LINES_MAX and name not in LONGER_FILES} == {}
    outgrown = [name for name in LONGER_FILES if lines.get(name, 0) <= LINES_MAX]
    assert outgrown == [], "these need no exception any more"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_its_design_chapter(package: str) -> None:
    chapter = ROOT / package / "README.md"
    assert chapter.exists()
    assert len(chapter.read_text("utf-8")) > 500


def test_nothing_speaks_of_one_machine_or_of_one_registry() -> None:
    found = [
        f"{_name(path)}: {word}"
        for path in _files()
        for word in (*MACHINE_PATHS, *REGISTRY_HOSTS)
        if re.search(rf"(?<![\w.]){re.escape(word)}", path.read_text("utf-8", errors="replace"))
    ]
    assert found == []


def test_every_promise_of_the_readme_names_a_test_that_exists() -> None:
    chapter = (ROOT / "README.md").read_text("utf-8").partition("## What it promises")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[^`]+)`", chapter)
    assert named
    for reference in named:
        path, _, test = reference.partition("::")
        assert (ROOT / path).exists(), reference
        assert not test or f"def {test}(" in (ROOT / path).read_text("utf-8"), reference


def _error_codes() -> dict[str, str | None]:
    """The code that each error class in an errors.py states itself; None where it states none."""
    classes = {
        (_name(path), node.name): node
        for path in _sources()
        if path.name == "errors.py"
        for node in _tree(path).body
        if isinstance(node, ast.ClassDef)
    }
    errors = {"Exception"}
    while True:
        found = {name for (_, name), node in classes.items() if {ast.unparse(base) for base in node.bases} & errors}
        if found <= errors:
            break
        errors |= found
    return {f"{path}: {name}": _code(node) for (path, name), node in classes.items() if name in errors}


def _code(node: ast.ClassDef) -> str | None:
    for statement in node.body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and target.id == "code" and isinstance(value, ast.Constant):
            return str(value.value)
    return None


def test_every_error_has_a_code_of_its_own() -> None:
    codes = _error_codes()
    assert codes, "the packages have errors"
    assert [name for name, code in codes.items() if code is None] == []
    shared = {code for code, count in Counter(codes.values()).items() if count > 1}
    assert {name: code for name, code in codes.items() if code in shared} == {}
    odd = {
        name: code for name, code in codes.items() if not re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+", code or "")
    }
    assert odd == {}
