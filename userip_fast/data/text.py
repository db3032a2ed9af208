"""Item text templates such as ``"{title}[[ ({genres})]]"``, rendered column-wise."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from userip_fast.core.errors import DataError, shown
from userip_fast.data.arrow import combine

# `{{` and `}}` come first, so that an escaped brace never opens or closes a column.
_TOKEN = re.compile(r"\{\{|\}\}|\[\[|\]\]|\{([^{}]*)\}|[{}]")
# What `str.split` calls white space; RE2's own \s is ASCII only.
_WHITE_SPACE = r"[\s\v\x1c-\x1f\x{85}\p{Z}]+"


@dataclass(frozen=True)
class _Group:
    """Literal strings and column names in turn: literals[0], columns[0], literals[1], ..."""

    literals: tuple[str, ...]
    columns: tuple[str, ...]
    optional: bool


class TextTemplate:
    """Turns columns of a table into one text per row.

    - ``{name}`` is the row's value of that column; a null or NaN is empty, a list of strings is
      joined by ", ", a whole float loses its ".0".
    - ``[[ ({genres})]]`` is an optional group: it vanishes where any column in it is empty.
    - ``{{`` and ``}}`` are literal braces.
    - White space is collapsed to single spaces and stripped; where every column is empty, so is the
      text, whatever literals surround it.

    Raises:
        DataError: A brace or group is not closed or nested, a name is empty, or no column is named.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        self._groups = self._parse(template)
        self.columns: tuple[str, ...] = tuple(
            dict.fromkeys(name for group in self._groups for name in group.columns)
        )
        if not self.columns:
            raise self._error("names no column; write a column in braces, as in '{title}'")

    def __repr__(self) -> str:
        return f"TextTemplate({self.template!r})"

    def _error(self, why: str) -> DataError:
        return DataError(f"text template {shown(self.template)}: {why}")

    def _parse(self, template: str) -> tuple[_Group, ...]:
        groups: list[_Group] = []
        literals: list[str] = [""]
        columns: list[str] = []
        optional, end = False, 0

        def close() -> None:
            nonlocal literals, columns
            groups.append(_Group(tuple(literals), tuple(columns), optional))
            literals, columns = [""], []

        for token in _TOKEN.finditer(template):
            literals[-1] += template[end : token.start()]
            end = token.end()
            match token[0]:
                case "{{" | "}}":
                    literals[-1] += token[0][0]
                case "[[":
                    if optional:
                        raise self._error("an optional group '[[' opens inside another")
                    close()
                    optional = True
                case "]]":
                    if not optional:
                        raise self._error("']]' closes no optional group")
                    if not columns:
                        raise self._error("an optional group names no column")
                    close()
                    optional = False
                case "{" | "}":
                    raise self._error(
                        f"unmatched {token[0]!r} at character {token.start() + 1}; "
                        "double it to mean the brace itself"
                    )
                case _:
                    if not token[1].strip():
                        raise self._error("'{}' names no column")
                    columns.append(token[1].strip())
                    literals.append("")
        if optional:
            raise self._error("an optional group '[[' is never closed by ']]'")
        literals[-1] += template[end:]
        close()
        return tuple(groups)

    def check(self, names: list[str], where: str) -> None:
        """Checks that every column of the template is among `names`.

        Raises:
            DataError: One is not; the message names it, `where` it was looked for, and the others.
        """
        for column in self.columns:
            if column not in names:
                raise self._error(f"{where} has no column {column!r}; it has {names}")

    def render(self, table: pa.Table) -> pa.Array:
        """The text of each row.

        Args:
            table: [n] rows with at least `columns`.

        Returns:
            [n] large_string without nulls.

        Raises:
            DataError: A column is missing or of a type that has no text form.
        """
        self.check(table.column_names, "the table")
        values = {name: self._text(table, name) for name in self.columns}
        parts = [self._render_group(group, values) for group in self._groups]
        text = pc.binary_join_element_wise(*parts, _string("")) if len(parts) > 1 else parts[0]
        text = pc.utf8_trim_whitespace(pc.replace_substring_regex(text, _WHITE_SPACE, " "))
        filled = pc.not_equal(values[self.columns[0]], "")
        for name in self.columns[1:]:
            filled = pc.or_(filled, pc.not_equal(values[name], ""))
        return pc.if_else(filled, text, _string(""))

    @staticmethod
    def _render_group(group: _Group, values: dict[str, pa.Array]) -> pa.Array:
        pieces = [_string(group.literals[0])]
        for name, literal in zip(group.columns, group.literals[1:], strict=True):
            pieces += [values[name], _string(literal)]
        text = pc.binary_join_element_wise(*pieces, _string(""))
        if group.optional:
            for name in group.columns:
                text = pc.if_else(pc.equal(values[name], ""), _string(""), text)
        return text

    def _text(self, table: pa.Table, name: str) -> pa.Array:
        """A column as stripped strings, empty for null."""
        array = combine(table[name])
        kind = array.type
        try:
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                array = pc.binary_join(array.cast(pa.list_(pa.string())), ", ")
            elif pa.types.is_floating(kind):
                array = pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
            array = array.cast(pa.large_string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            raise self._error(f"column {name!r} of type {kind} has no text form ({e})") from e
        return pc.utf8_trim_whitespace(pc.fill_null(array, ""))


def _string(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())
