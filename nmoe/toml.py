"""A TOML file and NMOE_* overrides → frozen dataclasses, with every mistake reported at once.

The dataclasses are the schema: `int`, `float`, `bool`, `str`, `Literal`, `X | None`, tuples of these,
nested dataclasses (tables) and tuples of dataclasses (arrays of tables). `Annotated[X, Bound(…)]` adds
what a value must satisfy beyond its type. This module knows no particular schema.
"""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import tomli

from nmoe.errors import ConfigError

T = TypeVar("T")
Key = tuple[str | int, ...]  # ("model", "layers", 1, "ffn"): names, and indices of arrays of tables

NAMES: dict[Any, str] = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
SPELT_ALIKE = (float, datetime.date, datetime.time)  # in Python and in TOML, unlike in JSON
STAND_IN: dict[Any, Any] = {int: 1, float: 1.0, bool: False, str: "?"}


@dataclass(frozen=True)
class Bound:
    """`text` completes "expected …"; `holds` decides."""

    text: str
    holds: Callable[[Any], bool]


class TomlFile(Generic[T]):
    """One TOML file and the environment over it.

    `build` never stops at a mistake: it notes it, puts a stand-in in its place and goes on, so that
    checks across keys can run on the result; `report` drops those that touch a key already noted.
    `finish` raises one ConfigError with a line for each mistake.
    """

    def __init__(self, path: str | Path, env: Mapping[str, str], schema: type[T]) -> None:
        """Raises ConfigError if `path` cannot be read or is not TOML."""
        self.path = Path(path)
        self.schema = schema
        self.env = env
        self.overrides: dict[Key, str] = {}
        self._problems: list[tuple[tuple[bool, int, int], str]] = []
        self._bad: set[Key] = set()
        try:
            text = self.path.read_bytes().decode("utf-8-sig")
            self._tree: dict[str, Any] = tomli.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}; name a TOML file") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
        except tomli.TOMLDecodeError as error:
            reason, line = _syntax(str(error))
            raise ConfigError(f"{path}:{line or text.count(chr(10)) + 1}: not TOML: {reason}") from None
        self._lines = positions(text)
        for name in sorted(env):
            if name.startswith("NMOE_") and "__" in name:
                self._override(name, env[name])

    def build(self) -> T:
        """An instance of the schema; stand-ins where the file is wrong."""
        return self._table(self.schema, self._tree, ())

    def report(self, keys: Iterable[Key], text: str) -> None:
        """Note that `keys` together are wrong; the line is that of the first."""
        keys = tuple(keys)
        if not any(_related(key, bad) for key in keys for bad in self._bad):
            self._note(keys[0], text)

    def finish(self) -> None:
        """Raises ConfigError if anything was noted."""
        if self._problems:
            raise ConfigError("\n".join(text for _, text in sorted(self._problems)))

    # ---- where a key stands -------------------------------------------------------------------------

    def _note(self, key: Key, text: str, *, section: bool = False, bad: bool = False) -> None:
        if bad:
            self._bad.add(key)
        override = next((self.overrides[p] for p in _prefixes(key) if p in self.overrides), None)
        line = next((self._lines[p] for p in _prefixes(key) if p in self._lines), 0)
        where = f"{override} (environment)" if override else f"{self.path}:{line}" if line else f"{self.path}"
        order = (override is not None, line, len(self._problems))
        self._problems.append((order, f"{where}: {self._label(key, section)}: {text}"))

    def _label(self, key: Key, section: bool = False) -> str:
        """`[train] steps`, `[[model.layers]] #2 ffn`, `[moe]`: a key as a user would look for it."""
        whole = section or isinstance(key[-1], int) or _is_table(kind_at(self.schema, key))
        table = key if whole else key[:-1]
        names = tuple(part for part in table if isinstance(part, str))
        dotted = ".".join(names)
        head = f"[[{dotted}]]" if _is_array(kind_at(self.schema, names)) else f"[{dotted}]" if names else ""
        row = [f"#{part + 1}" for part in table if isinstance(part, int)]
        return " ".join(filter(None, [head, *row, "" if whole else str(key[-1])]))

    # ---- overrides ----------------------------------------------------------------------------------

    def _override(self, name: str, text: str) -> None:
        key: Key = tuple(name.removeprefix("NMOE_").lower().split("__"))
        kind = kind_at(self.schema, key)
        if not _is_settable(kind):
            settable = (k for k in keys(self.schema) if _is_settable(kind_at(self.schema, k)))
            hint = _did_you_mean(name, ["NMOE_" + "__".join(map(str, k)).upper() for k in settable])
            self._problems.append(
                ((True, 0, len(self._problems)), f"{name} (environment): names no key{hint}")
            )
            return
        table = self._tree
        for part in key[:-1]:
            table = table.setdefault(str(part), {}) if isinstance(table, dict) else table
        if isinstance(table, dict):  # otherwise the file has a value where a table belongs: build() says so
            table[str(key[-1])] = _parse(kind, text)
            self.overrides[key] = name

    # ---- typed values -------------------------------------------------------------------------------

    def _table(self, schema: Any, raw: Any, key: Key) -> Any:
        if not isinstance(raw, dict):
            self._note(key, f"found {_show(raw)}, expected a table", bad=True)
            return _stand_in(schema)
        kinds = hints(schema)
        meant = {self._unknown(schema, name, raw[name], key) for name in raw if name not in kinds}
        values = {name: self._value(kinds[name], raw[name], (*key, name)) for name in raw if name in kinds}
        for name in _required(schema):
            if name not in raw:
                values[name] = _stand_in(kinds[name])
                if name not in meant:
                    self._note((*key, name), f"missing, expected {describe(kinds[name])}", bad=True)
        return schema(**values)

    def _unknown(self, schema: Any, name: str, raw: Any, key: Key) -> str | None:
        """Reports an unknown key or section; returns its sibling that was probably meant."""
        section = isinstance(raw[0] if isinstance(raw, list) and raw else raw, dict)
        close = _nearest(name, hints(schema))
        elsewhere = next((at for at in keys(self.schema) if at[-1] == name), None)
        if close or elsewhere:
            hint = f"; did you mean {self._label((*key, close) if close else elsewhere or key)}?"
        else:
            hint = f", expected one of {', '.join(hints(schema))}"
        self._bad.update((*key, wrong) for wrong in (name, close) if wrong)
        self._note((*key, name), f"unknown {'section' if section else 'key'}{hint}", section=section)
        return close

    def _value(self, kind: Any, raw: Any, key: Key) -> Any:
        if _is_schema(_plain(kind)):
            return self._table(_plain(kind), raw, key)
        if _is_array(kind):
            if isinstance(raw, list) and all(bound.holds(raw) for bound in _bounds(kind)):
                return tuple(self._table(_row(kind), item, (*key, i)) for i, item in enumerate(raw))
            self._note(key, f"found {_show(raw)}, expected {describe(kind)}", bad=True)
            return _stand_in(kind)
        try:
            return self._convert(kind, self._expand(raw))
        except _Mismatch as wrong:
            self._note(key, f"found {_show(wrong.found)}, expected {wrong.expected}", bad=True)
            return _stand_in(kind)

    def _convert(self, kind: Any, raw: Any) -> Any:
        base = _plain(kind)
        origin, arguments = typing.get_origin(base), typing.get_args(base)
        if origin is Literal:
            if not any(raw == choice and type(raw) is type(choice) for choice in arguments):
                raise _Mismatch(raw, describe(base) + _did_you_mean(raw, arguments))
            return raw
        if origin is tuple:
            variadic = arguments[-1] is Ellipsis
            items = [raw] if variadic and not isinstance(raw, list | dict) else raw  # one for a list of one
            if not isinstance(items, list) or not (variadic or len(items) == len(arguments)):
                raise _Mismatch(raw, describe(kind))
            inner = [arguments[0]] * len(items) if variadic else arguments
            value: Any = tuple(self._convert(k, item) for k, item in zip(inner, items, strict=True))
        else:
            value = float(raw) if base is float and type(raw) is int else raw
            if type(value) is float and not math.isfinite(value):
                raise _Mismatch(raw, "a finite number")
            if type(value) is not base:
                whole = base is int and type(raw) is float and raw.is_integer()
                raise _Mismatch(raw, describe(kind) + (f"; write {int(raw)}" if whole else ""))
        for bound in _bounds(kind):
            if not bound.holds(value):
                raise _Mismatch(raw, bound.text)
        return value

    def _expand(self, raw: Any) -> Any:
        """Replace ${NMOE_NAME} and ${NMOE_NAME:-default}; set but empty counts as unset, as in sh."""
        if isinstance(raw, list):
            return [self._expand(item) for item in raw]
        if not isinstance(raw, str):
            return raw

        def replace(match: re.Match[str]) -> str:
            name, dash, default = match[1].partition(":-")
            if not re.fullmatch(r"NMOE_[A-Z0-9]+(_[A-Z0-9]+)*", name) or "${" in default:
                raise _Mismatch(raw, f"${{NMOE_NAME}} or ${{NMOE_NAME:-default}} in place of {match[0]}")
            if not dash and not self.env.get(name):
                raise _Mismatch(raw, f"{name} to be set; export it or write ${{{name}:-default}}")
            return self.env.get(name) or default

        return re.sub(r"\$\{([^}]*)\}?", replace, raw)


