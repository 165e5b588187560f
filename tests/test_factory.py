"""`with_args` and the factory: signatures, binding, options, equality, pickling."""

import collections
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import types
import weakref
from decimal import Decimal
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import lossargs
import losses
from helpers import BACKEND, attached, linear_model, logs_of, message_of, raising, to_float
from lossargs import ArgumentError, SavingError, with_args
from losses import composed, described, doubled, flexible, focal, scaled, shifted

Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")  # mse: 5
Point = collections.namedtuple("Point", "x")  # noqa: PYI024
mse = keras.losses.mean_squared_error


@dataclasses.dataclass(frozen=True)
class Span:
    width: Any
    hidden: float = dataclasses.field(default=0.0, repr=False)
    ignored: Any = dataclasses.field(default=None, compare=False, repr=False)


class Box:
    """Compares by identity."""

    def __init__(self, width):
        self.width = width


def test_public_names():
    public = {n for n in vars(lossargs) if not n.startswith("_")}
    public -= {n for n, v in vars(lossargs).items() if isinstance(v, types.ModuleType)}
    assert set(lossargs.__all__) == public
    assert sorted(lossargs.__all__) == lossargs.__all__
    assert type(shifted) is lossargs.LossFactory
    assert type(shifted(1)) is lossargs.BoundLoss


def capturing():
    margin, later = 2.0, [1.0]
    return with_args(lambda y_true, y_pred: mse(y_true, y_pred) + margin + later[0])


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        (lambda: shifted(10), 15),
        (lambda: doubled(1), 12),
        (capturing(), 8),
        (with_args(functools.partial(shifted.__wrapped__, shift=3)), 8),
    ],
)
def test_decorated_and_inner_functions(bind, expected):
    """`test_properties.py` has the other forms of signatures."""
    assert to_float(bind()(Y_TRUE, Y_PRED)) == expected


def test_existing_keras_function():
    one_hot, probabilities = np.eye(3)[:2], np.full((2, 3), 1 / 3)
    ours = focal(gamma=1.0)(one_hot, probabilities)
    theirs = keras.losses.CategoricalFocalCrossentropy(gamma=1.0)(one_hot, probabilities)
    assert to_float(ours) == to_float(theirs)


def test_factory_tells_about_its_function():
    assert (shifted.__name__, shifted.__module__) == ("shifted", "losses")
    assert described.__doc__.startswith("Takes any value")
    assert str(inspect.signature(shifted)) == "(shift)"
    defaults = "alpha=0.25, gamma=2.0, from_logits=False, label_smoothing=0.0, axis=-1"
    assert str(inspect.signature(focal)) == f"({defaults})"
    assert list(inspect.signature(shifted.__wrapped__).parameters) == ["y_true", "y_pred", "shift"]
    assert repr(scaled) == "<loss factory scaled(scale=1.0, *, power=2.0)>"


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: 0, "<lambda>() cannot be called as <lambda>(y_true, y_pred)"),
        (lambda y_true: 0, "cannot be called as"),
        (lambda *args: 0, "A decorator needs functools.wraps."),
        (lambda y_true, *, y_pred: 0, "cannot be called as"),
        (lambda self, y_true, y_pred: 0, "(self, y_true, y_pred) cannot be called as"),
        (lambda t, p, *rest: 0, "its parameter 'rest' cannot be passed by name"),
        (lambda t, p, shift, /: 0, "its parameter 'shift' cannot be passed by name"),
        (lambda t, p, sample_weight: 0, "'sample_weight' is reserved for an argument of Keras"),
        (lambda t, p, y_true: 0, "'y_true' is reserved for an argument of Keras"),
        ("mse", "with_args() cannot use 'mse': "),
        (min, "cannot use <built-in function min>: no signature found"),
        (keras.losses.Huber, "it is not a function. Write `def "),
        (keras.losses.Huber(), "take a function of Keras: keras.losses.huber"),
        (shifted, "cannot use <loss factory shifted(shift)>: it is not a function"),
    ],
)
def test_functions_that_cannot_be_a_factory(function, text):
    with raising(ArgumentError, text):
        with_args(function)
    assert issubclass(ArgumentError, TypeError)


