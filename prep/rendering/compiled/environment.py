"""The environment in which a template runs on recorded strings: nothing may look at their
characters unnoticed.

A recorded string notices calls of its own methods and operators. If it is an argument of something
that runs in C (`x in 'abc'`, `'abc'.find(x)`, `'%s' % (x,)`, JSON, filters with regular
expressions), it notices nothing. Every such use sets `record.followed` to false here: the template
is then not compiled.
"""

from collections.abc import Callable, Iterable
from functools import wraps
from types import BuiltinMethodType
from typing import Any

import jinja2
import jinja2.nodes
from jinja2.compiler import Frame
from jinja2.runtime import Context
from jinja2.tests import test_sameas

from prep.rendering.compiled.recorded_str import RecordedStr, plain
from prep.rendering.template import TracingCodeGenerator, TracingEnvironment
from prep.rendering.traced_str import Traced, join

# Filters that pass contents on, or ask only what a recorded string writes down. All others give up,
# also those of later Jinja releases: a list of what is harmless fails safe, a list of what is not
# would not.
_FOLLOWED_FILTERS = frozenset(
    ("trim", "string", "default", "d", "list", "selectattr", "rejectattr", "map", "first", "last",
     "length", "count", "join", "reverse", "items")
)  # fmt: skip


class _RecordingCodeGenerator(TracingCodeGenerator):
    """Compiles `a in b` to the environment's membership test, which keeps the record: with a plain
    `b`, Python's operator would look into `a` in C."""

    def visit_Compare(self, node: jinja2.nodes.Compare, frame: Frame) -> None:
        left = node.expr
        for index, operand in enumerate(node.ops):
            self.write(" and (" if index else "((")
            if operand.op in ("in", "notin"):
                self.write("not " if operand.op == "notin" else "")
                self.write("environment.tests['in'](")
                self.visit(left, frame)
                self.write(", ")
                self.visit(operand.expr, frame)
                self.write(")")
            else:
                pair = jinja2.nodes.Compare(
                    left, [operand], lineno=node.lineno, environment=node.environment
                )
                super().visit_Compare(pair, frame)
            self.write(")")
            left = operand.expr
        self.write(")")


class RecordingEnvironment(TracingEnvironment):
    """Joins recorded strings into one that is the content of no message: a question to it cannot be
    repeated on other contents, so it ends the recording."""

    code_generator_class = _RecordingCodeGenerator
    intercepted_binops = frozenset("%")

    @staticmethod
    def join_marked(separator: str, parts: Iterable[Any]) -> str:
        parts = list(parts)
        text = join(plain(separator), map(plain, parts))
        record = next(
            (part.record for part in [separator, *parts] if isinstance(part, RecordedStr)), None
        )
        return (
            RecordedStr.of(text, text.marks, record)
            if record is not None and isinstance(text, Traced)
            else text
        )

    def replace_filters(self) -> None:
        super().replace_filters()
        self.filters.update(
            {name: _losing(f) for name, f in self.filters.items() if name not in _FOLLOWED_FILTERS}
        )
        self.filters["trim"] = _trim
        self.filters["length"] = self.filters["count"] = _length
        self.tests["in"] = _is_in
        self.tests["sameas"] = _losing(test_sameas)

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner = function.__self__ if isinstance(function, BuiltinMethodType) else None
        if isinstance(owner, str) and function.__name__ != "join":
            _lose([*args, *kwargs.values()])
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _lose([right])
        return super().call_binop(context, operator, left, right)


def _is_in(value: Any, container: Any) -> bool:
    if isinstance(container, str) and not isinstance(container, RecordedStr):
        _lose([value])
    return value in container


def _trim(value: Any, chars: str | None = None) -> str:
    _lose([chars])
    return (value if isinstance(value, str) else str(value)).strip(chars)


def _length(value: Any) -> int:
    if isinstance(value, RecordedStr):
        value.record.followed = False
        return str.__len__(value)
    return len(value)


def _losing(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _lose([*args, *kwargs.values()])
        return function(*args, **kwargs)

    return wrapper


def _lose(values: Any) -> None:
    """Give up the recording if a recorded string is among the values, at any depth."""
    if isinstance(values, RecordedStr):
        values.record.followed = False
    elif isinstance(values, dict):
        _lose(list(values.values()))
        _lose(list(values))
    elif isinstance(values, list | tuple | set | frozenset):
        for value in values:
            _lose(value)