class _Mismatch(Exception):
    def __init__(self, found: Any, expected: str) -> None:
        self.found, self.expected = found, expected


# ---- the schema -------------------------------------------------------------------------------------


@cache
def hints(schema: type) -> dict[str, Any]:
    """Field name → type, in order."""
    resolved = typing.get_type_hints(schema, include_extras=True)
    return {field.name: resolved[field.name] for field in dataclasses.fields(schema)}


def keys(schema: type, key: Key = ()) -> Iterator[Key]:
    """Every section and key, depth first; arrays of tables appear without indices."""
    for name, kind in hints(schema).items():
        yield (*key, name)
        if _is_table(kind):
            yield from keys(_row(kind), (*key, name))


def kind_at(schema: type, key: Key) -> Any:
    """The type of `key`, or None if the schema has no such key."""
    kind: Any = schema
    for part in key:
        if isinstance(part, int):
            kind = _row(kind)
        elif _is_schema(_plain(kind)) and part in hints(_plain(kind)):
            kind = hints(_plain(kind))[part]
        else:
            return None
    return kind


def describe(kind: Any) -> str:
    """Completes "expected …": "an integer ≥ 1", "true or false", "a section with lr"."""
    if bounds := _bounds(kind):
        return bounds[0].text
    kind = _plain(kind)
    arguments = typing.get_args(kind)
    if _is_schema(kind):
        return "a section" + (f" with {', '.join(_required(kind))}" if _required(kind) else "")
    if typing.get_origin(kind) is Literal:
        *others, last = map(_show, arguments)
        return f"{', '.join(others)} or {last}" if others else last
    if typing.get_origin(kind) is tuple:
        count = "" if arguments[-1] is Ellipsis else f" of {len(arguments)}"
        return f"a list{count}, each {describe(arguments[0])}"
    return NAMES[kind]


