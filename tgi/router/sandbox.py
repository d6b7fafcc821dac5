"""Jinja for templates that nobody vouches for: the dialect of transformers' chat templates, every step of it paid for.

A template is somebody's program, and no thread can be stopped from outside. So each run has a budget; whatever could
take long or grow large, in one step or by repetition, is paid for, and what no prompt needs is left out. Knows Jinja;
knows no conversation.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import datetime
from inspect import isgenerator, ismodule
from time import monotonic
from types import CodeType
from typing import Any

from jinja2 import Template, TemplateError, nodes, pass_context, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, do_join
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace, _PassArg
from jinja2.visitor import NodeTransformer
from markupsafe import EscapeFormatter, Markup, soft_str

STEP = 64
"""What a step costs: an iteration, a call, a filter. The unit is about what copying a few characters takes."""

ITEM = 16
"""What an element of a list or a mapping costs and weighs. A character's is 1."""

NOTE = 256
"""What it costs to remember a value and its weight until the run ends."""

CHECK = 1 << 14
"""How much is spent between looks at the clock."""

SECONDS = 3.0
"""The longest run. Its budget mostly ends it before."""

BUDGET = 16
"""The budget of a run, in values of the largest size."""

MAX_SOURCE = 1 << 18
"""Characters of a template. Known ones have up to 30,000."""

MAX_BITS = 1 << 14
"""Of an integer. Python prints none that has many more."""

MAX_INDENT = 64
"""Of JSON, in characters; also of what separates its parts."""

TERMS = 16
"""Of a sum that is paid for when it is made, not term by term."""

Cost = Callable[..., int]
"""Of a filter, a method or an operator, from its arguments: at least what the result may outgrow them by."""

_DICT_NAMES = frozenset(dir(dict))


class _Context(Context):
    environment: "Sandbox"


