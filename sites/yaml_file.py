"""A YAML file that a person wrote, read into a model; every fault is told with its line, all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sites.errors import SiteError

FILE_BYTES_MAX: Final = 64 * 1024

M = TypeVar("M", bound=BaseModel)
_Lines = dict[tuple[str | int, ...], int]


class Section(BaseModel):
    """A part of such a file: unknown keys are refused, so that a misspelling is found."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def read_yaml(path: Path, model: type[M], error: type[SiteError]) -> M:
    """Return what stands in the file at `path`. Raises `error`, which lists every fault with its line."""
    try:
        with path.open("rb") as stream:
            text = stream.read(FILE_BYTES_MAX + 1).decode("utf-8")
    except (OSError, UnicodeDecodeError) as reason:
        raise error(f"{path} cannot be read ({reason}); write a {path.name} there") from None
    if len(text.encode()) > FILE_BYTES_MAX:
        raise error(f"{path} is larger than {FILE_BYTES_MAX // 1024} KiB; that is no {path.name}")
    lines: _Lines = {}
    try:
        return model.model_validate(_document(text, lines))
    except yaml.YAMLError as reason:
        raise error(f"{path}: {' '.join(str(reason).split())}") from None
    except ValidationError as reason:
        raise error("\n".join(_sentence(path, fault, lines) for fault in reason.errors())) from None


def _document(text: str, lines: _Lines) -> Any:  # noqa: ANN401  any YAML value
    loader = yaml.SafeLoader(text)
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # An alias of an alias of an alias … is a few hundred bytes here and gigabytes when walked.
            if isinstance(event, yaml.AliasEvent):
                raise yaml.YAMLError(f"line {_line(event)}: aliases (*name) are not allowed")
        node = loader.get_single_node()
        if node is None:
            return {}
        _note_lines(node, (), lines)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _line(place: yaml.Node | yaml.Event) -> int:
    return 1 + (place.start_mark.line if place.start_mark else 0)


def _note_lines(node: yaml.Node, place: tuple[str | int, ...], lines: _Lines) -> None:
    lines[place] = _line(node)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            _note_lines(value, (*place, str(key.value)), lines)
            lines[(*place, str(key.value))] = _line(key)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _note_lines(value, (*place, index), lines)


def _sentence(path: Path, fault: Any, lines: _Lines) -> str:  # noqa: ANN401  pydantic's ErrorDetails
    place = tuple(fault["loc"])
    known = place
    while known and known not in lines:
        known = known[:-1]
    key = ".".join(str(part) for part in place) or "the file"
    return f"{path}, line {lines.get(known, 1)}, {key}: {fault['msg'].removeprefix('Value error, ')}"