def test_decorator_with_options():
    @with_args(name="late", reduction="sum", dtype="float64", package="tests")
    def early(y_true, y_pred, shift):
        return mse(y_true, y_pred) + shift

    loss = early(1)
    assert (loss.name, loss.reduction, loss.dtype) == ("late", "sum", "float64")
    assert to_float(loss(Y_TRUE, Y_PRED)) == 12
    config = loss.get_config()
    saved = config["function"]  # the name in the logs does not change it
    assert saved == "tests>test_decorator_with_options.<locals>.early"
    assert early.options(name=None)(1).get_config()["function"] == saved
    assert lossargs.BoundLoss.from_config(config) is loss
    assert keras.saving.get_registered_name(lossargs.BoundLoss) == "lossargs>BoundLoss"


def test_options_change_what_is_given_and_keep_the_rest():
    late = shifted.options(name="late", reduction="sum").options(dtype="float16")
    assert (late(1).name, late(1).reduction, late(1).dtype) == ("late", "sum", "float16")
    assert late.__wrapped__ is shifted.__wrapped__
    assert late.options(reduction=None)(1).reduction is None
    assert late.options(name=None)(1).name == shifted(1).name == "shifted"
    policy = keras.DTypePolicy("mixed_float16")
    same = with_args(shifted.__wrapped__, name="late", reduction="sum", dtype=policy)
    assert late == same != shifted
    assert hash(late) == hash(same)
    with pytest.raises(ValueError, match="reduction"):
        shifted.options(reduction="average")


def test_dtype_is_the_floatx_of_the_time_of_binding(request):
    late, outer = (factory.options(dtype="float32") for factory in (shifted, composed))
    loss = outer(main=late(1))
    assert shifted(1).dtype == "float32"
    request.addfinalizer(lambda: keras.config.set_floatx("float32"))
    keras.config.set_floatx("float64")
    assert shifted(1).dtype == "float64"
    assert late(1).dtype == "float32"
    assert outer(main=late(1)) is loss


@pytest.mark.parametrize(
    ("bind", "text"),
    [
        (
            lambda: shifted(shfit=10),
            "shifted has no argument 'shfit'. It takes 'shift'. Did you mean 'shift'?",
        ),
        (
            lambda: shifted(10, shift=5),
            "It takes (shift). If Keras was given shifted itself, call it: loss=shifted(...).",
        ),
        (lambda: shifted(1, 2), "2 arguments by position and nothing by name: too many"),
        (lambda: losses.masked(1), "too many positional arguments. It takes (*, mask)."),
        (lambda: flexible(sample_weight=1), "flexible has no argument 'sample_weight'"),
        (lambda: flexible(y_true=1), "flexible has no argument 'y_true'"),
        (
            lambda: composed(main=shifted),
            "'main' of composed() holds the factory shifted, not a loss. Call it: shifted(...).",
        ),
        (lambda: described(what=[1, {"a": shifted}]), "'what' of described() holds the factory"),
        (lambda: composed(main=1).replace(main=shifted), "holds the factory shifted"),
        (lambda: shifted({1, 2}), "'shift' of shifted() is a set, which can change after it was"),
        (lambda: shifted([1, {2}]), "is a set"),
        (lambda: shifted(np.array([None, 1])), "is an array of object, which no backend can"),
        (lambda: shifted(np.array(["a"])), "Give numbers, e.g. array.astype('float32'); text as"),
        (lambda: shifted(np.ma.array([1.0], mask=[0])), "a masked array, which no backend can"),
        (lambda: shifted(np.zeros(2, [("a", "f4")])), "which no backend can compute with"),
        (lambda: shifted(np.zeros(2, "longdouble")), "which no backend can compute with"),
        (
            lambda: shifted(keras.metrics.Mean()),
            "Cannot bind 'shift' of shifted() to a metric, Mean, which Keras would neither",
        ),
        (
            lambda: shifted({"deep": [keras.optimizers.SGD()]}),
            "to an optimizer, SGD, whose variables are created",
        ),
        (lambda: shifted(iter([1])), "to a list_iterator: its current value"),
    ],
)
def test_wrong_binding(bind, text):
    with raising(ArgumentError, text):
        bind()


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has these")
@pytest.mark.parametrize("text", ["a", ["a", "b"], []])
def test_tensors_and_variables_of_tensorflow(text):
    import tensorflow as tf

    tensor = tf.constant(text, tf.string)
    for value in (tensor, [{"a": (tensor,)}]):
        with pytest.raises(ArgumentError, match="text as a str"):
            shifted(value)
    with pytest.raises(ArgumentError, match="Cannot bind 'shift' of shifted.. to a .*Variable: "):
        shifted(tf.Variable(1.0))


