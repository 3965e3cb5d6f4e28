"""The conformance kit: each check fails on a bug planted for it, and says so in a table."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import attn_jax
from attn_jax import Causal, Gaussian, Lengths, Local, Segments, testing
from attn_jax.ops import masks
from attn_jax.testing import peers
from attn_jax.testing.reference import Precision, Reference
from tests.ops import reference as loops

# Quickly compiled, where no rounding is at stake.
run = functools.partial(testing.run, optimize=False)
cases = functools.partial(testing.cases, optimize=False)


def attention(query, key, value, **arguments):
    return attn_jax.attention(query, key, value, implementation="dense", **arguments)


def weights(query, key, value, **arguments):
    arguments.pop("return_log_normalizer", None)
    return attn_jax.attention_weights(query, key, value, **arguments)


def empty(query, key, value, **arguments):
    """[B, T, N, 1] which queries have no key."""
    without_dropout = {k: v for k, v in arguments.items() if not k.startswith("dropout")}
    seen = weights(query, key, jnp.ones_like(value), **without_dropout)
    return jnp.swapaxes(~(seen != 0).any(-1), 1, 2)[..., None]


def mean(value, heads):
    mean = value.mean(1, keepdims=True)
    return jnp.repeat(mean, heads // value.shape[2], axis=2)


# Bugs


def mean_for_masked_rows(query, key, value, **arguments):
    """What masks of finfo.min instead of -inf give."""
    output = attention(query, key, value, **arguments)
    return jnp.where(
        empty(query, key, value, **arguments), mean(value, output.shape[2]), output
    ).astype(value.dtype)


def gradient_through_masked_rows(query, key, value, **arguments):
    output = attention(query, key, value, **arguments)
    through = mean(value, output.shape[2])
    through = through - jax.lax.stop_gradient(through)
    return output + jnp.where(empty(query, key, value, **arguments), through, 0)


def leaking(query, key, value, **arguments):
    """0 * NaN is NaN."""
    return attention(query, key, value, **arguments) + 0 * value.sum()


def deaf(query, key, value, **arguments):
    """NaN is swept away also for those who may see it."""
    key, value = (jnp.where(jnp.isfinite(x), x, 0) for x in (key, value))
    return attention(query, key, value, **arguments)


def first_block_only(query, key, value, **arguments):
    """The running maximum of an online softmax stays -inf: exp(-inf - -inf)."""
    output = attention(query, key, value, **arguments)
    lost = weights(query, key, value, **arguments)[..., :128].sum(-1) == 0
    late = value.shape[1] > 128
    return jnp.where(jnp.swapaxes(lost, 1, 2)[..., None] & late, jnp.nan, output)


def without_peak(query, key, value, **arguments):
    """exp of the logit itself overflows."""
    parts = [
        attention(query, key, x, **arguments, normalizer="none")
        for x in (value, jnp.ones_like(value))
    ]
    return parts[0] / parts[1]


def narrow_sums(query, key, value, **arguments):
    mixed = weights(query, key, value, **arguments).astype(value.dtype)

    def add(total, term):
        weight, value = term
        return total + jnp.swapaxes(weight, 1, 2)[..., None] * value[:, None], None

    terms = jnp.moveaxis(mixed, -1, 0), jnp.moveaxis(value, 1, 0)
    batch, heads, queries, _ = mixed.shape
    start = jnp.zeros((batch, queries, heads, value.shape[3]), value.dtype)
    return jax.lax.scan(add, start, terms)[0]


def always_float32(query, key, value, **arguments):
    return attention(query, key, value, **arguments).astype(jnp.float32).astype(value.dtype)


def whole_blocks(query, key, value, **arguments):
    """Keys beyond the last whole block of 64 are lost."""
    kept = value.shape[1] // 64 * 64 or value.shape[1]
    key = None if key is None else key[:, :kept]
    return attention(query, key, value[:, :kept], **arguments)


def top_left(query, key, value, **arguments):
    if np.ndim(arguments.get("query_positions")) == 0:
        arguments.pop("query_positions", None)
    return attention(query, key, value, **arguments)


def heads_in_turn(query, key, value, **arguments):
    """Head n reads key head n % K instead of n // (N / K)."""
    if query is None:
        return attention(query, key, value, **arguments)
    group = query.shape[2] // key.shape[2]
    key, value = (jnp.tile(x, (1, 1, group, 1)) for x in (key, value))
    return attention(query, key, value, **arguments)