class ExhaustedError(Exception):
    """A run has spent its budget."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Compiles templates and runs them. Nothing that a template is given can change.

    ``largest``: the characters that a run may write. A value may not be larger either, each part of it counted as often
    as it occurs: in [[x, x], [x, x]] there are four x, and who prints or compares it meets them all. The budget is a
    multiple of it.
    """

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self, largest: int) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_printable
        )
        self.filters = {name: _priced(FILTERS[name], cost) for name, cost in _FILTERS.items()} | _OWN_FILTERS
        self.globals = {
            "cycler": Cycler,
            "dict": _Dict(),
            "joiner": Joiner,
            "namespace": _Namespace,
            "raise_exception": _raise,
            "range": self.globals["range"],
            "strftime_now": _strftime_now,
        }
        self._largest = largest
        self._left = self._check = BUDGET * largest
        self._deadline = float("inf")
        self._weights: dict[int, tuple[object, int]] = {}

    def read(self, source: str) -> nodes.Template:
        """The tree of a template. Raises TemplateError, or RecursionError, for what is none."""
        if len(source) > MAX_SOURCE:
            raise TemplateError(f"it has more than {MAX_SOURCE} characters")
        return self.parse(source)

    def build(self, tree: nodes.Template) -> CodeType:
        """A program for ``run``. Changes the tree."""
        return self.compile(_Meter().visit(tree))

    def run(self, program: CodeType, variables: dict[str, Any], *, budget: int | None = None) -> str:
        """What the program writes. Raises whatever goes wrong in it, and ExhaustedError if it does too much."""
        run = object.__new__(Sandbox)
        run.__dict__.update(self.__dict__)
        if budget is not None:
            run._left = run._check = budget
        run._deadline = monotonic() + SECONDS
        run._weights = {}
        template = Template.from_code(run, program, self.globals)
        size, pieces = 0, []
        for piece in template.root_render_func(template.new_context(variables)):
            size += len(piece)
            if size > self._largest:
                raise ExhaustedError
            pieces.append(piece)
        return "".join(pieces)

    # What a run pays for

    def spend(self, work: int) -> None:
        self._left -= work
        if self._left < self._check:
            self._check = max(0, self._left - CHECK)
            if self._left < 0 or monotonic() > self._deadline:
                raise ExhaustedError

    def made(self, value: Any) -> Any:
        """The value, which the run has made, paid for."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, list | tuple | dict):
            self.spend(NOTE)
            self.weigh(value)
        elif isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise ExhaustedError
        elif isgenerator(value):
            return self._each(value)
        return value

    def weigh(self, *values: object) -> int:
        """How much a walk over the values meets. Looks at each part once."""
        total = 0
        for value in values:
            if isinstance(value, str):
                total += len(value)
            elif not isinstance(value, list | tuple | dict):
                total += ITEM
            elif (known := self._weights.get(id(value))) is not None:
                total += known[1]
            else:
                self.spend(ITEM * len(value))
                weight = ITEM + self.weigh(*value)
                if isinstance(value, dict):
                    weight += self.weigh(*value.values())
                self._weights[id(value)] = value, weight  # what is kept alive keeps its id
                total += weight
        if total > self._largest:
            raise ExhaustedError
        return total

    def _each(self, values: Iterator[Any]) -> Iterator[Any]:
        for value in values:
            self.spend(STEP)
            yield self.made(value)

    # What Jinja calls

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Short cuts for what templates mostly look at, where Jinja tries and judges more than it must.
        kind = type(obj)
        if kind is dict and attribute not in _DICT_NAMES:
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)
        if kind in _PUBLIC and attribute in _PUBLIC[kind]:
            return getattr(obj, attribute)
        if kind is _Namespace and not attribute.startswith("_"):
            try:
                return getattr(obj, attribute)
            except AttributeError:
                return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.spend(_AMPLIFIERS[operator](self, left, right))
        return self.made(self.binop_table[operator](left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.spend(STEP)
        kwargs.pop("_loop_vars", None)  # for functions that take a context, of which there are none
        kwargs.pop("_block_vars", None)
        owner = getattr(__obj, "__self__", None)
        if owner is not None and not ismodule(owner):
            args = tuple(list(arg) if isgenerator(arg) else arg for arg in args)
            __self.spend(_method(owner, __obj.__name__)(owner, *args, **kwargs))
        # A macro finds them in a tuple and a mapping, two values that nothing else weighs.
        if args or kwargs:
            __self.weigh(*args, *kwargs.values())
        return __self.made(super().call(__context, __obj, *args, **kwargs))

    def call_test(self, name: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        self.spend(STEP)
        return super().call_test(name, value, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        if isinstance(text, Markup):
            formatter: _Formatter = _EscapeFormatter(self, escape=text.escape)
        else:
            formatter = _Formatter(self)
        if value.__name__ == "format":
            return lambda *args, **kwargs: type(text)(formatter.vformat(text, args, kwargs))
        return lambda mapping: type(text)(formatter.vformat(text, (), mapping))


class _Meter(NodeTransformer):
    """Puts payments where Jinja calls nothing of ours."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        written += sum(len(str(const.value)) for const in node.find_all(nodes.Const))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_paid(" step", nodes.Const(None), nodes.Const(STEP + written))))
        if node.test is not None:
            node.test = nodes.And(_paid(" step", nodes.Const(True)), node.test)
        return node

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        fixed = (nodes.Const, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair)
        return node if all(isinstance(n, fixed) for n in node.find_all(nodes.Node)) else _paid(" made", node)

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        return self.visit_List(node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _paid(" cut", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        # The sum of a few values is paid for as one.
        last: nodes.Add = node
        last.right = self.visit(last.right)
        for _ in range(TERMS - 2):
            if isinstance(last.left, nodes.Add):
                last = last.left
                last.right = self.visit(last.right)
        last.left = self.visit(last.left)
        counts = isinstance(node.right, nodes.Const) and not isinstance(node.right.value, str)
        return node if counts else _paid(" made", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        if len(node.nodes) > TERMS:
            node.nodes = [_paid(" made", term) for term in node.nodes]
        return _paid(" made", node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        # What is printed is paid for by ``_printable``.
        sums = (nodes.Add, nodes.Concat)
        node.nodes = [
            n.node if isinstance(n, nodes.Filter) and n.name == " made" and isinstance(n.node, sums) else n
            for n in node.nodes
        ]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        quick = isinstance(node.expr, nodes.Const) or all(isinstance(other.expr, nodes.Const) for other in node.ops)
        if quick and all(other.op in ("eq", "ne") for other in node.ops):
            return node
        return _paid(" step", node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        self.generic_visit(node)
        return _paid(" step", node) if node.args else node


def _paid(filter: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Filter(node, filter, list(args), [], None, None)


def _priced(filter: Callable[..., Any], cost: Cost) -> Callable[..., Any]:
    """One of Jinja's filters that pays for itself."""
    passes = _PassArg.from_obj(filter)

    # Who is passed the context is never called at compile time.
    @pass_context
    def pay_and_filter(context: _Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        run = context.environment
        run.spend(STEP if cost is _free else STEP + cost(value, *args, **kwargs))
        if passes is None:
            return run.made(filter(value, *args, **kwargs))
        if passes is _PassArg.eval_context:
            return run.made(filter(context.eval_ctx, value, *args, **kwargs))
        return run.made(filter(run if passes is _PassArg.environment else context, value, *args, **kwargs))

    return pay_and_filter


@pass_context
def _step(context: _Context, value: Any, cost: int = STEP) -> Any:
    context.environment.spend(cost)
    return value


@pass_context
def _made(context: _Context, value: Any) -> Any:
    return context.environment.made(value)


@pass_context
def _cut(context: _Context, value: Any) -> Any:
    """What is cut out of a value weighs no more than that."""
    if isinstance(value, str | list | tuple):
        context.environment.spend(len(value) * (1 if isinstance(value, str) else ITEM))
    return value


@pass_environment
def _printable(run: Sandbox, value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    run.spend(len(text))
    return text


@pass_context
def _join(context: _Context, value: Any, d: Any = "", attribute: str | int | None = None) -> Any:
    items, run = list(value), context.environment
    run.spend(STEP + ITEM * len(items) + len(items) * len(str(d)))
    return run.made(do_join(context.eval_ctx, items, d, attribute))


@pass_context
def _format(context: _Context, value: Any, *args: Any, **kwargs: Any) -> Any:
    if args and kwargs:
        raise TemplateError("format takes positional or keyword arguments, not both")
    return context.environment.call_binop(context, "%", soft_str(value), kwargs or args)


@pass_context
def _to_json(
    context: _Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's escapes for HTML."""
    run = context.environment
    run.spend(STEP)
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None and separators is None:
        text = encoder.encode(value)
        run.spend(len(text))
        return text
    if max(map(_width, (indent, *(separators or ())))) > MAX_INDENT:
        raise ExhaustedError
    return "".join(map(run.made, encoder.iterencode(value)))


_OWN_FILTERS = {" cut": _cut, " made": _made, " step": _step, "format": _format, "join": _join, "tojson": _to_json}


# Costs


def _free(*args: Any, **kwargs: Any) -> int:
    return 0


def _each_item(value: Any, *args: Any, **kwargs: Any) -> int:
    return ITEM * len(value) if isinstance(value, str | list | tuple | dict) else 0


def _width(value: Any) -> int:
    """Of a margin or a field: a number, or a text itself."""
    return abs(value) if isinstance(value, int) else len(str(value))


def _replaced(text: Any, old: Any, new: Any, count: Any = None) -> int:
    return str(text).count(str(old)) * len(str(new))


def _split(text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return ITEM * (text.count(sep) if sep else len(text) // 2)


def _sum(values: Any, attribute: Any = None, start: Any = 0) -> int:
    if not isinstance(start, int | float):
        raise TemplateError("sum adds numbers only")  # lists would be copied for each of them
    return _each_item(values)


def _product(run: Sandbox, left: Any, right: Any) -> int:
    if isinstance(left, int):
        left, right = right, left
    if isinstance(left, str | list | tuple) and isinstance(right, int):
        return max(0, right) * len(left) * (1 if isinstance(left, str) else ITEM)
    return 0


def _power(run: Sandbox, left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_BITS:
        raise ExhaustedError
    return 0


def _formatted(run: Sandbox, left: Any, right: Any) -> int:
    """printf's: fields as wide as they say, and as large as what is formatted, which several of them may name."""
    if not isinstance(left, str):
        return 0
    fields = left if "%(" in left else "".join(re.findall(r"%[-+# .*\d]*", left))
    width = sum(map(int, re.findall(r"\d+", fields)))
    if "*" in fields and isinstance(right, tuple):
        width += sum(abs(value) for value in right if isinstance(value, int))
    return width + left.count("%") * run.weigh(right)


_AMPLIFIERS: Mapping[str, Cost] = {"*": _product, "**": _power, "%": _formatted}

_FILTERS: Mapping[str, Cost] = {
    **dict.fromkeys(
        "abs attr capitalize count d default e escape filesizeformat first float forceescape int items last length "
        "lower safe string title trim truncate upper urlencode".split(),
        _free,
    ),
    **dict.fromkeys(
        "dictsort groupby list map max min random reject rejectattr reverse select selectattr sort unique "
        "wordcount".split(),
        _each_item,
    ),
    "batch": lambda value, linecount, fill_with=None: _width(linecount) * ITEM + _each_item(value),
    "center": lambda value, width=80: _width(width),
    "indent": lambda s, width=4, first=False, blank=False: (len(str(s).splitlines()) + 1) * _width(width),
    "replace": _replaced,
    "round": lambda value, precision=0, method="common": _width(precision) ** 2,
    "slice": lambda value, slices, fill_with=None: _width(slices) * ITEM + _each_item(value),
    "sum": _sum,
}
"""Jinja's filters but for some that are for HTML or for debugging, and slow."""


# Objects and functions that templates find


class _Generation(Extension):
    """``{% generation %}`` marks the model's own words for training; a prompt takes the body as it is."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """``namespace()`` without names that begin with an underscore: Python looks some of those up on its own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args  # ``self`` is a legal name in a namespace
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template can't set {name!r} on a namespace")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # it weighs nothing, so it may not show what it holds


class _Dict:
    """``dict`` without its unbound methods: ``dict.update(message, …)`` would change what the sandbox protects."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Formatter(SandboxedFormatter):
    """``str.format``, each field paid for."""

    _env: Sandbox

    def format_field(self, value: Any, format_spec: str) -> Any:
        self._env.spend(STEP + sum(map(int, re.findall(r"\d+", format_spec))))
        return self._env.made(super().format_field(value, format_spec))


class _EscapeFormatter(_Formatter, EscapeFormatter):
    pass


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    if len(format) > 256:
        raise TemplateError("strftime_now takes a short format")  # a directive may have a width
    return datetime.now().strftime(format)


_METHODS: Mapping[type, Mapping[str, Cost]] = {
    str: {
        **dict.fromkeys(
            "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier "
            "islower isnumeric isprintable isspace istitle isupper lower lstrip partition removeprefix removesuffix "
            "rfind rindex rpartition rstrip startswith strip swapcase title upper".split(),
            _free,
        ),
        **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda text, width, fill=" ": _width(width)),
        "expandtabs": lambda text, tabsize=8: text.count("\t") * _width(tabsize),
        "join": lambda text, items: len(items) * len(text),
        "replace": _replaced,
        "rsplit": _split,
        "split": _split,
        "splitlines": lambda text, keepends=False: ITEM * len(text) // 2,
    },
    dict: dict.fromkeys(("copy", "get", "items", "keys", "values"), _free),
    list: dict.fromkeys(("copy", "count", "index"), _free),
    tuple: dict.fromkeys(("count", "index"), _free),
    LoopContext: dict.fromkeys(("changed", "cycle"), _free),
    Cycler: dict.fromkeys(("next", "reset"), _free),
    _Dict: {"fromkeys": _free},
}
"""The methods that templates can call."""

_PUBLIC: Mapping[type, Collection[str]] = {
    str: _METHODS[str].keys(),
    LoopContext: [name for name in dir(LoopContext) if not name.startswith("_")],
}


def _method(owner: object, name: str) -> Cost:
    for type_, methods in _METHODS.items():
        if isinstance(owner, type_) and name in methods:
            return methods[name]
    raise SecurityError(f"a chat template can't call {name!r} of a {type(owner).__name__!r} object")