@pytest.mark.skipif(BACKEND != "torch", reason="only torch has these")
def test_tensors_and_parameters_of_torch():
    import torch

    tensor = torch.ones(1, requires_grad=True)
    for value, kind in ((tensor * 2, "Tensor"), (torch.nn.Parameter(torch.ones(1)), "Parameter")):
        with raising(ArgumentError, "Cannot bind ", f" to a {kind}: "):
            shifted(value)
    assert to_float(shifted()(Y_TRUE, Y_PRED, shift=tensor * 2)) == 7  # what to write instead


@pytest.mark.fit
def test_tensor_of_the_step_is_no_constant(data):
    @with_args
    def outer(y_true, y_pred):
        return shifted(ops.mean(y_pred, axis=-1))(y_true, y_pred)

    model = linear_model()
    model.compile("sgd", loss=outer())
    kind = "to a Tensor" if BACKEND == "torch" else "is a tensor of a step that is being traced"
    words = f"'shift' of shifted() {kind}", "at the call: loss(y_true, y_pred, name="
    with raising(ArgumentError, *words):
        model.fit(data.x, data.y, verbose=0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (1.0, 1 + 0j),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),  # the function can see the order
        ((1,), Point(1)),
        (np.float32(0.1), np.float64(0.1)),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (np.arange(3), [0, 1, 2]),
        (Point(1), Point(True)),
        (Point(Point(0.0)), Point(Point(-0.0))),
        (frozenset({1}), frozenset({True})),
        (frozenset({(0.0,)}), frozenset({(-0.0,)})),
        (Span(0.0), Span(-0.0)),
        (Span((Span(1),)), Span((Span(1.0),))),
        (Span(0, hidden=0.0), Span(0, hidden=-0.0)),
        (Span(0, ignored=[1]), Span(0, ignored=[2])),
        (range(0), range(1, 1)),
        (Decimal("1.0"), Decimal("1.00")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_compute_differently_are_different(one, other):
    for around in (lambda v: v, lambda v: [v], lambda v: {"a": (0, v)}, Point):
        assert described(what=around(one)) != described(what=around(other))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Point(np.float32(0.1)),
        lambda: frozenset({8, 0, "a"}),
        lambda: Span(Point(0.0), ignored=[{"a": np.arange(3)}]),
        lambda: Decimal("0.10"),
        lambda: Span(mse),
        lambda: Span(shifted(1)),
    ],
)
def test_equal_values_give_the_same_object(make):
    loss = described(what=[make()])
    assert described(what=[make()]) is loss
    assert described(what={"a": loss}) is described(what={"a": loss})


def test_equal_arguments_and_options_give_the_same_object():
    assert shifted(10) is shifted(shift=10) is shifted.options()(10)
    assert shifted(10) not in (shifted(5), shifted.options(reduction="sum")(10))
    assert scaled(power=1.0, scale=2) is scaled(2, power=1.0)
    one, other = flexible(a=1, b=2), flexible(b=2, a=1)
    assert one != other
    assert [list(one.args), list(other.args)] == [["a", "b"], ["b", "a"]]


