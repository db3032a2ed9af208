"""Row filters such as ``"not cancelled and quantity > 0"``, parsed without ever being executed."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from userip_fast.core.errors import DataError, shown
from userip_fast.data.arrow import combine, to_numpy

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_MIRROR: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt,
    ast.LtE: ast.GtE,
    ast.Gt: ast.Lt,
    ast.GtE: ast.LtE,
}


class RowFilter:
    """A predicate over the columns of a table, in a small part of Python's syntax.

    Allowed: column names, numbers, strings, True and False; comparisons of a column with a literal
    or another column (``1 <= rating < 4``); ``in [..]`` and ``not in [..]``; ``and``, ``or``,
    ``not``; a boolean column by itself. A row is kept where the predicate is true: where a null
    makes it unknown (three-valued logic, as in SQL), the row is dropped.

    Attributes:
        columns: Those it names.
        numbers: Those of them that are compared with numbers.

    Raises:
        DataError: The text does not parse, or uses anything else.
    """

    def __init__(self, expression: str) -> None:
        self.expression = expression
        try:
            self._tree = ast.parse(expression.strip(), mode="eval").body
            self._check(self._tree)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
            if isinstance(e, DataError):
                raise
            raise self._error(f"cannot be parsed ({str(e)[:200]})") from e
        names = (node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name))
        self.columns: tuple[str, ...] = tuple(dict.fromkeys(names))
        self.numbers = frozenset(self._compared_with_numbers())

    def _compared_with_numbers(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                for a, b in pairwise(sides):
                    for column, other in ((a, b), (b, a)):
                        literals = (
                            other.elts if isinstance(other, ast.List | ast.Tuple) else [other]
                        )
                        if isinstance(column, ast.Name) and all(map(_is_number, literals)):
                            yield column.id

    def _error(self, why: str) -> DataError:
        return DataError(
            f"filter {shown(self.expression)}: {why}; write column names, literals, comparisons, "
            "'in [..]', 'and', 'or' and 'not', for example \"not cancelled and quantity > 0\""
        )

    def _check(self, node: ast.expr) -> None:
        match node:
            case ast.BoolOp(values=values):
                for value in values:
                    self._check(value)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self._check(operand)
            case ast.Compare(left=left, ops=ops, comparators=rights):
                for a, op, b in zip([left, *rights], ops, rights, strict=False):
                    if isinstance(op, ast.In | ast.NotIn):
                        if not isinstance(b, ast.List | ast.Tuple) or not b.elts:
                            raise self._error("'in' needs a list of literals on its right")
                        if not isinstance(a, ast.Name):
                            raise self._error("'in' needs a column on its left")
                        for element in b.elts:
                            self._literal(element)
                    elif type(op) not in _COMPARE:
                        raise self._error(
                            f"'{ast.unparse(node)}' uses a comparison it does not know"
                        )
                    elif not isinstance(a, ast.Name) and not isinstance(b, ast.Name):
                        raise self._error(f"'{ast.unparse(node)}' compares no column")
                    else:
                        for side in (a, b):
                            if not isinstance(side, ast.Name):
                                self._literal(side)
            case ast.Name():
                pass
            case _:
                raise self._error(f"'{ast.unparse(node)}' is not allowed")

    def _literal(self, node: ast.expr) -> int | float | str | bool:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() as value):
                return value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
        raise self._error(f"'{ast.unparse(node)}' is not a number, string, True or False")

    def mask(self, table: pa.Table) -> NDArray[np.bool_]:
        """[n] True for the rows to keep.

        Raises:
            DataError: A column is missing, or of a type that the comparison does not fit.
        """
        for name in self.columns:
            if name not in table.column_names:
                raise self._error(f"there is no column {name!r}, only {table.column_names}")
        try:
            keep = self._evaluate(self._tree, table)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OverflowError) as e:
            raise self._error(f"does not fit the columns' types ({str(e)[:200]})") from e
        return to_numpy(pc.fill_null(keep, False))

    def _evaluate(self, node: ast.expr, table: pa.Table) -> pa.Array:
        match node:
            case ast.BoolOp(op=op, values=values):
                join = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                result = self._evaluate(values[0], table)
                for value in values[1:]:
                    result = join(result, self._evaluate(value, table))
                return result
            case ast.UnaryOp(operand=operand):
                return pc.invert(self._evaluate(operand, table))
            case ast.Compare(left=left, ops=ops, comparators=rights):
                pairs = zip([left, *rights], ops, rights, strict=False)
                results = [self._compare(a, op, b, table) for a, op, b in pairs]
                result = results[0]
                for other in results[1:]:
                    result = pc.and_kleene(result, other)
                return result
        assert isinstance(node, ast.Name)
        array = combine(table[node.id])
        if not pa.types.is_boolean(array.type):
            raise self._error(f"column {node.id!r} is {array.type}, not boolean: compare it")
        return array

    def _compare(self, a: ast.expr, op: ast.cmpop, b: ast.expr, table: pa.Table) -> pa.Array:
        if not isinstance(a, ast.Name):  # _check saw to it that one side is a column
            a, b, op = b, a, _MIRROR.get(type(op), type(op))()
        assert isinstance(a, ast.Name)
        column = combine(table[a.id])
        if isinstance(b, ast.List | ast.Tuple):
            parts = [pc.equal(column, self._value(element, column.type)) for element in b.elts]
            result = parts[0]
            for part in parts[1:]:
                result = pc.or_(result, part)
            return pc.invert(result) if isinstance(op, ast.NotIn) else result
        other = combine(table[b.id]) if isinstance(b, ast.Name) else self._value(b, column.type)
        return _COMPARE[type(op)](column, other)

    def _value(self, node: ast.expr, kind: pa.DataType) -> pa.Scalar:
        """A literal as a scalar; text compared with a time column is read as a time."""
        value = pa.scalar(self._literal(node))
        text = pa.types.is_string(value.type)
        if text and (pa.types.is_temporal(kind) or pa.types.is_large_string(kind)):
            return value.cast(kind)
        return value


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp):
        node = node.operand
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    )
