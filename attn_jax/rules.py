"""Rules of attention by name: parsed here, once, into plain data.

Grammar, with blanks anywhere between tokens:

    rule   = group { "," group }              head groups, in the order of the heads
    group  = term [ ":" heads ]               a single group may leave out its number of heads
    term   = factor { "*" factor }            log-weights add
           | "mix(" term "," term ")"         a gate a head, g first + (1 - g) second
    factor = name [ "(" key "=" value, ... ")" ]
    value  = number | "True" | "False" | "None" | "(" number, ... ")"     a tuple: one for each head

`learned`, `raw`, `additive`, `dot`, `general` and `concat` look at content, `self` and `uniform` at
nothing, every other name is a kernel of the distance, see `attn_jax.kernels`. A product looks at
content once at most.
"""

import ast
import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attn_jax.kernels import KERNELS, Parameter, Value

_KEY_WIDTH = Parameter(
    None, "of queries, keys or the hidden layer; None: the head's width", "count"
)
CONTENT: Mapping[str, Mapping[str, Parameter]] = {
    "learned": {"key_width": _KEY_WIDTH},
    "raw": {},
    "additive": {"key_width": _KEY_WIDTH},
    "dot": {},
    "general": {},
    "concat": {"key_width": _KEY_WIDTH},
}
NEITHER: Mapping[str, Mapping[str, Parameter]] = {"self": {}, "uniform": {}}
_MEANINGS: Mapping[str, str] = {
    "learned": "products of learned queries and keys",
    "raw": "products of the normalised input itself, no query or key projection",
    "additive": "a hidden layer over query and key (Bahdanau)",
    "dot": "products of the inputs themselves, not scaled (Luong)",
    "general": "products through one learned matrix, not scaled (Luong)",
    "concat": "the same as additive, by the name that Luong gives it",
    "self": "every position sees itself only",
    "uniform": "the mean of all allowed values",
}


def parameters_by_rule() -> dict[str, Mapping[str, Parameter]]:
    """Every name that a rule may use, with its parameters."""
    kernels = {name: kernel.parameters for name, kernel in KERNELS.items()}
    return {**CONTENT, **NEITHER, **kernels}


@dataclasses.dataclass(frozen=True)
class Factor:
    """A name with all of its parameters, defaults filled in; tuples have one entry a head."""

    name: str
    arguments: tuple[tuple[str, Value], ...]

    @property
    def parameters(self) -> dict[str, Value]:
        """Every parameter by its name."""
        return dict(self.arguments)

    def __getitem__(self, parameter: str) -> Any:
        return self.parameters[parameter]

    @property
    def trainable(self) -> bool:
        """Whether the factor itself has parameters to learn (projections are not its own)."""
        free = self.name in KERNELS and KERNELS[self.name].free is not None
        return free or bool(self.parameters.get("trainable"))

    def __str__(self) -> str:
        """The name and those parameters that differ from their defaults."""
        defaults = parameters_by_rule()[self.name]
        changed = [
            f"{key}={value}"
            for key, value in self.parameters.items()
            if value != defaults[key].default
        ]
        return self.name + (f"({', '.join(changed)})" if changed else "")