def test_object_that_compares_by_identity_may_change():
    value = types.FunctionType(mse.__code__, globals())
    unpicklable = Span(value)
    before = described(what=value), described(what=unpicklable)
    value.note = "new"
    assert (described(what=value), described(what=unpicklable)) == before


def test_same_object_is_held_weakly():
    bound = weakref.ref(shifted(1000))
    gc.collect()
    assert bound() is None


@pytest.mark.fit
def test_live_values_in_namedtuples(data):
    @with_args
    def pointed(y_true, y_pred, point):
        return mse(y_true, y_pred) + point.x["a"] + 0.0 * point.x["b"][:, 0]

    x = keras.Input((3,))
    variable = keras.Variable(3.0, trainable=False, name="v")
    loss = pointed(Point({"a": variable, "b": x}))
    assert loss == pointed(Point({"a": variable, "b": x}))
    model = attached(loss, keras.Model(x, keras.layers.Dense(2, kernel_initializer="zeros")(x)))
    for value in (3.0, 5.0):
        variable.assign(value)
        assert logs_of(model, data.x, data.y * 0)["loss"] == pytest.approx(value)


@pytest.mark.fit
@pytest.mark.parametrize(
    ("kind", "live", "text"),
    [
        (Box, lambda: keras.Variable(1.0, name="hidden"), "reads the variable '.*hidden'"),
        (Span, lambda: keras.Input((2,)), "spanned uses a symbolic tensor"),
        (Span, lambda: shifted(keras.Variable(1.0)), "has live arguments"),
    ],
)
def test_live_values_in_other_objects_are_an_error_of_the_step(data, kind, live, text):
    @with_args
    def spanned(y_true, y_pred, span):
        width = span.width(y_true, y_pred) if callable(span.width) else span.width
        return mse(y_true, y_pred) + ops.mean(width)

    value = live()
    loss = spanned(kind(value))
    assert loss.args["span"].width is value
    assert loss != spanned(kind(live()))
    model = linear_model()
    model.compile("sgd", loss=loss)
    for _ in range(2):
        with pytest.raises(lossargs.LossArgsError, match=text):
            model.fit(data.x, data.y, verbose=0)


def test_factory_pickles_by_reference():
    for factory in (shifted, shifted.options(name="late"), focal):
        assert pickle.loads(pickle.dumps(factory)) == factory
        assert copy.deepcopy(factory) is copy.copy(factory) is factory
    assert b"mean_squared_error" not in pickle.dumps(shifted)  # no code inside
    assert copy.deepcopy(shifted.function) is shifted.function
    with pytest.raises(SavingError, match="<lambda> is not found at .*at the top level of"):
        pickle.dumps(capturing())


def in_another_module(name):
    """A copy of the function of `shifted`, as if a module of that name defined it."""
    plain = shifted.__wrapped__
    namespace = {**plain.__globals__, "__name__": name, "__file__": f"/{name}.py"}
    copied = types.FunctionType(plain.__code__, namespace)
    copied.__module__ = name
    return copied


def test_functions_of_two_modules():
    one, other = in_another_module("first"), in_another_module("second")
    assert with_args(one)(1) != with_args(other)(1)
    assert with_args(one) == with_args(one)
    pairs = (one, 1), (one, 2), (other, 3)
    partials = [with_args(functools.partial(fn, shift=shift)) for fn, shift in pairs]
    assert [to_float(make()(Y_TRUE, Y_PRED)) for make in partials] == [6, 7, 8]
    assert len({make() for make in partials}) == 3

    with_args(one, package="shared")
    with pytest.raises(ArgumentError) as error:
        with_args(other, package="shared")
    assert message_of(error.value) == (
        "Two functions have the saved name 'shared>shifted': one of /first.py, one of /second.py. "
        "Give one a package: @with_args(package=...)."
    )
    with_args(other, package="another")


def test_partial_does_not_take_the_place_of_its_function():
    plain = shifted.__wrapped__
    with_args(functools.update_wrapper(functools.partial(plain, shift=1), plain))
    config = keras.losses.serialize(shifted(2))
    assert keras.losses.deserialize(config) is shifted(2)
