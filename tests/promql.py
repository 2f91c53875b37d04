"""Expressions of PromQL, looked into."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import promql_parser as promql

# Values of each label of a series; None stands for any.
Labels = Mapping[str, set[str] | None]


def parts(expression: Any) -> Iterator[Any]:
    """An expression and all that it is made of."""
    yield expression
    for name in ("expr", "param", "lhs", "rhs", "vector_selector"):
        below = getattr(expression, name, None)
        if below is not None:
            yield from parts(below)
    for argument in getattr(expression, "args", ()):
        yield from parts(argument)


def grouped(expression: str) -> set[str]:
    """All labels by which an expression groups."""
    aggregations = (
        each
        for each in parts(promql.parse(expression))
        if isinstance(each, promql.AggregateExpr) and each.modifier is not None
    )
    return {label for each in aggregations for label in each.modifier.labels}


def check_labels(expression: str, series: Mapping[str, Labels]) -> None:
    """Asserts that metrics have the labels that they are chosen and grouped by, and such values.

    Args:
        series: each metric's labels.
    """
    known: set[str] = set()
    for selector in parts(promql.parse(expression)):
        if isinstance(selector, promql.VectorSelector):
            labels = series[selector.name]
            known |= labels.keys()
            for matcher in selector.matchers.matchers:
                assert matcher.name in labels, f"{selector.name} has no label {matcher.name}"
                values = labels[matcher.name]
                assert values is None or any(map(_pattern(matcher).fullmatch, values)), (
                    f"{matcher.name} of {selector.name} is never {matcher.value}"
                )
    assert grouped(expression) <= known, f"{expression}: {grouped(expression) - known}"


def _pattern(matcher: Any) -> re.Pattern[str]:
    assert matcher.op in (promql.MatchOp.Equal, promql.MatchOp.Re)
    equal = matcher.op is promql.MatchOp.Equal
    return re.compile(re.escape(matcher.value) if equal else matcher.value)


def is_of_nothing(expression: Any) -> bool:
    """Whether an expression has no result where no series is there, as where nothing is scraped."""
    if isinstance(expression, promql.Call):
        if expression.func.name in ("absent", "vector"):
            return False
        return all(map(is_of_nothing, expression.args))
    if isinstance(expression, promql.BinaryExpr):
        sides = (is_of_nothing(expression.lhs), is_of_nothing(expression.rhs))
        return all(sides) if str(expression.op) == "or" else any(sides)
    if isinstance(expression, (promql.AggregateExpr, promql.ParenExpr)):
        return is_of_nothing(expression.expr)
    return isinstance(expression, (promql.VectorSelector, promql.MatrixSelector))
