"""Sums of losses: operators, values, logs, files."""

import contextlib
import copy
import functools
import gc
import json
import operator
import pickle
import sys
import weakref

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers, ops
from keras.src.losses.losses import LossFunctionWrapper
from keras.src.saving.serialization_lib import ObjectSharingScope

import kinds
import losses
import sums
from helpers import (
    BACKEND,
    KERAS,
    TESTS,
    attached,
    each_writer,
    fixed,
    linear_model,
    logs_of,
    predictions,
    run_python,
    to_float,
    value_and_gradient,
)
from lossargs import (
    ArgumentError,
    AttachError,
    BatchError,
    LossArgs,
    SavingError,
    attach,
    live_args,
    with_args,
)  # fmt: skip
from sums import mae, masked, mse, total

each = pytest.mark.parametrize
fit = pytest.mark.fit
ZEROS, ONES = np.zeros((4, 2), "float32"), np.ones((4, 2), "float32")  # mse 1, mae 1
TWO, INTEGER = fixed(2.0, "two"), fixed(3, "n", dtype="int32")
HALF = keras.optimizers.schedules.PolynomialDecay(0.5, 10, 1.0)
COUNTDOWN = kinds.Countdown(3.0)


# ---- Operators ----


@each(
    ("make", "text", "value"),
    [
        (lambda: mse() - mae(scale=3), "mse() - mae(scale=3)", -2),
        (lambda: -mse(), "-mse()", -1),
        (lambda: -(mse() - 2 * mae()), "-mse() + 2 * mae()", 1),
        (lambda: mse() / 4, "0.25 * mse()", 0.25),
        (lambda: 0 * mse() + mae(), "0 * mse() + mae()", 1),
        (lambda: 10 - mse(), "-mse() + 10", 9),
        (lambda: 2 * (mse() + 10 - 3), "2 * mse() + 20 - 6", 16),
        (lambda: sum([mse() + mae(), 5, mse() - 2]), "mse() + mae() + mse() + 5 - 2", 6),
        (lambda: np.float32(0.5) * mse(), "0.5 * mse()", 0.5),
        (lambda: np.float64(2) - mse() * np.int64(3), "-3 * mse() + 2.0", -1),
        (lambda: np.array(0.5) * mse() + np.array(1), "0.5 * mse() + 1", 1.5),
        (lambda: mse() * ops.convert_to_tensor(0.5), "0.5 * mse()", 0.5),
        (lambda: mse() * 10**12, "1000000000000 * mse()", 1e12),
        (lambda: mae() + keras.losses.Huber(2.0), "mae() + Huber(delta=2.0)", 1.5),
        (lambda: keras.losses.Huber(name="h") - mae(), "Huber(name='h') - mae()", -0.5),
        (lambda: mse.options(name="a")() + mae.options(reduction="sum")(),
         "mse.options(name='a')() + mae.options(reduction='sum')()", 5),
        (lambda: HALF * mse(), "mse() * <PolynomialDecay>", 0.5),
        (lambda: mse() / TWO, "mse() / <variable 'two'>", 0.5),
        (lambda: 3 * (mse() - mae() / 2) * HALF / TWO + 10,
         ("3 * mse() * <PolynomialDecay> / <variable 'two'> "
         "- 1.5 * mae() * <PolynomialDecay> / <variable 'two'> + 10"), 10.375),
        (lambda: (mse() + 10) * TWO, "mse() * <variable 'two'> + 10 * <variable 'two'>", 22),
        (lambda: mse() * COUNTDOWN + mae(), "mse() * <Countdown> + mae()", 4),
        (lambda: mse() * INTEGER / TWO, "mse() * <variable 'n'> / <variable 'two'>", 1.5),
    ],
)  # fmt: skip
def test_operators(make, text, value):
    """Equal sums are one object, shown as their code. Live weights need an attached model."""
    loss = make()
    assert repr(loss) == text
    assert make() is loss
    assert hash(make()) == hash(loss)
    if loss.live_names:
        with pytest.raises(AttachError, match=r"live arguments .* attach\(model, loss\)"):
            loss(ZEROS, ONES)
    else:
        assert copy.deepcopy(loss) is loss
        assert to_float(loss(ZEROS, ONES)) == pytest.approx(value, rel=1e-6)
    layer = LossArgs(loss)
    assert to_float(loss(ZEROS, layer(ops.convert_to_tensor(ONES)))) == pytest.approx(value)