def fixed_scale(query, key, value, **arguments):
    return attention(query, key, value, **{"scale": 64**-0.5, **arguments})


def one_width(query, key, value, **arguments):
    output = attention(query, key, value[..., : key.shape[3]], **arguments)
    missing = max(0, value.shape[3] - key.shape[3])
    return jnp.pad(output, ((0, 0), (0, 0), (0, 0), (0, missing)))


def bias_of_the_first_row(query, key, value, **arguments):
    """Its gradient is that of one query instead of the sum over all."""
    bias = arguments.pop("bias", None)
    if bias is not None:
        full = jnp.broadcast_to(bias, (*bias.shape[:2], query.shape[1], bias.shape[3]))
        first = jnp.arange(query.shape[1]).reshape(1, 1, -1, 1) == 0
        arguments["bias"] = jnp.where(first, full, jax.lax.stop_gradient(full))
    return attention(query, key, value, **arguments)


def frozen(name):
    """An argument that gets no gradient."""

    def attend(query, key, value, **arguments):
        if name in arguments:
            arguments[name] = jax.tree.map(jax.lax.stop_gradient, arguments[name])
        return attention(query, key, value, **arguments)

    return attend


def only_the_first_mask(query, key, value, **arguments):
    if isinstance(arguments.get("mask"), masks.Both):
        arguments["mask"] = arguments["mask"].first
    return attention(query, key, value, **arguments)


def deaf_to(kind):
    """A mask that is not applied."""

    def attend(query, key, value, **arguments):
        if isinstance(arguments.get("mask"), kind):
            arguments["mask"] = None
        return attention(query, key, value, **arguments)

    return attend


def another_without_jit(query, key, value, **arguments):
    output = attention(query, key, value, **arguments)
    return output if isinstance(value, jax.core.Tracer) else 1.01 * output


class Counting:
    """Every trace gives another result."""

    def __init__(self):
        self.traces = itertools.count()

    def __call__(self, query, key, value, **arguments):
        return attention(query, key, value, **arguments) * (1 + next(self.traces) / 8)


@jax.custom_batching.custom_vmap
def first_lane(x):
    return x


@first_lane.def_vmap
def _first_lane(size, batched, x):
    del size, batched
    return jnp.broadcast_to(x[:1], x.shape), True


def lanes_mixed(query, key, value, **arguments):
    return first_lane(attention(query, key, value, **arguments))


@jax.custom_vjp
def gradients_of_the_first_lane(x):
    return x


gradients_of_the_first_lane.defvjp(lambda x: (x, None), lambda _, g: (first_lane(g),))


def gradient_lanes_mixed(query, key, value, **arguments):
    return gradients_of_the_first_lane(attention(query, key, value, **arguments))


@jax.custom_jvp
def steep(x):
    return x


steep.defjvp(lambda primals, tangents: (primals[0], 1.01 * tangents[0]))


@jax.custom_jvp
def bent(x):
    """Right to first order only."""
    return x


@bent.defjvp
def _bent(primals, tangents):
    (x,), (t,) = primals, tangents
    return x, t * (1 + x - jax.lax.stop_gradient(x))


def of_output(change):
    def attend(query, key, value, **arguments):
        return change(attention(query, key, value, **arguments))

    return attend


def of_log_normalizer(change):
    def attend(query, key, value, **arguments):
        result = attention(query, key, value, **arguments)
        if not arguments.get("return_log_normalizer"):
            return result
        return result[0], change(result[1])

    return attend


class Drifting:
    """Every run gives another result."""

    def __init__(self):
        self.runs = itertools.count()

    def __call__(self, query, key, value, **arguments):
        output = attention(query, key, value, **arguments)
        drift = jax.pure_callback(
            lambda: np.float32(next(self.runs) * 1e-5), jax.ShapeDtypeStruct((), jnp.float32)
        )
        return output + drift


def concrete(query, key, value, **arguments):
    kernel = arguments.get("proximity")
    assert kernel is None or all(bool(jnp.all(leaf > -9)) for leaf in jax.tree.leaves(kernel))
    return attention(query, key, value, **arguments)


def one_query_is_the_first(query, key, value, **arguments):
    """Causal by indices: a decoding step sees the first key only."""
    if (value if query is None else query).shape[1] < 9 or np.shape(
        arguments.get("query_positions")
    ) == (1,):
        arguments.pop("query_positions", None)
    return attention(query, key, value, **arguments)