@dataclasses.dataclass(frozen=True)
class Product:
    """Factors whose log-weights add; at most one looks at content."""

    factors: tuple[Factor, ...]

    @property
    def content(self) -> Factor | None:
        """The factor that looks at content, if there is one."""
        return next((factor for factor in self.factors if factor.name in CONTENT), None)

    @property
    def kernels(self) -> tuple[Factor, ...]:
        """The factors that look at the distance."""
        return tuple(factor for factor in self.factors if factor.name in KERNELS)

    @property
    def sees_itself_only(self) -> bool:
        """Whether a factor is `self`."""
        return any(factor.name == "self" for factor in self.factors)

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Heads that follow one rule: one product, or two that a gate mixes."""

    num_heads: int
    products: tuple[Product, ...]

    @property
    def is_mix(self) -> bool:
        """Whether a gate mixes two products."""
        return len(self.products) == 2

    def __str__(self) -> str:
        text = ", ".join(map(str, self.products))
        return f"mix({text})" if self.is_mix else text


def parse(rule: str, num_heads: int | None = None) -> tuple[HeadGroup, ...]:
    """Reads a rule for a number of heads.

    Args:
      rule: text in the grammar of this module, such as "gaussian(offset=-1):2, learned:6".
      num_heads: of the module that follows the rule; None: as the rule says, and where it says
        nothing the fewest that its tuples allow.

    Returns:
      Head groups whose numbers of heads sum to `num_heads`.

    Raises:
      ValueError: the text does not read as a rule, a name or parameter is unknown (the nearest is
        named), or numbers of heads do not fit.

    """
    if not isinstance(rule, str) or not rule.strip():
        raise ValueError(f"a rule is text such as 'learned * gaussian(width=4)', got {rule!r}")
    if num_heads is not None and (not isinstance(num_heads, int) or num_heads < 1):
        raise ValueError(f"num_heads must be a positive integer, got {num_heads!r}")
    groups = [_group(part, rule) for part in _split(rule, ",", rule)]
    if len(groups) == 1 and groups[0][0] is None:
        groups = [(_fewest(groups[0][1]) if num_heads is None else num_heads, groups[0][1])]
    counts = [count for count, _ in groups]
    if None in counts or num_heads not in (None, sum(filter(None, counts))):
        total = "" if num_heads is None else f" and sum to {num_heads}"
        raise ValueError(
            f"the head counts of {rule!r} must be given as 'name:heads'{total}, got {counts}"
        )
    return tuple(
        HeadGroup(count, tuple(_fit(product, count, rule) for product in products))
        for count, products in groups
        if count is not None
    )


def canonical(rule: str, num_heads: int) -> str:
    """The rule in one spelling: equal text means equal rules."""
    groups = parse(rule, num_heads)
    if len(groups) == 1:
        return str(groups[0])
    return ", ".join(f"{group}:{group.num_heads}" for group in groups)


def describe_rules() -> str:
    """Every name with its meaning, parameters and defaults, for help texts."""
    lines = []
    for name, parameters in parameters_by_rule().items():
        meaning = KERNELS[name].meaning if name in KERNELS else _MEANINGS[name]
        lines.append(f"{name}: {meaning}")
        lines += [f"    {key}={p.default}: {p.meaning}" for key, p in parameters.items()]
    return "\n".join(lines)


def _split(text: str, separator: str, rule: str) -> list[str]:
    """Parts between separators that stand outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == separator and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0:
        raise ValueError(f"the brackets of the rule {rule!r} do not match")
    return [part.strip() for part in parts]


def _fewest(products: Sequence[Product]) -> int:
    """The least number of heads that every tuple divides."""
    values = [v for p in products for factor in p.factors for v in factor.parameters.values()]
    return math.lcm(*[len(value) for value in values if isinstance(value, tuple)])


def _group(text: str, rule: str) -> tuple[int | None, tuple[Product, ...]]:
    term, *count = _split(text, ":", rule)
    if len(count) > 1 or any(not c.isdecimal() or int(c) == 0 for c in count):
        raise ValueError(f"a head count in {rule!r} must be a positive integer, got {text!r}")
    name, _, inside = term.partition("(")
    if name.strip() == "mix" and inside.endswith(")"):
        parts = _split(inside[:-1], ",", rule)
        if len(parts) != 2:
            raise ValueError(f"mix takes two rules, got {len(parts)} in {rule!r}")
        products = tuple(_product(part, rule) for part in parts)
    else:
        products = (_product(term, rule),)
    return (int(count[0]) if count else None), products


def _product(text: str, rule: str) -> Product:
    product = Product(tuple(_factor(part, rule) for part in _split(text, "*", rule)))
    content = [factor.name for factor in product.factors if factor.name in CONTENT]
    if len(content) > 1:
        raise ValueError(
            f"a product may look at content once, got {' * '.join(content)} in {rule!r}: "
            "give each its own heads, or mix them"
        )
    return product