def test_what_is_no_sum_is_the_loss_itself():
    loss = mse()
    for same in (loss + 0, 0.0 + loss, loss * 1, loss / 1, -1 * -loss, sum([loss]), loss * 4 / 4):
        assert same is loss


def traced():
    """A tensor of a step that is being traced, or what stands for one."""
    if BACKEND == "jax":
        import jax

        return jax.jit(lambda weight: (mse() * weight)(ZEROS, ONES))(1.0)
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return mse() * tf.Variable(1.0)
    import torch

    return mse() * torch.ones((), requires_grad=True)


@each(
    ("make", "message"),
    [
        (lambda: mse() * mae(), r"Cannot compute loss \* mae\(\). A weight is a number, a scalar"),
        (lambda: mse() * "a", r"Cannot compute loss \* 'a'"),
        (lambda: [1.0] * mse(), r"loss \* \[1.0\]"),
        (lambda: mse() / [1.0], r"Cannot compute loss / \[1.0\]"),
        (lambda: mse() * np.ones(2), "For a weight per sample, write a function"),
        (lambda: mse() * keras.Variable([1.0, 2.0]), "a scalar keras.Variable"),
        (lambda: mse() * keras.Input((3,)), "symbolic tensor .* write a function"),
        (lambda: mse() * True, "loss . True"),
        (lambda: mse() * None, "loss . None"),
        (lambda: mse() * 1j, "loss . 1j"),
        (lambda: mse() * keras.losses.Huber(), r"loss \* .*huber"),
        (lambda: mse() + "mae", "Cannot add 'mae' to a loss. Terms are losses and numbers"),
        (lambda: [mse()] + mae(), "Cannot add .* to a loss"),  # noqa: RUF005
        (lambda: mse() + None, "Cannot add None"),
        (lambda: True - mse(), "Cannot add True"),
        (lambda: mse() - 1j, "Cannot add 1j"),
        (lambda: mse() * keras.layers.Dense(1), r"Cannot compute loss \* <Dense"),
        (lambda: mse() / keras.random.SeedGenerator(1), "Cannot compute loss / <SeedGenerator"),
        (lambda: mse() + TWO, "Cannot add <variable 'two'>.*def f"),
        (lambda: mse() + mae, "Cannot add <loss factory mae.* Call a factory"),
        (lambda: mse() + keras.losses.mean_squared_error, r"with_args\(function\)\(\)"),
        (lambda: mse() + np.ones(2), r"Cannot add array\(\[1.0, 1.0\]"),
        (lambda: TWO * mse(), r"write loss \* variable"),
        (lambda: TWO + mse(), "is a loss, not a number"),
        (lambda: mse() + type("Own", (keras.losses.Loss,), {"__call__": len})(), "defines `__call"),
        (lambda: (mse() + mae()).replace(power=3), "No term of mse.. . mae.. takes 'power'"),
        (lambda: (mse() + mae())(ZEROS, ONES, scale=1, shift=3),
         r"mse\(\) \+ mae\(\) has no argument 'shift'\. It takes 'scale'"),
        (lambda: (mse() + 2 * masked())(ZEROS, ONES), "masked needs a value for 'mask'"),
        pytest.param(traced, "current value would be baked|step that is being traced",
                     marks=pytest.mark.skipif(BACKEND == "numpy", reason="traces nothing")),
    ],
)  # fmt: skip
def test_wrong_operators_and_calls(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_errors_of_other_classes():
    with pytest.raises(AttributeError, match=r"Cannot change 'name' of .* Write the loss again\."):
        (mse() + mae()).name = "other"
    with pytest.raises(BatchError, match="'msk', which mse.* does not take. It takes 'mask'. Did"):
        (mse() + masked() * 2)(ZEROS, ONES, {"msk": ONES})
    with pytest.raises(BatchError, match="total returned one number for the whole batch, and was"):
        (mse() + total())(ZEROS, ONES, np.ones(4))


def test_replace_and_call_arguments_reach_the_terms_that_take_them():
    loss = 2 * mae() + mse() * TWO - losses.flexible(a=1)
    text = "2 * mae(scale=5) + mse() * <variable 'two'> - flexible(a=1, scale=5)"
    assert repr(loss.replace(scale=5)) == text
    loss = mae() + 10 * masked() + mse()
    assert to_float(loss(ZEROS, ONES, scale=5, mask=np.ones(2))) == 16
    assert to_float(loss(ZEROS, ONES, {"scale": np.full(4, 3.0), "mask": np.zeros((4, 2))})) == 4


# ---- Values ----

TERMS = {
    "mse": (mse, {}),
    "mae": (mae, {}),
    "scaled": (mae, {"scale": 3.0}),
    "masked": (masked, {}),
    "total": (total, {}),
}
LIVE = {"two": (TWO, 2.0), "half": (HALF, 0.5), "trained": (keras.Variable(-1.5), -1.5)}


def node(kind, *values):
    return st.tuples(st.just(kind), *values)


reductions = st.sampled_from(["sum_over_batch_size", "sum", "mean_with_sample_weight"])
term = node("term", st.sampled_from(list(TERMS)), reductions)
plain = node("plain", st.sampled_from([0.5, 1.0, 2.0]), reductions)
values = st.integers(-5, 5) | st.floats(-3, 3).map(lambda value: round(value, 2))
number = node("number", values | values.map(np.float32) | values.map(np.array))
divisor = number.map(lambda one: one if abs(one[1]) > 0.1 else ("number", 0.25))
live = node("live", st.sampled_from(list(LIVE)))
trees = st.recursive(
    term | node("+", term, plain) | node("-", plain, term),
    lambda tree: (
        st.tuples(st.sampled_from("+-"), tree, tree | number | plain)
        | st.tuples(st.sampled_from("+-"), number | plain, tree)
        | node("*", tree, number | live)
        | node("*", number | node("live", st.just("half")), tree)
        | node("/", tree, divisor | live)
        | node("negated", tree)
        | st.lists(tree, min_size=1, max_size=3).map(lambda some: ("sum", *some))
    ),
    max_leaves=6,
)
OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
    "negated": operator.neg, "sum": lambda *parts: sum(parts),
}  # fmt: skip
# Of absolute values, a bound of the rounding errors.
LARGEST = {**OPERATORS, "-": operator.add, "negated": operator.pos}