def open_window(query, key, value, **arguments):
    mask = arguments.get("mask")
    if isinstance(mask, Local):
        arguments["mask"] = Local(mask.before, mask.after + 1)
    return attention(query, key, value, **arguments)


def width_changed(change):
    def attend(query, key, value, **arguments):
        kernel = arguments.get("proximity")
        if isinstance(kernel, Gaussian):
            arguments["proximity"] = dataclasses.replace(kernel, width=change(kernel.width))
        return attention(query, key, value, **arguments)

    return attend


def softmax_only(query, key, value, **arguments):
    return attention(query, key, value, **{**arguments, "normalizer": "softmax"})


def without(name):
    def attend(query, key, value, **arguments):
        arguments.pop(name, None)
        return attention(query, key, value, **arguments)

    return attend


def other_bits(query, key, value, **arguments):
    if "dropout_key" in arguments:
        arguments["dropout_key"] = jax.random.fold_in(arguments["dropout_key"], 1)
    return attention(query, key, value, **arguments)


# The bug that each check must see, and the dtype that it shows in.
BUGS = {
    "no keys: zero": (mean_for_masked_rows, "float32"),
    "no keys: no gradient": (gradient_through_masked_rows, "float32"),
    "no keys: no tangent": (gradient_through_masked_rows, "float32"),
    "-inf: zero": (mean_for_masked_rows, "float32"),
    "-inf: no gradient": (gradient_through_masked_rows, "float32"),
    "masked NaN": (leaking, "float32"),
    "masked NaN: tangents": (leaking, "float32"),
    "seen NaN": (deaf, "float32"),
    "late keys": (first_block_only, "float32"),
    "extreme logits": (without_peak, "float32"),
    "wide sums": (narrow_sums, "bfloat16"),
    "dtype": (always_float32, "float64"),
    "any lengths": (whole_blocks, "float32"),
    "positions": (top_left, "float32"),
    "shared heads": (heads_in_turn, "float32"),
    "any width": (fixed_scale, "float32"),
    "two widths": (one_width, "float32"),
    "bias": (bias_of_the_first_row, "float32"),
    "scale": (frozen("scale"), "float32"),
    "learned kernels": (frozen("proximity"), "float32"),
    "masks together": (only_the_first_mask, "float32"),
    "window alone": (deaf_to(Local), "float32"),
    "jit, grad, remat": (another_without_jit, "float32"),
    "scan": (Counting(), "float32"),
    "vmap": (lanes_mixed, "float32"),
    "vmap of grad": (gradient_lanes_mixed, "float32"),
    "jvp": (of_output(steep), "float32"),
    "jvp of grad": (of_output(bent), "float32"),
    "grad of grad": (of_output(bent), "float32"),
    "check_grads": (of_output(bent), "float64"),
    "repeats": (Drifting(), "float32"),
    "no new trace": (concrete, "float32"),
    "log-normaliser": (of_log_normalizer(lambda x: x.astype(jnp.bfloat16)), "float32"),
    "log-normaliser: gradient": (of_log_normalizer(jax.lax.stop_gradient), "float32"),
    "merge": (of_log_normalizer(jax.lax.stop_gradient), "float32"),
    "decoding": (one_query_is_the_first, "float32"),
    "prefill": (one_query_is_the_first, "float32"),
    "windows": (open_window, "float32"),
    "distance alone": (width_changed(lambda width: np.multiply(1.001, width)), "float32"),
    "constants": (of_output(lambda x: x * (1 + 1e-5)), "float32"),
    "limits": (width_changed(lambda width: jnp.maximum(width, 0.5)), "float32"),
    "segments": (deaf_to(Segments), "float32"),
    "normalisers": (softmax_only, "float32"),
    "score": (without("score"), "float32"),
    "dropout": (testing.Subject("other bits", other_bits, ours=True), "float32"),
    "any combination": (deaf_to(masks.Mask), "float32"),
}


def fails(case):
    try:
        case.case(case.trial)
    except testing.NotSupported:
        return False
    except (AssertionError, jax.errors.ConcretizationTypeError):
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("check", [check.name for check in testing.checks()])
def test_each_check_fails_on_the_bug_planted_for_it(check):
    function, dtype = BUGS[check]
    assert any(fails(case) for case in cases(function, dtypes=[dtype], only=[check]))


def test_every_point_of_the_list_is_checked():
    assert {check.number for check in testing.checks()} == set(range(1, 21))
    names = [check.name for check in testing.checks()]
    assert len(names) == len(set(names))