def _plain(kind: Any) -> Any:
    """Without Annotated and without `| None`."""
    if typing.get_origin(kind) is Annotated:
        return _plain(typing.get_args(kind)[0])
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return _plain(next(k for k in typing.get_args(kind) if k is not type(None)))
    return kind


def _bounds(kind: Any) -> tuple[Bound, ...]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    return tuple(getattr(kind, "__metadata__", ()))


def _is_schema(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _is_array(kind: Any) -> bool:
    """An array of tables?"""
    kind = _plain(kind)
    return typing.get_origin(kind) is tuple and _is_schema(typing.get_args(kind)[0])


def _row(kind: Any) -> Any:
    """The schema of a table, or of the tables of an array."""
    return typing.get_args(_plain(kind))[0] if _is_array(kind) else _plain(kind)


def _is_table(kind: Any) -> bool:
    return _is_schema(_row(kind))


def _is_settable(kind: Any) -> bool:
    """Can one override hold it? A section is set key by key; a missing key has kind None."""
    return kind is not None and not _is_schema(_plain(kind))


def _required(schema: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(schema) if f.default is f.default_factory is MISSING]


def _stand_in(kind: Any) -> Any:
    if _is_array(kind):
        return ()
    kind = _plain(kind)
    if _is_schema(kind):
        return kind(**{name: _stand_in(hints(kind)[name]) for name in _required(kind)})
    if typing.get_origin(kind) is tuple:
        return tuple(_stand_in(k) for k in typing.get_args(kind) if k is not Ellipsis)
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Literal else STAND_IN[kind]


def reference(kind: Any, key: Key = ()) -> str:
    """Markdown: a table of keys for each section, from dataclasses, their docstrings and comments."""
    schema, name = _row(kind), ".".join(map(str, key))
    remarks = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(schema), re.MULTILINE))
    rows = [
        f"| `{field.name}` | {describe(at)} | {_default(field)} | {remarks[field.name]} |"
        for field in dataclasses.fields(schema)
        if not _is_table(at := hints(schema)[field.name])
    ]
    parts = []
    if rows:
        docstring = inspect.getdoc(schema) or ""
        about = (
            [] if docstring.startswith(f"{schema.__name__}(") else [docstring]
        )  # dataclass's own: none written
        table = "\n".join(["| key | value | default | meaning |", "|---|---|---|---|", *rows])
        parts = [f"## `[[{name}]]`" if _is_array(kind) else f"## `[{name}]`", *about, table]
    parts += [reference(inner, (*key, name)) for name, inner in hints(schema).items() if _is_table(inner)]
    return "\n\n".join(parts)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    return "absent" if field.default is None else f"`{_show(field.default)}`"