def computed(tree, leaf, operators=OPERATORS):
    """The value of an expression; `leaf` returns what a part of it represents."""
    kind, *parts = tree
    if kind not in operators:
        return leaf(kind, *parts)
    return operators[kind](*(computed(part, leaf, operators) for part in parts))


RNG = np.random.default_rng(0)
X, Y, MASK = RNG.normal(size=(3, 4, 3, 2)).astype("float32")
X[1, 2] = X[3, 1:] = 0  # steps that are masked
WEIGHTS = [None, None, np.array([[0.5], [0], [2], [1]], "float32"), RNG.random((4, 3), "float32")]


@fit
@pytest.mark.properties
@settings(max_examples=settings().max_examples // 2)  # the slowest test of this file
@given(trees, st.sampled_from(WEIGHTS), st.booleans(), st.booleans())
def test_generated_sum_equals_the_sum_by_hand(tree, weight, is_masked, is_vector):
    """With sample weights, masks of the model, and the batch entry of a term."""

    def bound(kind, what, reduction=None):
        reduction = None if is_vector else reduction
        if kind == "term":
            factory, args = TERMS[what]
            return factory.options(name=f"{what}_{reduction}", reduction=reduction)(**args)
        if kind == "plain":
            return keras.losses.Huber(what, reduction, f"huber_{what}_{reduction}")
        return LIVE[what][0] if kind == "live" else what

    def by_hand(kind, what, reduction=None):
        if kind in ("number", "live"):
            return LIVE[what][1] if kind == "live" else float(what)
        factory, args = TERMS.get(what, (None, {"delta": what}))
        args = {"mask": MASK} if what == "masked" else args
        function = keras.losses.huber if kind == "plain" else factory.__wrapped__
        loss = LossFunctionWrapper(function, None if is_vector else reduction, **args)
        return loss(Y, y_pred, weight)

    def ours(x):
        loss = computed(tree, bound)
        # As tensors, which Keras may change in place.
        given = {name: ops.convert_to_tensor(value) for name, value in batch.items()}
        layer = LossArgs(loss)  # held weakly by its predictions
        return ops.sum(loss(Y, layer(network(x)), given))

    def theirs(x):
        nonlocal y_pred
        y_pred = network(x)
        return ops.sum(computed(tree, by_hand))

    network = layers.Masking() if is_masked else layers.Identity()
    if weight is not None and is_masked:  # PyTorch's shape for Keras
        weight = np.array(np.broadcast_to(weight, (4, 3)))
    if "total" in str(tree):  # one number for the batch
        weight = None
    batch = {} if weight is None else {"sample_weight": weight}
    batch |= {"mask": MASK} if "masked" in str(tree) else {}
    y_pred = None
    expected, expected_slope = value_and_gradient(theirs, X)
    y_pred = network(X)
    largest = computed(tree, lambda *leaf: to_float(ops.sum(ops.abs(by_hand(*leaf)))), LARGEST)
    largest = max(1, largest, float(abs(expected)))  # a constant counts once for each sample
    value, slope = value_and_gradient(ours, X)
    assert value == pytest.approx(expected, abs=1e-6 * largest)
    np.testing.assert_allclose(slope, expected_slope, rtol=0, atol=1e-6 * largest)


def test_not_attached_only_the_total_is_logged(data):
    """Terms have their own reductions, batch entries and sample weights."""
    loss = (
        mse.options(reduction="sum")()
        + 3 * masked.options(reduction="mean_with_sample_weight")()
        - keras.losses.MeanAbsoluteError()
    )
    model = linear_model()
    model.compile(loss=loss, metrics=[loss.replace(mask=1.0)])
    batch = {"mask": data.mask, "sample_weight": data.weight}
    logs = logs_of(model, data.x, data.y, sample_weight=batch)
    error = data.y - predictions(data.x)

    def expected(mask, w):
        masked_error = (w * (mask * error**2).mean(1)).sum() / w.sum()
        absolute_error = (w * np.abs(error).mean(1)).mean()
        return (w * (error**2).mean(1)).sum() + 3 * masked_error - absolute_error

    values = {"loss": expected(data.mask, data.weight), "sum": expected(1.0, np.ones(12))}
    assert logs == pytest.approx(values, rel=1e-6)


def test_terms_that_would_broadcast_are_refused():
    y = np.ones((2, 2), "float32")
    loss = mse.options(reduction=None)() + mae.options(reduction=None)()
    np.testing.assert_allclose(loss(y, 3 * y), [6, 6])
    square = with_args(lambda t, p: ops.square(t - p), reduction=None)
    with pytest.raises(ArgumentError, match=r"of the shapes \(2,\), \(2, 2\), which would broadc"):
        (mse.options(reduction=None)() + square())(y, y)


def test_inner_sum_gives_a_number_for_each_sample(data):
    model = attached(losses.composed(main=mse() + 2 * mae() + 1, weight=3.0))
    error = data.y - predictions(data.x)
    each_sample = 3 * ((error**2).mean(1) + 2 * np.abs(error).mean(1) + 1)
    logs = logs_of(model, data.x, data.y, sample_weight=data.weight)
    assert logs["loss"] == pytest.approx((data.weight * each_sample).mean(), rel=1e-6)
    np.testing.assert_allclose((mse() + 1).call(ZEROS, ONES), [2, 2, 2, 2])


def test_small_floats_of_a_term_do_not_limit_the_sum():
    half = mse.options(dtype="float16")()
    assert to_float((half * 1e6 + 1e-3)(ZEROS, ONES)) == pytest.approx(1e6 + 1e-3)
    assert (half + mse.options(dtype="float64")()).dtype == "float64"


# ---- Plain Keras losses ----


def test_keras_losses_with_other_arguments_are_different():
    for delta in (0.5, 1.0):  # Keras leaves `delta` out of the config
        huber = keras.losses.Huber(delta)
        loss = mse() + huber
        assert to_float(loss(ZEROS, 5 * ONES)) == pytest.approx(25 + delta * (5 - delta / 2))
        assert pickle.loads(pickle.dumps(loss)) is loss
        assert loss is mse() + keras.losses.Huber(delta)
        assert loss != mse() + keras.losses.Huber(3.0)
        assert loss != mse() + keras.losses.Huber(delta, name="other")
        with ObjectSharingScope():
            keras.saving.serialize_keras_object(huber)  # now its config says that it is shared
            assert mse() + huber is loss
    for shift in (1, 2):
        loss = mse() + sums.Shifted(shift)
        assert to_float(loss(ZEROS, ONES)) == 2 + shift
        assert keras.losses.deserialize(keras.losses.serialize(loss)) == loss


def test_keras_loss_that_would_load_as_another_one():
    class Unknown(sums.Shifted):
        """Not registered."""

    loss = mse() + Unknown(1)
    assert to_float(loss(ZEROS, ONES)) == 3
    with pytest.raises(SavingError, match=r"Unknown\(shift=1\), which does not load as it was"):
        keras.losses.serialize(loss)
    other = sums.Shifted()
    other.more = 3
    with pytest.raises(SavingError, match="which is not equal to it"):
        pickle.dumps(mse() + other)


# ---- In a model ----

HOW = [
    ("eager", {"run_eagerly": True, "jit_compile": False}),
    ("mixed precision", {"jit_compile": False}),
    ("compiled", {"jit_compile": True}),
    ("several steps", {"steps_per_execution": 2}),
]
if BACKEND == "torch":
    HOW.pop()  # Keras has no steps_per_execution there
    if KERAS < (3, 12):
        HOW.pop()  # torch.compile fails on any loss


@fit
@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.compile
@each(("how", "options"), HOW)
def test_logs_of_terms_and_weights(data, monkeypatch, how, options):
    if BACKEND == "torch":  # traced and differentiated as by Inductor, without writing C++
        torch = sys.modules["torch"]
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    keras.config.set_dtype_policy("mixed_float16" if how == "mixed precision" else "float32")
    try:
        network = linear_model()
    finally:
        keras.config.set_dtype_policy("float32")
    model = attached(mse() + mae() * fixed(2.0, "beta") - HALF * total(), network, 0.1, **options)
    assert list(live_args(model)) == ["mae_weight"]
    live_args(model)["mae_weight"].assign(3.0)
    options = {"batch_size": 6, "epochs": 2, "shuffle": False, "verbose": 0}
    history = model.fit(data.x, data.y, validation_data=(data.x, data.y), **options).history
    names = {"loss", "mse", "mae", "total", "mae_weight", "total_weight"}
    assert set(history) == {*names, *(f"val_{name}" for name in names)}
    assert history["mae_weight"] == [3, 3]
    assert history["total_weight"] == pytest.approx([0.55, 0.65])  # of the last step
    assert history["val_total_weight"] == pytest.approx([0.6, 0.7])
    kernel, bias = network.get_weights()[:2]
    error = data.y - data.x @ kernel - bias
    expected = {"mse": (error**2).mean(), "mae": np.abs(error).mean(), "total": (error**2).mean()}
    expected["loss"] = expected["mse"] + 3 * expected["mae"] - 0.7 * expected["total"]
    found = {name: history[f"val_{name}"][-1] for name in expected}
    assert found == pytest.approx(expected, rel=2e-3 if how == "mixed precision" else 1e-5)


@fit
@each("kind", ["tensors", "list", "dict"])
def test_names_with_several_outputs(tmp_path, data, kind):
    x = keras.Input((3,))
    a, b = (layers.Dense(2, name=name)(x) for name in ("a", "b"))
    loss = mse() + mae() * TWO  # one sum for both
    names = ["one", "two"] if kind == "tensors" else ["a", "b"]
    loss = [loss, loss] if kind == "list" else dict.fromkeys(names, loss)
    if kind == "tensors":
        model = keras.Model(x, attach({"one": a, "two": b}, loss))
    else:
        model = attach(keras.Model(x, [a, b] if kind == "list" else {"b": b, "a": a}), loss)
    model.compile("sgd", loss=loss)
    y = [data.y, data.y] if kind == "list" else dict.fromkeys(names, data.y)
    expected = {f"{n}_{part}" for n in names for part in ("loss", "mse", "mae", "mae_weight")}
    assert set(model.fit(data.x, y, verbose=0).history) == {"loss", *expected}
    assert set(live_args(model)) == {f"{name}_mae_weight" for name in names}
    model.save(tmp_path / "model.keras")
    logs = logs_of(keras.saving.load_model(tmp_path / "model.keras"), data.x, y)
    assert set(logs) == {"loss", *expected}
    for name in names:
        parts = [logs[f"{name}_{part}"] for part in ("loss", "mse", "mae")]
        assert parts[0] == pytest.approx(parts[1] + 2 * parts[2], rel=1e-5)


@each(
    "loss",
    [
        mae() + mae(scale=2),
        mse() + mae.options(name="mse")(),
        mse() + mae.options(name="loss")(),
        mse() * TWO + mse() * HALF,
        mse() * TWO + mae.options(name="mse_weight")(),
        mse() + keras.losses.MeanAbsoluteError(name="mse"),
    ],
    ids=repr,
)
def test_two_things_of_one_name(data, loss):
    with pytest.raises(AttachError, match=r"2 different values have .*options\(name=...\)"):
        attach(linear_model(), loss)
    if not loss.live_names:
        model = linear_model()
        model.compile(loss=loss)  # not attached
        assert set(logs_of(model, data.x, data.y)) == {"loss"}


@fit
def test_class_weight(data):
    labels = np.arange(12) % 2
    model = attached(mse() + keras.losses.MeanSquaredError(name="keras"))
    given = {"class_weight": {0: 0.5, 1: 4.0}, "verbose": 0}
    logs = model.fit(data.x, np.eye(2)[labels], **given).history
    each_sample = ((np.eye(2)[labels] - predictions(data.x)) ** 2).mean(1)
    weighted = (each_sample * np.where(labels, 4.0, 0.5)).mean()
    expected = {"loss": 2 * weighted, "mse": weighted, "keras": weighted}
    assert {name: one[0] for name, one in logs.items()} == pytest.approx(expected, rel=1e-5)


# ---- Once in each step ----


@fit
@pytest.mark.skipif(BACKEND != "torch", reason="the others run the function only in traces")
@each("is_attached", [True, False])
def test_a_term_is_evaluated_once(data, is_attached):
    calls = []

    @with_args
    def counted(y_true, y_pred, *, n=0):
        calls.append(n)
        return ops.mean(ops.square(y_true - y_pred), axis=-1)

    inner = losses.composed(main=counted(), weight=2.0)
    loss = counted() + inner + 3 * counted() + counted.options(name="other")(n=1)
    track = [counted(), losses.composed.options(name="also")(main=counted())]
    model = attach(linear_model(), loss, track=track) if is_attached else linear_model()
    model.compile("sgd", loss=loss)
    for count in range(3):
        calls.clear()
        model.train_on_batch(data.x, data.y)
        assert count == 0 or sorted(calls) == [0, 1]


@fit
def test_nothing_is_left_behind(data):
    """Neither objects nor tracers of JAX."""
    loss = mse() * fixed(2.0, "here") + keras.losses.Huber(0.75) - HALF * mae()
    model = attached(loss, run_eagerly=BACKEND == "tensorflow")  # which keeps graphs
    checking = contextlib.nullcontext()
    if BACKEND == "jax":
        checking = sys.modules["jax"].checking_leaks()
    with checking:
        model.fit(data.x, data.y, verbose=0)
    logs_of(model, data.x, data.y)
    references = [weakref.ref(one) for one in (loss, model, loss.terms[1], model.layers[-1])]
    del loss, model
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)


