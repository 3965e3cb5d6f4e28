"""Rules by name: grammar, one spelling, messages that help."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from attn_jax.kernels import KERNELS, RESERVED
from attn_jax.rules import CONTENT, NEITHER, canonical, describe_rules, parameters_by_rule, parse

ALL = parameters_by_rule()

HEADS = 4


def only_factor(rule):
    (group,) = parse(rule, HEADS)
    (product,) = group.products
    (factor,) = product.factors
    return factor


@pytest.mark.parametrize("name", ALL)
def test_every_name_alone_has_its_documented_defaults(name):
    factor = only_factor(name)
    assert factor.name == name
    assert factor.parameters == {key: p.default for key, p in ALL[name].items()}
    assert canonical(name, HEADS) == name
    assert f"{name}: " in describe_rules()


def test_no_kernel_can_take_the_name_of_another_rule():
    assert set(RESERVED) == {*CONTENT, *NEITHER, "mix"}


def test_parameters_are_read():
    factor = only_factor("gaussian(width=2.5, offset=-1, trainable=True, reach=30)")
    assert factor.parameters == {"width": 2.5, "offset": -1, "trainable": True, "reach": 30}
    assert factor.trainable
    assert not only_factor("gaussian").trainable
    assert only_factor("table").trainable
    assert only_factor("t5").trainable


def test_product():
    (group,) = parse("learned * gaussian(width=4) * window(radius=8)", HEADS)
    (product,) = group.products
    assert product.content is not None
    assert product.content.name == "learned"
    assert [factor.name for factor in product.kernels] == ["gaussian", "window"]
    assert not product.sees_itself_only


def test_mix():
    (group,) = parse("mix(learned * window, gaussian(width=2))", HEADS)
    assert group.is_mix
    assert [str(product) for product in group.products] == [
        "learned * window",
        "gaussian(width=2)",
    ]


def test_head_groups_in_order():
    groups = parse("gaussian(offset=-1):1, gaussian(offset=1):1, mix(raw, self):2", HEADS)
    assert [group.num_heads for group in groups] == [1, 1, 2]
    assert [group.is_mix for group in groups] == [False, False, True]


def test_one_group_takes_all_heads():
    assert parse("learned", 8)[0].num_heads == 8
    assert parse("learned:8", 8) == parse("learned", 8)


def test_without_a_number_of_heads_the_rule_decides():
    assert [group.num_heads for group in parse("gaussian:3, learned:2")] == [3, 2]
    assert parse("learned")[0].num_heads == 1
    assert parse("gaussian(width=(1, 2), offset=(0, 1, 2))")[0].num_heads == 6


def test_tuples_have_an_entry_per_head_and_repeat():
    assert only_factor("gaussian(width=(1, 2, 4, 8))")["width"] == (1, 2, 4, 8)
    assert only_factor("gaussian(width=(1, 2))")["width"] == (1, 2, 1, 2)
    assert only_factor("gaussian(width=(3,))")["width"] == (3, 3, 3, 3)
    groups = parse("gaussian(width=(1, 2)):2, exponential(length=(5, 6)):2", HEADS)
    assert groups[1].products[0].factors[0]["length"] == (5, 6)


@pytest.mark.parametrize(
    "spelling",
    [
        "mix(learned*gaussian(width=2),gaussian(offset=-1)):3,learned:1",
        " mix ( learned * gaussian ( width = 2 ) , gaussian ( offset = -1 ) ) : 3 , learned : 1 ",
        "mix(learned() * gaussian(offset=0, width=2.0), gaussian(offset=-1)):3, learned:1",
    ],
)
def test_one_spelling(spelling):
    expected = "mix(learned * gaussian(width=2), gaussian(offset=-1)):3, learned:1"
    assert parse(spelling, HEADS) == parse(expected, HEADS)
    assert canonical(spelling, HEADS).replace("2.0", "2") == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("gausian", "did you mean 'gaussian'"),
        ("lerned:2, gaussian:2", "did you mean 'learned'"),
        ("learned * trianglar", "did you mean 'triangular'"),
        ("mix(learned, epanechnikow)", "did you mean 'epanechnikov'"),
        ("gaussian(widht=2)", "did you mean 'width'"),
        ("t5(bucket=2)", "did you mean 'buckets'"),
        ("qqq", "the names are learned, raw"),
        ("gaussian(zzz=2)", "the names are width, offset, trainable, reach"),
        ("uniform(width=2)", "it takes none"),
    ],
)
def test_unknown_names_get_the_nearest_or_all(rule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(rule, HEADS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "a rule is text such as"),
        ("  ", "a rule is text such as"),
        ("gaussian(width=2", "brackets"),
        ("gaussian)width=2(", "brackets"),
        ("gaussian(width=2) x", "expected ')'"),
        ("gaussian(2)", "key=value, got '2'"),
        ("gaussian(width=2, width=3)", "width twice"),
        ("gaussian(width=two)", "width=two is not a number"),
        ("gaussian(width='2')", "is not a number"),
        ("gaussian(width=)", "is not a number"),
        ("gaussian(width=())", "is not a number or a tuple"),
        ("gaussian(width=__import__('os').getpid())", "is not a number"),
        ("gaussian(width=0)", "width of gaussian must be a positive number, got 0"),
        ("gaussian(width=-1)", "must be a positive number, got -1"),
        ("gaussian(width=(1, -1))", "must be a positive number"),
        ("gaussian(width=True)", "must be a positive number"),
        ("gaussian(width=None)", "must be a positive number"),
        ("gaussian(width=1e999)", "must be a positive number"),
        ("gaussian(offset=1e999)", "offset of gaussian must be a finite number"),
        ("gaussian(trainable=1)", "trainable of gaussian must be True or False"),
        ("learned(key_width=2.5)", "key_width of learned must be"),
        ("window(reach=(1, 2))", "one value for all heads"),
        ("gaussian(width=(1, 2, 3))", "3 entries for 4 heads"),
        ("learned * raw", "content once, got learned * raw"),
        ("general * dot", "content once, got general * dot"),
        ("dot(key_width=4)", "it takes none"),
        ("generall", "did you mean 'general'"),
        ("mix(learned)", "mix takes two rules, got 1"),
        ("mix(learned, gaussian, raw)", "mix takes two rules, got 3"),
        ("learned, gaussian", "must be given as 'name:heads' and sum to 4"),
        ("learned:2, gaussian", "got [2, None]"),
        ("learned:2, gaussian:3", "sum to 4, got [2, 3]"),
        ("learned:3", "sum to 4, got [3]"),
        ("learned:0, gaussian:4", "positive integer"),
        ("learned:-4", "positive integer"),
        ("learned:2:2", "positive integer"),
        ("learned:\N{SUPERSCRIPT FOUR}", "positive integer"),
        ("learned,", "unknown rule ''"),
    ],
)
def test_misuse_says_what_is_wrong(rule, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(rule, HEADS)


def test_head_counts_are_needed_also_without_a_number_of_heads():
    with pytest.raises(ValueError, match="name:heads"):
        parse("learned, gaussian")


def _value(key, heads):
    """Texts of a parameter's values."""
    positive = st.one_of(st.integers(1, 99), st.floats(1e-6, 1e6)).map(repr)
    if key in ("trainable", "bidirectional"):
        return st.sampled_from(["True", "False"])
    if key in ("key_width", "size", "buckets", "max_distance"):
        return st.integers(1, 99).map(str)
    if key in ("reach", "step"):
        return positive
    number = positive if key != "offset" else st.floats(-1e6, 1e6).map(repr)
    lengths = [length for length in range(1, heads + 1) if heads % length == 0]
    rows = st.sampled_from(lengths).flatmap(lambda n: st.lists(number, min_size=n, max_size=n))
    return st.one_of(number, rows.map(lambda row: f"({', '.join(row)},)"))


