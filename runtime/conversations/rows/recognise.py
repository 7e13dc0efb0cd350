"""Recognise the format of a row from its keys and read its conversations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from runtime.common.errors import ConfigurationError, ConversationError
from runtime.conversations.conversation import describe_value, location_prefix
from runtime.conversations.rows.context import RowContext, RowOptions, RowReading
from runtime.conversations.rows.shapes import FORMATS, SHAPES, Shape

EXAMPLE = '{"prompt": "...", "chosen": "...", "rejected": "..."}'


def read_row(row: Any, where: str = "", options: RowOptions | None = None) -> RowReading:
    """Read a row of any known format, with the same conversations as in the `messages` form.

    Raises:
        EmptyConversationError: a prompt or response is blank.
        ConversationError: the row has no known format, two that differ, or a value that cannot be read.
    """
    options = options or RowOptions()
    if not isinstance(row, dict):
        raise ConversationError(
            f"{location_prefix(where)}the row is {describe_value(row)}; an object such as {EXAMPLE} was expected."
        )
    row = _rename({key: value for key, value in row.items() if value is not None}, options, where)
    if options.format:
        shape = find_format(options.format)
        if missing := [key for key in shape.needs if key not in row]:
            raise ConversationError(_missing(row, shape, missing, where))
        return _read(shape, row, where, options)
    shapes = matching_shapes({key: value for key, value in row.items() if not _is_blank(value)})
    if not shapes:
        shapes = matching_shapes(row)
    if not shapes:
        shape = max(reversed(SHAPES), key=_nearness(row))
        raise ConversationError(_missing(row, shape, [key for key in shape.needs if key not in row], where))
    return _only(shapes, row, where, options)


def find_format(name: str) -> Shape:
    """The shape of a `--format`.

    Raises:
        ConfigurationError: no format has this name.
    """
    for shape in SHAPES:
        if shape.name == name:
            return shape
    raise ConfigurationError(f"--format is {name!r}; one of {', '.join(FORMATS)} was expected.")


def matching_shapes(row: dict[str, Any]) -> list[Shape]:
    """The formats of the highest rank that a row's keys fit, without those that need fewer keys than another."""
    found = [shape for shape in SHAPES if all(key in row for key in shape.needs) and shape.applies(row)]
    found = [shape for shape in found if shape.rank == max(each.rank for each in found)]
    found = [shape for shape in found if not any(set(shape.needs) < set(other.needs) for other in found)]
    return [shape for index, shape in enumerate(found) if all(shape.needs != other.needs for other in found[:index])]


def _only(shapes: list[Shape], row: dict[str, Any], where: str, options: RowOptions) -> RowReading:
    """The reading that all shapes agree on."""
    readings: list[RowReading] = []
    errors: list[ConversationError] = []
    for shape in shapes:
        try:
            readings.append(_read(shape, row, where, options))
        except ConversationError as error:
            errors.append(error)
    if not readings:
        raise errors[0]
    for other in readings[1:]:
        if other.conversations != readings[0].conversations:
            names = [each.format for each in (readings[0], other)]
            both = " and as ".join(f"{name} ({', '.join(map(repr, find_format(name).needs))})" for name in names)
            raise ConversationError(
                f"{location_prefix(where)}the row can be read as {both}, which differ; choose with "
                f"--format {names[0]} or --format {names[1]}."
            )
    return readings[0]


def _read(shape: Shape, row: dict[str, Any], where: str, options: RowOptions) -> RowReading:
    context = RowContext(where, options.lenient, options.allow_blank)
    reading = shape.read(row, context)
    return replace(reading, format=shape.name, warnings=context.warnings)


def _rename(row: dict[str, Any], options: RowOptions, where: str) -> dict[str, Any]:
    if not options.columns:
        return row
    renamed = {key: value for key, value in row.items() if key not in options.columns.values()}
    for name, column in options.columns.items():
        if column not in row:
            raise ConversationError(
                f"{location_prefix(where)}the row has {_keys(row)} but no {column!r}, which --columns names."
            )
        renamed[name] = row[column]
    return renamed


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _nearness(row: dict[str, Any]) -> Any:
    def nearness(shape: Shape) -> tuple[int, int, int]:
        present = sum(key in row for key in shape.needs)
        return present - ("prompt" in row and "prompt" in shape.needs), present - len(shape.needs), shape.rank

    return nearness


def _missing(row: dict[str, Any], shape: Shape, missing: list[str], where: str) -> str:
    prefix = location_prefix(where)
    if not any(key in row for key in shape.needs if key != "prompt"):
        return (
            f"{prefix}the row has {_keys(row)}, which fit no known format; a row is such as {EXAMPLE}. Rename columns "
            "with --columns prompt=NAME,chosen=NAME,rejected=NAME."
        )
    absent = " and no ".join(map(repr, missing)) or f"list of texts in {shape.needs[-1]!r}"
    return (
        f"{prefix}the row has {_keys(row)} but no {absent}; the nearest format is {shape.name}, which needs "
        f"{', '.join(map(repr, shape.needs))}. Rename columns with --columns NAME=COLUMN."
    )


def _keys(row: dict[str, Any]) -> str:
    return f"the keys {', '.join(repr(key) for key in row)}"[:200] if row else "no keys"