# The report


@pytest.mark.slow
def test_a_failure_is_told_with_its_smallest_example():
    report = run(mean_for_masked_rows, only=["no keys: zero"])
    smallest = next(outcome for outcome in report.failures if outcome.case == "mask")
    assert smallest.expected == "0"
    assert float(smallest.got) != 0
    assert smallest.example == (
        "attention(query float32[1, 2, 1, 1], key float32[1, 2, 1, 1], value float32[1, 2, 1, 1], "
        "mask=jnp[[[[False], [True]]]])"
    )
    with pytest.raises(AssertionError, match=r"output at \[0, 0, 0, 0\]: expected 0, got"):
        next(iter(cases(mean_for_masked_rows, only=[1])))()


@pytest.mark.slow
def test_the_table_says_what_holds_fails_and_is_not_supported():
    def masked(query, key, value, *, mask=None):
        return mean_for_masked_rows(query, key, value, mask=mask)

    subject = testing.Subject("mine", masked, version="1.2")
    report = run(subject, only=["no keys: zero", "two widths", "score"])
    table = report.table().splitlines()
    assert table[:7] == [
        "mine 1.2: 3 hold, 5 fail, 0 differ, 5 not supported",
        "",
        "| | check | dtype | outcome |",
        "| ---: | --- | --- | --- |",
        "| 1 | no keys: zero | float32 | fails (5 of 5, 3 not supported) |",
        "| 7 | two widths | float32 | holds (3) |",
        "| 18 | score | float32 | not supported |",
    ]
    assert table[8].startswith("- 1 no keys: zero, float32, mask: output at [0, 0, 0, 0]: expected")
    assert json.loads(json.dumps(report.to_json()))["version"] == "1.2"
    compared = testing.comparison([report, run(attention, only=["two widths"])])
    assert "| 7 | two widths | holds 3 | holds 3 |" in compared
    assert "| 1 | no keys: zero | **fails** 5 of 5 |  |" in compared


@pytest.mark.slow
def test_a_convention_chosen_on_purpose_differs():
    subject = testing.Subject(
        "mine", mean_for_masked_rows, differs={"no keys: zero": "it gives the mean, see its manual"}
    )
    report = run(subject, only=["no keys: zero"])
    assert not report.failures
    assert report.rows()[0].status == "differs"
    assert "it gives the mean, see its manual. output at" in report.table()
    with pytest.raises(testing.NotSupported, match="see its manual"):
        cases(subject, only=["no keys: zero"])[0]()


def test_an_error_is_a_failure_and_no_stop():
    def broken(query, key, value, **arguments):
        raise RuntimeError("no such kernel\non this machine")

    report = run(broken, only=["two widths"])
    assert [outcome.detail for outcome in report.failures] == [
        "raised RuntimeError: no such kernel"
    ] * 3


@pytest.mark.slow
def test_assert_conforms():
    testing.assert_conforms(attention, only=["two widths"], dtypes=["float64"])
    with pytest.raises(AssertionError, match="fails"):
        testing.assert_conforms(heads_in_turn, only=["shared heads"])


def test_an_unknown_check_is_named():
    with pytest.raises(ValueError, match=r"There is no check 'masks'\. Checks are named: no keys"):
        run(attention, only=["masks"])


@pytest.mark.slow
def test_hypothesis_shrinks_to_a_small_example():
    report = run(deaf_to(masks.Mask), only=["any combination"], examples=5)
    assert report.failures
    assert report.failures[0].size <= 20


# The reference