def _factor(text: str, rule: str) -> Factor:
    name, bracket, inside = text.partition("(")
    name = name.strip()
    known = parameters_by_rule()
    if name not in known:
        raise ValueError(f"unknown rule {name!r} in {rule!r}{_nearest(name, known)}")
    if bracket and not inside.endswith(")"):
        raise ValueError(f"expected ')' at the end of {text!r} in the rule {rule!r}")
    given = _arguments(name, inside[:-1], rule) if bracket else {}
    defaults = {key: parameter.default for key, parameter in known[name].items()}
    return Factor(name, tuple({**defaults, **given}.items()))


def _arguments(name: str, text: str, rule: str) -> dict[str, Value]:
    given: dict[str, Value] = {}
    parameters = parameters_by_rule()[name]
    for part in filter(None, _split(text, ",", rule)):
        key, separator, value = (piece.strip() for piece in part.partition("="))
        if not separator:
            raise ValueError(
                f"parameters of {name} are written key=value, got {part!r} in {rule!r}"
            )
        if key not in parameters:
            unknown = f"{name} has no parameter {key!r} in the rule {rule!r}"
            raise ValueError(unknown + _nearest(key, parameters))
        if key in given:
            raise ValueError(f"{name} is given {key} twice in the rule {rule!r}")
        given[key] = _value(key, value, rule)
    return given


def _value(key: str, text: str, rule: str) -> Value:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{key}={text} is not a number in the rule {rule!r}") from error
    numbers = value if isinstance(value, tuple) else (value,)
    if not numbers or not all(n is None or isinstance(n, bool | int | float) for n in numbers):
        raise ValueError(f"{key}={text} is not a number or a tuple of numbers in {rule!r}")
    return value


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    if not known:
        return ": it takes none"
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    listed = ", ".join(known)
    return f": did you mean {near[0]!r}?" if near else f": the names are {listed}"


def _fit(product: Product, num_heads: int, rule: str) -> Product:
    """Repeats tuples to one entry a head and checks the range of every parameter."""
    factors = []
    for factor in product.factors:
        fitted = tuple(
            (key, _spread(factor.name, key, value, num_heads, rule))
            for key, value in factor.arguments
        )
        factors.append(Factor(factor.name, fitted))
        _check_trained(factors[-1], rule)
    return Product(tuple(factors))


def _spread(name: str, key: str, value: Value, num_heads: int, rule: str) -> Value:
    _check_range(name, key, value, rule)
    if not isinstance(value, tuple):
        return value
    if num_heads % len(value):
        raise ValueError(
            f"{key}={value} of {name} has {len(value)} entries for {num_heads} heads in {rule!r}: "
            "their number must divide the heads"
        )
    return value * (num_heads // len(value))


def _check_trained(factor: Factor, rule: str) -> None:
    """What is trained as its logarithm must have one."""
    trained = KERNELS[factor.name].trained if factor.name in KERNELS else None
    if trained is None or not factor["trainable"]:
        return
    value = factor[trained]
    if 0 in (value if isinstance(value, tuple) else (value,)):
        raise ValueError(f"a trainable {trained} must be positive, got {value!r} in {rule!r}")


_KINDS = {
    "positive": "a positive number",
    "at least 0": "a number of at least 0",
    "any": "a finite number",
    "count": "a positive integer",
    "flag": "True or False",
}


def _check_range(name: str, key: str, value: Value, rule: str) -> None:
    parameter = parameters_by_rule()[name][key]
    if isinstance(value, tuple) and not parameter.per_head:
        raise ValueError(f"{key} of {name} is one value for all heads, got {value} in {rule!r}")
    for number in value if isinstance(value, tuple) else (value,):
        if number is None and parameter.default is None:
            continue
        if not _is_of_kind(number, parameter.kind):
            raise ValueError(
                f"{key} of {name} must be {_KINDS[parameter.kind]}, got {value!r} in the rule "
                f"{rule!r}"
            )


def _is_of_kind(number: Value, kind: str) -> bool:
    if kind == "flag" or isinstance(number, bool):
        return kind == "flag" and isinstance(number, bool)
    if not isinstance(number, int | float) or not abs(number) < 1e300:
        return False
    if kind == "count":
        return isinstance(number, int) and number > 0
    return kind == "any" or number > 0 or (kind == "at least 0" and number == 0)
