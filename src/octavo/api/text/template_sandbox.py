"""The sandbox that chat templates run in: jinja2's, plus a budget of work so that no template can hang the server.

jinja2's sandbox stops a template from reaching Python, not from looping for ever or from filling the memory. So the
parsed template is rewritten before it is compiled: each ``for`` counts its passes, each macro its calls, and what each
filter, ``~`` and list or dict display makes is measured; operators and calls are measured by the sandbox's own hooks. A value
is measured with all that it holds, so printing or comparing it later cannot explode. What would be large before it could be
measured (``replace``, ``join``, ``indent``, formats) is estimated first.
"""

from __future__ import annotations

import itertools
import re
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.utils import Namespace

MAX_SOURCE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 32 << 20
MAX_VALUE_SIZE = 8 << 20  # characters of one value (see ``size_of``), beyond what the conversation itself has
MAX_INTEGER = 1 << 20  # an argument or factor beyond this is a width, a count or an exponent meant to explode
MAX_STEPS = 4_000_000
MAX_SECONDS = 5.0
_ITEM_SIZE = 16  # an item of a list or dict weighs as much as so many characters
_SIZE_PER_STEP = 1024
_STEPS_PER_CLOCK = 64

_WIDE = re.compile(r"[0-9]{6,}")  # a width or precision that only fills memory

_PRODUCTS = frozenset({"replace", "join", "indent", "wordwrap", "tojson"})
# Text methods that multiply in ways not estimated here, or lead to bytes, which have all methods once more.
_DENIED_METHODS = frozenset({"encode", "translate", "maketrans", "expandtabs", "to_bytes"})
_REMOVED_FILTERS = ("pprint", "urlize", "xmlattr")

_PASSES, _VALUE, _CALL = "_count_passes", "_count_value", "_count_call"


class BudgetError(jinja2.exceptions.SecurityError):
    """The template did more work than it may."""