# ---- text -------------------------------------------------------------------------------------------


def _parse(kind: Any, text: str) -> Any:
    """An override's text as the TOML value that `kind` asks for; what does not parse stays text."""
    kind = _plain(kind)
    while typing.get_origin(kind) is tuple and not text.lstrip().startswith("["):
        kind = _plain(typing.get_args(kind)[0])
    if kind is str or (typing.get_origin(kind) is Literal and isinstance(typing.get_args(kind)[0], str)):
        return text
    try:
        document = tomli.loads(f"value = {text}")
    except tomli.TOMLDecodeError:
        return text
    return document["value"] if len(document) == 1 else text


def _nearest(name: str, valid: Iterable[Any]) -> str | None:
    return next(iter(difflib.get_close_matches(name, [v for v in valid if isinstance(v, str)], n=1)), None)


def _did_you_mean(found: Any, valid: Iterable[Any]) -> str:
    close = _nearest(found, valid) if isinstance(found, str) else None
    return f'; did you mean "{close}"?' if close else ""


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "a table"
    text = (
        str(value) if isinstance(value, SPELT_ALIKE) else json.dumps(value, default=str, ensure_ascii=False)
    )
    return text if len(text) <= 80 else text[:77] + "…"


def _prefixes(key: Key) -> Iterator[Key]:
    return (key[:n] for n in range(len(key), 0, -1))


def _related(key: Key, other: Key) -> bool:
    shorter = min(len(key), len(other))
    return key[:shorter] == other[:shorter]


def _syntax(message: str) -> tuple[str, int]:
    match = re.fullmatch(r"(.*) \(at line (\d+), column \d+\)", message, re.DOTALL)
    return (match[1], int(match[2])) if match else (message.removesuffix(" (at end of document)"), 0)


# ---- where keys stand in a TOML text ----------------------------------------------------------------

_TOKEN = re.compile(
    r'"""(?:\\.|[^\\])*?"""(?:"{0,2})|\'\'\'.*?\'\'\'(?:\'{0,2})|"(?:\\.|[^"\\])*"|\'[^\']*\''
    r"|#[^\n]*|[\[{]|[\]}]|\n|[^\"'#\[\]{}\n]+",
    re.DOTALL,
)
_NAME = r"(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|[A-Za-z0-9_-]+)"
_KEY = re.compile(rf"\s*({_NAME}(?:[ \t]*\.[ \t]*{_NAME})*)[ \t]*=")


def positions(text: str) -> dict[Key, int]:
    """Line number (from 1) of every table header and key of a valid TOML text.

    Keys inside inline tables are not listed; they stand on the line of the key that holds them.
    """
    lines: dict[Key, int] = {}
    rows: dict[Key, int] = {}  # array of tables → tables so far

    def resolve(names: Iterable[str], into: Key = ()) -> Key:
        for name in names:
            into = (*into, name)
            into = (*into, rows[into] - 1) if into in rows else into
        return into

    table: Key = ()
    for number, statement in _statements(text):
        if assignment := _KEY.match(statement):
            lines.setdefault(resolve(_names(f"{assignment[1]} = 0"), table), number)
            continue
        names = _names(statement)
        if statement.startswith("[["):
            array = (*resolve(names[:-1]), names[-1])
            rows[array] = rows.get(array, 0) + 1
            lines.setdefault(array, number)
        table = resolve(names)
        lines.setdefault(table, number)
    return lines


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line number, text without comments) of each header and each key with its value."""
    number, depth, start = 1, 0, 1
    parts: list[str] = []
    for token in _TOKEN.findall(text + "\n"):
        depth += (token in "[{") - (token in "]}")
        if token == "\n" and depth == 0:
            if statement := "".join(parts).strip():
                yield start, statement
            parts = []
        elif not token.startswith("#"):
            if not "".join(parts).strip():
                start = number
            parts.append(token)
        number += token.count("\n")


def _names(statement: str) -> tuple[str, ...]:
    """The dotted name of a header or of a key, unquoted."""
    node: Any = tomli.loads(statement)
    names: list[str] = []
    while isinstance(node, dict) and node:
        name = next(iter(node))
        names.append(name)
        node = node[name]
    return tuple(names)