def normal(example, shape, seed=1):
    del example
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("normalizer", attn_jax.ops.normalizers.NORMALIZERS)
def test_the_reference_differentiates_itself(normalizer):
    """Gradients and tangents are central differences of its own values, in float64."""
    sizes = testing.Sizes(1, 3, 5, 2, 1, 2, 2)
    example = testing.draw(
        sizes,
        np.float64,
        bias=normal(None, (1, 2, 1, 5), 3),
        scale=np.asarray([0.5, 2.0]),
        proximity=Gaussian(np.asarray([1.0, 3.0]), np.asarray(0.3)),
        mask=Causal() | Lengths(key=2),
        normalizer=normalizer,
    )
    precision = Precision(1e-16, 1e-16)
    reference = Reference(example, precision)
    cotangent = normal(example, example.output_shape, 2)
    names = ("query", "key", "value", "bias")
    gradients = reference.pull(cotangent, names)
    for seed, name in enumerate(names):
        array = getattr(example, name, None)
        array = example.arguments["bias"] if array is None else array
        direction = normal(example, array.shape, seed + 5)
        above, below = (
            Reference(example.changed(**{name: array + h * direction}), precision).output.value
            for h in (1e-6, -1e-6)
        )
        difference = (above - below) / 2e-6
        np.testing.assert_allclose(reference.push({name: direction}).value, difference, atol=1e-8)
        inner = (gradients[name].value * direction).sum()
        np.testing.assert_allclose(inner, (cotangent * difference).sum(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("normalizer", attn_jax.ops.normalizers.NORMALIZERS)
def test_the_reference_is_its_loop(normalizer):
    """The other reference of these tests, one query and key after the other."""
    length = np.asarray([3, 9]).reshape(2, 1, 1, 1)
    example = testing.draw(
        testing.Sizes(heads=4),
        np.float64,
        proximity=Gaussian(2.0, -1.0),
        mask=Causal() & Lengths(key=length.ravel()),
        normalizer=normalizer,
    )
    reference = Reference(example, Precision(1e-16, 1e-16))
    allowed = np.broadcast_to(np.tri(6, 9, dtype=bool) & (np.arange(9) < length), (2, 4, 6, 9))
    output, expected = loops.attention(
        example.query,
        example.key,
        example.value,
        log_weight=lambda n, r: -(((r + 1) / 2) ** 2) / 2,
        allowed=allowed,
        normalizer=normalizer,
    )
    np.testing.assert_allclose(reference.weights, expected, atol=1e-14)
    np.testing.assert_allclose(reference.output.value, output, atol=1e-13)


def test_rounding_explains_no_more_than_a_few_roundings():
    """Weights sum to one: the error is about eps times values and logits, both of order one."""
    example = testing.draw(testing.Sizes(), np.float32)
    eps = float(np.finfo(np.float32).eps)
    error = Reference(example, Precision(eps, eps)).output.error
    assert np.all(error > eps)
    assert np.all(error < 40 * eps)


# Other libraries


def some(name, **options):
    with jax.numpy_rank_promotion("allow"):
        return run(peers.get(name), examples=0, **options)


PEERS = {
    "jax.nn": {"no keys: zero": "differs", "masked NaN": "fails", "bias": "holds"},
    "flax.linen": {"no keys: zero": "differs"},
    "flax.nnx": {"no keys: zero": "differs", "masks together": "holds"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_peers_hold_where_they_mean_the_same_and_differ_where_they_say(name):
    pytest.importorskip("flax")
    report = some(name, only=list(PEERS[name]))
    assert {row.check: row.status for row in report.rows()} == PEERS[name]


@pytest.mark.slow
def test_torch_is_asked_through_its_own_derivatives():
    pytest.importorskip("torch")
    report = some("torch", only=["no keys: no gradient", "vmap"])
    status = {row.check: row.status for row in report.rows()}
    assert status == {"no keys: no gradient": "holds", "vmap": "not supported"}


def test_an_absent_peer_says_why(monkeypatch):
    monkeypatch.setitem(peers._PEERS, "torch", lambda: __import__("no_such_module"))
    with pytest.raises(peers.Absent, match="torch is left out: No module named 'no_such_module'"):
        peers.get("torch")
    with pytest.raises(ValueError, match=r"A peer must be one of jax\.nn"):
        peers.get("torsh")


@pytest.mark.slow
def test_a_function_of_dense_arrays():
    def dense(query, key, value, bias=None, mask=None):
        assert mask is None or mask.dtype == bool
        return attention(query, key, value, bias=bias, mask=mask)

    report = run(testing.from_dense(dense), only=["masks together", "scale"])
    status = {row.check: row.status for row in report.rows()}
    assert status == {"scale": "not supported", "masks together": "holds"}


# The documentation

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "conformance.md"


def test_the_page_states_every_demand():
    rows = [f"| {c.number} | {c.name} | {c.demand} |" for c in testing.checks()]
    assert [row for row in PAGE.read_text().splitlines() if row in rows] == rows


@pytest.mark.slow
def test_the_example_of_the_page_runs(capsys):
    example = re.search(r"runs as it is:\n\n```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example
    exec(compile(example[1], str(PAGE), "exec"), {})
    table = capsys.readouterr().out
    assert "| 1 | no keys: zero | float32 | fails" in table
    assert "| 9 | masks together | float32 | holds" in table