class Budget:
    """What one rendering may still do: steps (loop passes, calls, operators), seconds and characters of output."""

    VARIABLE = "_budget"

    def __init__(self, inputs: Any = None) -> None:
        self.max_size = MAX_VALUE_SIZE + size_of(inputs, sys.maxsize)
        self._steps = MAX_STEPS
        self._chars = MAX_OUTPUT_CHARS
        self._deadline = time.monotonic() + MAX_SECONDS
        self._clock = _STEPS_PER_CLOCK

    def spend(self, steps: int = 1) -> None:
        """Count ``steps``; raises ``BudgetError`` when too many or too late."""
        self._steps -= steps
        self._clock -= steps
        if self._steps < 0:
            raise BudgetError(f"it took more than {MAX_STEPS} steps")
        if self._clock < 0:
            self._clock = _STEPS_PER_CLOCK
            if time.monotonic() > self._deadline:
                raise BudgetError(f"it took more than {MAX_SECONDS:g} seconds")

    def output(self, chars: int) -> None:
        """Count characters of the result."""
        self._chars -= chars
        if self._chars < 0:
            raise BudgetError(f"its output is longer than {MAX_OUTPUT_CHARS} characters")
        self.spend()

    def value(self, value: Any) -> Any:
        """Count one operation by the size of what it made; returns ``value``."""
        if isinstance(value, int) and value.bit_length() > 4096:
            raise BudgetError("it made a number of more than 4096 bits")
        size = size_of(value, self.max_size)
        if size > self.max_size:
            raise BudgetError(f"it made a value of more than {self.max_size} characters")
        self.spend(1 + size // _SIZE_PER_STEP)
        return value


def size_of(value: Any, most: int) -> int:
    """Characters of a value and all that it holds, plus ``_ITEM_SIZE`` an item; counting ends beyond ``most``."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 0
    size, stack = 0, [value]
    while stack and size <= most:
        inner = stack.pop()
        size += len(inner) * _ITEM_SIZE
        for item in itertools.chain(inner, inner.values()) if isinstance(inner, dict) else inner:
            if isinstance(item, str | bytes):
                size += len(item)
            elif isinstance(item, list | tuple | dict):
                stack.append(item)
    return size


def _budget(context: Context) -> Budget:
    # ``parent`` holds what the caller passed; what the template sets for itself goes elsewhere.
    budget = context.parent[Budget.VARIABLE]
    if not isinstance(budget, Budget):
        raise BudgetError("it has no budget")
    return budget


@jinja2.pass_context
def _count_passes(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    budget = _budget(context)
    for item in items:
        budget.spend()
        yield item


@jinja2.pass_context
def _count_value(context: Context, value: Any) -> Any:
    return _budget(context).value(value)


@jinja2.pass_context
def _count_call(context: Context, value: Any) -> Any:
    _budget(context).spend()
    return value


def _check_arguments(args: Iterable[Any]) -> None:
    for arg in args:
        if isinstance(arg, int | float) and abs(arg) > MAX_INTEGER:
            raise BudgetError(f"it uses {arg} as an argument, at most {MAX_INTEGER} is allowed")


def _guarded(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that refuses huge numbers (``center(10**9)``) and results that would be huge."""
    skip = 1 if hasattr(filter, "jinja_pass_arg") else 0  # the environment or context comes first

    @wraps(filter)
    def call(*args: Any, **kwargs: Any) -> Any:
        _check_arguments(args[skip + 1 :])
        _check_arguments(kwargs.values())
        if name == "join":
            # A generator must be read to know how much it holds; what was read is passed on.
            args = (*args[:skip], list(args[skip]), *args[skip + 1 :])
        _check_growth(name, args[skip], [*args[skip + 1 :], *kwargs.values()])
        return filter(*args, **kwargs)

    return call


def _check_growth(name: str, value: Any, rest: list[Any]) -> None:
    """Refuse text operations whose result is a product of their arguments' sizes and would be enormous."""
    if name not in _PRODUCTS:
        return
    factor = max([arg if isinstance(arg, int) else size_of(arg, MAX_VALUE_SIZE) for arg in rest], default=0)
    if name == "join":
        size = size_of(value, MAX_OUTPUT_CHARS) + len(value) * factor if isinstance(value, list) else 0
    elif name in ("indent", "tojson"):
        size = (
            value.count("\n") + 1 if isinstance(value, str) else size_of(value, MAX_OUTPUT_CHARS)
        ) * factor
    else:
        size = size_of(value, MAX_OUTPUT_CHARS) * factor
    if size > MAX_OUTPUT_CHARS:
        raise BudgetError(f"{name} would make a text of more than {MAX_OUTPUT_CHARS} characters")


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    """jinja2's ``format`` filter (printf style) without enormous widths."""
    template = str(value)
    if "%" in template and _WIDE.search(template):
        raise BudgetError("it formats with a width of six digits")
    _check_fields(template.count("%"), (args, kwargs))
    return template % (kwargs or args)


def _check_fields(count: int, arguments: Any) -> None:
    if count * size_of(arguments, MAX_OUTPUT_CHARS) > MAX_OUTPUT_CHARS:
        raise BudgetError(f"format would make a text of more than {MAX_OUTPUT_CHARS} characters")


def _check_format(template: str, arguments: Any) -> None:
    """Refuse ``str.format`` with an enormous width, or with one computed from the arguments."""
    _check_fields(template.count("{"), arguments)
    for _, _, spec, _ in string.Formatter().parse(template):
        if spec and ("{" in spec or _WIDE.search(spec)):
            raise BudgetError("it formats with a width of six digits or a computed one")


def _sum(items: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
    """jinja2's ``sum`` for numbers only: adding up lists copies them again and again."""
    total = start
    for item in items:
        value = item if attribute is None else item.get(attribute) if isinstance(item, dict) else None
        if not isinstance(value, int | float) or not isinstance(total, int | float):
            raise TypeError("sum adds numbers")
        total += value
    return total


class _Namespace(Namespace):
    """``namespace(...)`` that does not print its content: one may hold another many times over."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(jinja2.ext.Extension):
    """``{% generation %} ... {% endgeneration %}`` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2 as Hugging Face sets it up for chat templates, with every operation on a budget."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, filters: dict[str, Callable[..., Any]] | None = None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,  # the optimizer would compute constant expressions before a budget exists
        )
        self.globals.pop("lipsum", None)
        self.globals["namespace"] = _Namespace
        self.filters.update(format=_format, sum=_sum, **(filters or {}))
        for name in _REMOVED_FILTERS:
            del self.filters[name]
        self.filters = {name: _guarded(name, filter) for name, filter in self.filters.items()}
        self.filters[_PASSES] = _count_passes
        self.filters[_VALUE] = _count_value
        self.filters[_CALL] = _count_call

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """jinja2's rule, and no text methods whose result cannot be bounded."""
        if isinstance(obj, str | int) and attr in _DENIED_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator of the template, refused where its result would be enormous."""
        if operator == "*":
            for sequence, factor in ((left, right), (right, left)):
                sized = isinstance(sequence, str | list | tuple | bytes) and isinstance(factor, int)
                if sized and len(sequence) * factor > MAX_VALUE_SIZE:
                    raise BudgetError(f"it multiplies {len(sequence)} characters or items by {factor}")
        elif operator == "**":
            _check_power(left, right)
        elif operator == "%" and isinstance(left, str | bytes):
            raise BudgetError("it formats with %; the format filter does the same")
        return _budget(context).value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """``str.format`` and ``str.format_map`` of the template, without enormous widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        formatted = wrapped

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(str(value.__self__), (args, kwargs))
            return formatted(*args, **kwargs)

        return checked

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: PYI063
        """A call of the template; jinja2 passes keyword arguments through, hence the odd names."""
        _check_arguments(args)
        _check_arguments(kwargs.values())
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "join" and args:
            items = list(args[0])
            _check_growth("join", items, [owner])
            args = (items, *args[1:])
        elif isinstance(owner, str):
            _check_growth(name, owner, [*args, *kwargs.values()])
        return _budget(__context).value(super().call(__context, __obj, *args, **kwargs))


def _check_power(base: Any, exponent: Any) -> None:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(exponent, 0) > 4096:
        raise BudgetError("it makes a number of more than 4096 bits")


def bounded_source(environment: Environment, source: str) -> jinja2.Template:
    """Parse, rewrite so that work is counted, compile. Raises ``jinja2.TemplateSyntaxError``."""
    tree = environment.parse(source)
    _rewrite(tree)
    tree.set_environment(environment)
    code = environment.compile(tree, "chat_template", "chat_template")
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _rewrite(node: nodes.Node) -> None:
    """Put the counters in, bottom up."""
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_measured(item) for item in value])
        else:
            setattr(node, name, _measured(value))
    if isinstance(node, nodes.For):
        node.iter = _counted(node.iter, _PASSES)
    elif isinstance(node, nodes.Macro | nodes.CallBlock):
        node.body.insert(0, nodes.ExprStmt(_counted(nodes.Const(0), _CALL), lineno=node.lineno))


def _measured(field: Any) -> Any:
    """One field of a node, rewritten; what is no node (a name, an operator) stays as it is."""
    if not isinstance(field, nodes.Node):
        return field
    _rewrite(field)
    # The innermost filter of ``{% filter %}`` and ``{% set %}`` blocks has no operand: it gets the block's text.
    if isinstance(field, nodes.Filter) and field.node is None:
        return field
    displays = isinstance(field, nodes.List | nodes.Dict) or (
        isinstance(field, nodes.Tuple) and field.ctx == "load"
    )
    if displays or isinstance(field, nodes.Concat | nodes.Filter):
        return _counted(field, _VALUE)
    return field


def _counted(node: nodes.Node, counter: str) -> nodes.Filter:
    return nodes.Filter(node, counter, [], [], None, None, lineno=node.lineno)