@st.composite
def _factor(draw, names, heads):
    name = draw(st.sampled_from(sorted(names)))
    keys = draw(st.lists(st.sampled_from(sorted(ALL[name])), unique=True)) if ALL[name] else []
    arguments = [f"{key}={draw(_value(key, heads))}" for key in keys]
    return f"{name}({', '.join(arguments)})" if arguments else name


@st.composite
def _product(draw, heads):
    factors = [draw(_factor(set(ALL) - set(CONTENT), heads))]
    if draw(st.booleans()):
        factors[0] = draw(_factor(CONTENT, heads))
    factors += draw(st.lists(_factor(KERNELS, heads), max_size=2))
    return draw(st.sampled_from([" * ", "*"])).join(factors)


@st.composite
def rules(draw):
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    groups = []
    for heads in counts:
        term = draw(_product(heads))
        if draw(st.booleans()):
            term = f"mix({term}, {draw(_product(heads))})"
        groups.append(f"{term}:{heads}")
    return ", ".join(groups), sum(counts)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@example(("gaussian(width=1e-05, offset=-0.0):1", 1))
@given(rules())
def test_the_canonical_text_reads_as_the_same_rule(case):
    rule, heads = case
    text = canonical(rule, heads)
    assert parse(text, heads) == parse(rule, heads)
    assert canonical(text, heads) == text
    assert parse(rule) == parse(rule, heads)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text("learnd gausi(),:*=1.-mx", max_size=30))
def test_any_text_parses_or_is_a_value_error(text):
    try:
        groups = parse(text, HEADS)
    except ValueError:
        return
    assert sum(group.num_heads for group in groups) == HEADS