# ---- Files ----

LOAD = """
import json, keras, sums
model = keras.saving.load_model({path!r})
alone = keras.losses.deserialize(json.loads({text!r}))
_, x, y = sums.segmented()
logs = model.evaluate(x, y, verbose=0, return_dict=True)
print(json.dumps([repr(model.loss), alone is model.loss, logs]))
"""


def test_a_sum_for_segmentation_loads_in_a_fresh_process(tmp_path):
    """With its model, and alone because it has no live weights."""
    model, x, y = sums.segmented()
    loss = model.loss
    if BACKEND != "numpy":
        history = model.fit(x, y, epochs=4, verbose=0).history
        assert history["loss"][-1] < history["loss"][0]
    logs = logs_of(model, x, y)
    y_pred = model.predict(x, verbose=0)
    values = {term.name: to_float(term(y, y_pred)) for term in loss.terms}
    total = sum(weight * values[name] for name, weight in sums.WEIGHTS.items()) + 10
    assert logs == pytest.approx({"loss": total, **values}, rel=1e-5)

    text, path = json.dumps(keras.losses.serialize(loss)), str(tmp_path / "model.keras")
    assert keras.losses.deserialize(json.loads(text)) is pickle.loads(pickle.dumps(loss)) is loss
    model.save(path)
    output = run_python(LOAD.format(path=path, text=text))
    shown, is_one_loss, found = json.loads(output.splitlines()[-1])
    assert (shown, is_one_loss, found) == (repr(loss), True, pytest.approx(logs, rel=1e-5))


@fit
@each_writer
def test_models_written_on_other_backends(written_on):
    expected = json.loads((TESTS / "models" / "sums.json").read_text())
    model = keras.saving.load_model(TESTS / "models" / f"sums-{written_on}.keras", compile=False)
    loss = model.layers[-1].loss
    assert repr(loss) == expected["loss"]
    model.compile("sgd", loss=loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    batch = {"mask": x[:, :2] > 0}
    logs = logs_of(model, x, x[:, :2], sample_weight=batch)
    assert logs == pytest.approx(expected["logs"], rel=1e-5)
    assert list(live_args(model)) == expected["live"]
    assert [v.name for v in live_args(model).values() if v.trainable] == ["trained"]
    history = model.fit(x, x[:, :2], sample_weight=batch, verbose=0).history
    assert history["mae_weight"] == [logs["mae_weight"]]


# ---- Training ----


@with_args
def one_function(y_true, y_pred, *, of, gain, factor):
    error = ops.mean(ops.square(y_true - y_pred), axis=-1)
    return gain * error - factor * ops.mean(ops.square(of), axis=-1)


@fit
def test_training_equals_one_function(data):
    """With a trained weight, a schedule, and a tensor of the model."""
    results = []
    for is_sum in (True, False):
        network, gain = linear_model(), keras.Variable(0.5, name="gain")
        of = network.outputs[0]
        ours = mse() * gain - sums.size(of=of) * HALF
        theirs = one_function(of=of, gain=gain, factor=HALF)
        model = attached(ours if is_sum else theirs, network, 0.1)
        options = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0}
        history = model.fit(data.x, data.y, validation_data=(data.x, data.y), **options).history
        results.append((history, *network.get_weights()[:2], to_float(gain)))
    (ours, *weights), (theirs, *expected) = results
    for name, other in (("loss", "loss"), ("mse_weight", "gain"), ("size_weight", "factor")):
        for prefix in ("", "val_"):
            assert ours[prefix + name] == pytest.approx(theirs[prefix + other], rel=1e-5)
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
