"""`with_args` and the factory: signatures, binding, options, pickling."""

import collections
import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import pickle
import types
from decimal import Decimal
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import lossargs
import losses
from helpers import BACKEND, linear_model, message_of, to_float
from lossargs import ArgumentError, SavingError, SignatureError, with_args
from losses import flexible, focal, scaled, shifted


def mse(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), axis=-1)


@with_args
def plus(y_true, y_pred, extra):
    return mse(y_true, y_pred) + extra


Y_TRUE, Y_PRED = np.zeros((2, 1), "float32"), np.array([[1.0], [3.0]], "float32")  # mse: 5


Point = collections.namedtuple("Point", "x")  # noqa: PYI024


@dataclasses.dataclass(frozen=True)
class Span:
    width: Any
    hidden: float = dataclasses.field(default=0.0, repr=False)
    ignored: Any = dataclasses.field(default=None, compare=False, repr=False)


class Silent:
    """Compares by its value, and does not show it."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, Silent) and self.value == other.value

    def __hash__(self):
        return hash(self.value)


def is_hashable(value):
    with contextlib.suppress(TypeError):
        return isinstance(hash(value), int)
    return False


AROUND = {
    "nothing": lambda value: value,
    "list": lambda value: [value],
    "key": lambda value: {value: 1},
    "tuple": lambda value: (0, (value,)),
    "namedtuple": lambda value: Point((value,)),
    "object": lambda value: Span(Span(value)),
}


def test_public_names():
    public = {n for n in vars(lossargs) if not n.startswith("_")}
    public -= {n for n, v in vars(lossargs).items() if isinstance(v, types.ModuleType)}
    assert set(lossargs.__all__) == public
    assert sorted(lossargs.__all__) == lossargs.__all__


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (shifted(10), 15),
        (shifted(shift=10), 15),
        (scaled(), 5),
        (scaled(2), 10),
        (scaled(2, power=1.0), 4),
        (scaled(scale=2, power=1.0), 4),
        (flexible(), 5),
        (flexible(a=1, b=2), 8),
    ],
)
def test_every_form_of_signature(loss, expected):
    assert to_float(loss(Y_TRUE, Y_PRED)) == expected


def test_first_two_parameters_may_have_any_names():
    @with_args
    def swapped(labels, outputs, /, shift):
        return mse(labels, outputs) + shift

    assert to_float(swapped(1)(Y_TRUE, Y_PRED)) == 6


def test_called_decorator():
    @with_args(name="late", reduction="sum", dtype="float64", package="tests")
    def early(y_true, y_pred, shift):
        return mse(y_true, y_pred) + shift

    loss = early(1)
    assert (loss.name, loss.reduction, loss.dtype) == ("late", "sum", "float64")
    assert early.function.key == "tests>late"
    assert to_float(loss(Y_TRUE, Y_PRED)) == 12


def test_existing_keras_function():
    assert str(inspect.signature(focal)) == (
        "(alpha=0.25, gamma=2.0, from_logits=False, label_smoothing=0.0, axis=-1)"
    )
    one_hot, probabilities = np.eye(3)[:2], np.full((2, 3), 1 / 3)
    ours = focal(gamma=1.0)(one_hot, probabilities)
    theirs = keras.losses.CategoricalFocalCrossentropy(gamma=1.0)(one_hot, probabilities)
    assert to_float(ours) == to_float(theirs)


def test_factory_tells_about_its_function():
    assert shifted.__name__ == "shifted"
    assert shifted.__module__ == "losses"
    assert losses.described.__doc__.startswith("Takes any value")
    assert str(inspect.signature(shifted)) == "(shift)"
    assert list(inspect.signature(shifted.__wrapped__).parameters) == ["y_true", "y_pred", "shift"]
    assert repr(scaled) == "<loss factory scaled(scale=1.0, *, power=2.0)>"


def test_options_change_what_is_given_and_keep_the_rest():
    late = shifted.options(name="late", reduction="sum").options(dtype="float16")
    assert (late(1).name, late(1).reduction, late(1).dtype) == ("late", "sum", "float16")
    assert shifted(1).name == "shifted"
    assert late.__wrapped__ is shifted.__wrapped__
    assert late.options(reduction=None)(1).reduction is None
    assert late.options(name=None)(1).name == "shifted"
    assert late == shifted.options(name="late", reduction="sum", dtype="float16") != shifted
    assert hash(late) == hash(late.options())


def test_options_are_checked_at_once():
    with pytest.raises(ValueError, match="reduction"):
        shifted.options(reduction="average")


def test_dtype_is_the_floatx_of_the_time_of_binding():
    assert shifted(1).dtype == "float32"
    keras.config.set_floatx("float64")
    try:
        assert shifted(1).dtype == "float64"
        assert shifted.options(dtype="float32")(1).dtype == "float32"
    finally:
        keras.config.set_floatx("float32")


def test_dtype_policy_counts_by_what_it_computes_in():
    assert shifted.options(dtype="mixed_float16")(1).dtype == "float16"
    assert shifted.options(dtype=keras.DTypePolicy("float64"))(1).dtype == "float64"


def test_equal_constants_give_the_same_object():
    assert shifted(10) is shifted(shift=10)
    assert shifted.options()(10) is shifted(10)
    assert shifted(10) is not shifted(5)
    assert shifted(10) is not shifted.options(reduction="sum")(10)
    loss = losses.described(what={"a": [1, (2.0, None)], "b": "c"})
    assert losses.described(what={"a": [1, (2.0, None)], "b": "c"}) is loss
    assert losses.described(what=np.arange(3)) is losses.described(what=np.arange(3))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (1.0, 1 + 0j),
        ([1], (1,)),
        (np.float32(0.1), np.float64(0.1)),
        (np.arange(3), np.arange(3.0)),
        (np.zeros((1, 2)), np.zeros((2, 1))),
        (np.arange(3), [0, 1, 2]),
        (Point(1), Point(True)),
        (Point(1.0), Point(1)),
        (Point(Point(0.0)), Point(Point(-0.0))),
        (frozenset({1}), frozenset({True})),
        (frozenset({(0.0,)}), frozenset({(-0.0,)})),
        (Span(0.0), Span(-0.0)),
        (Span((Span(1),)), Span((Span(1.0),))),
        (Span(0, hidden=0.0), Span(0, hidden=-0.0)),
        (Span(0, ignored=[1]), Span(0, ignored=[2])),
        (Silent(0.0), Silent(-0.0)),
        (range(0), range(1, 1)),
        (Decimal("1.0"), Decimal("1.00")),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("around", AROUND, ids=AROUND)
def test_values_that_compile_differently_are_different(one, other, around):
    if around in ("key", "namedtuple", "object") and not (is_hashable(one) and is_hashable(other)):
        return
    one, other = AROUND[around](one), AROUND[around](other)
    assert losses.described(what=one) != losses.described(what=other)


TENSOR = ops.ones(2)


class Cyclic(Silent):
    def __init__(self, value):
        super().__init__(value)
        self.itself = self


class Words(Silent):
    def __init__(self, value):
        super().__init__(value)
        self.words, self.array, self.tensor = {"a", "b"}, Y_TRUE.copy(), TENSOR


@pytest.mark.parametrize(
    "value",
    [
        lambda: Point(np.float32(0.1)),
        lambda: frozenset({8, 0, "a"}),
        lambda: Span(Point(0.0), ignored=[{"a": np.arange(3)}]),
        lambda: Silent(2.5),
        lambda: Cyclic(2.5),
        lambda: Words(2.5),
        lambda: Span((Silent(1), Silent(1))),
        lambda: Decimal("0.10"),
    ],
)
def test_equal_objects_are_the_same_value(value):
    assert value() is not value()
    loss = losses.described(what=[value()])
    assert losses.described(what=[value()]) is loss
    assert losses.described(what={"a": loss}) is losses.described(what={"a": loss})


def test_object_that_compares_by_id_may_change():
    value = types.FunctionType(mse.__code__, globals())
    loss = losses.described(what=value)
    value.note = "new"
    assert losses.described(what=value) is loss


def test_inner_loss_is_the_same_under_another_floatx():
    inner = shifted.options(dtype="float32")(1)
    loss = losses.composed.options(dtype="float32")(main=inner)
    keras.config.set_floatx("float64")
    try:
        assert losses.composed.options(dtype="float32")(main=inner) is loss
    finally:
        keras.config.set_floatx("float32")


def test_order_counts_where_the_function_can_see_it():
    assert losses.described(what={"a": 1, "b": 2}) != losses.described(what={"b": 2, "a": 1})
    one, other = flexible(a=1, b=2), flexible(b=2, a=1)
    assert [list(one.args), list(other.args)] == [["a", "b"], ["b", "a"]]
    assert losses.scaled(power=1.0, scale=2) is losses.scaled(2, power=1.0)


def test_extra_arguments_named_as_the_first_two():
    @with_args
    def lenient(labels, outputs, **extra):
        return mse(labels, outputs)

    @with_args
    def strict(labels, outputs, /, **extra):
        return mse(labels, outputs) + extra["labels"]

    for wrong in (
        lambda: lenient(labels=1),
        lambda: lenient().replace(outputs=1),
        lambda: lenient()(Y_TRUE, Y_PRED, labels=1),
    ):
        with pytest.raises(ArgumentError, match="'(labels|outputs)', which lenient does not take"):
            wrong()
    assert to_float(strict(labels=1)(Y_TRUE, Y_PRED)) == 6


def test_nan_equals_itself():
    assert losses.described(what=float("nan")) is losses.described(what=float("nan"))


def test_same_object_is_held_weakly():
    function = shifted.function
    gc.collect()
    before = sum(isinstance(o, keras.losses.Loss) for o in gc.get_objects())
    for number in range(100):
        shifted(1000 + number)
    gc.collect()
    assert sum(isinstance(o, keras.losses.Loss) for o in gc.get_objects()) == before
    assert shifted.function is function


def test_factory_pickles_by_reference():
    assert pickle.loads(pickle.dumps(shifted)) == shifted
    late = shifted.options(name="late")
    assert pickle.loads(pickle.dumps(late)) == late
    assert b"mean_squared_error" not in pickle.dumps(shifted)  # no code inside
    assert pickle.loads(pickle.dumps(focal)) == focal
    assert copy.deepcopy(shifted) is shifted
    assert copy.copy(shifted) is shifted


def test_local_function_does_not_pickle():
    @with_args
    def local(y_true, y_pred):
        return mse(y_true, y_pred)

    with pytest.raises(SavingError, match="local is not found at .*at the top of a module"):
        pickle.dumps(local)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda: 0, "cannot be called as <lambda>(y_true, y_pred)"),
        (lambda y_true: 0, "cannot be called as"),
        (lambda *args: 0, "should use functools.wraps"),
        (lambda y_true, *, y_pred: 0, "cannot be called as"),
        (lambda t, p, *rest: 0, "cannot have the extra parameter 'rest'"),
        (lambda t, p, shift, /: 0, "cannot have the extra parameter 'shift'"),
        (lambda t, p, sample_weight: 0, "cannot have the extra parameter 'sample_weight'"),
        (lambda t, p, y_true: 0, "cannot have the extra parameter 'y_true'"),
        (
            lambda self, y_true, y_pred: 0,
            "(self, y_true, y_pred) cannot be called as <lambda>(y_true, y_pred)",
        ),
        ("mse", "was given 'mse'"),
        (keras.losses.Huber, "pass its function, e.g. keras.losses.huber"),
        (keras.losses.Huber(), "pass its function, e.g. keras.losses.huber"),
        (shifted, "was given <loss factory shifted(shift)>: it is not a function"),
    ],
)
def test_functions_that_cannot_be_a_factory(function, text):
    with pytest.raises(SignatureError) as error:
        with_args(function)
    assert text in message_of(error.value)
    assert isinstance(error.value, TypeError)


def test_callable_without_a_signature():
    with pytest.raises(SignatureError, match="given <built-in function min>: no signature found"):
        with_args(min)


def test_wrapped_function_shows_through_functools_wraps():
    def halved(function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs) / 2

        return wrapper

    @with_args
    @halved
    def inner(y_true, y_pred, shift):
        return mse(y_true, y_pred) + shift

    assert to_float(inner(1)(Y_TRUE, Y_PRED)) == 3


@pytest.mark.parametrize(
    ("bind", "text"),
    [
        (
            lambda: shifted(shfit=10),
            (
                "shifted() was given 'shfit', which shifted does not take. It takes 'shift' "
                "besides the first two. Did you mean 'shift'?"
            ),
        ),
        (
            lambda: shifted(10, shift=5),
            (
                "shifted() was given 1 arguments by position and 'shift' by name: multiple values "
                "for argument 'shift'. It takes (shift)."
            ),
        ),
        (
            lambda: shifted(1, 2),
            "shifted() was given 2 arguments by position and nothing by name: too many",
        ),
        (lambda: losses.masked(1), "too many positional arguments. It takes (*, mask)."),
        (lambda: flexible(sample_weight=1), "'sample_weight', which flexible does not take"),
        (lambda: flexible(y_true=1), "'y_true', which flexible does not take"),
        (
            lambda: losses.composed(main=shifted(1)).replace(main=shifted),
            "'main' of composed() is the factory shifted, not a loss. Call it: main=shifted(...).",
        ),
        (
            lambda: losses.composed(main=shifted),
            "'main' of composed() is the factory shifted, not a loss. Call it: main=shifted(...).",
        ),
    ],
)
def test_wrong_binding(bind, text):
    with pytest.raises(ArgumentError) as error:
        bind()
    assert text in message_of(error.value)
    assert isinstance(error.value, TypeError)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (lambda: {1, 2}, "'shift' of shifted() is a set, which can change after it was bound"),
        (lambda: np.array([None, 1]), "is an array of object, which no backend can compute with"),
        (lambda: [1, {2}], "is a set"),
        (keras.metrics.Mean, "'shift' of shifted() is a metric, Mean, which Keras would neither"),
        (keras.optimizers.SGD, "'shift' of shifted() is an optimizer, SGD, whose variables belong"),
        (lambda: iter([1]), "is a list_iterator: bound as a constant"),
        (lambda: np.ma.array([1.0, 2.0], mask=[0, 1]), "its data and its mask as two arguments"),
        (lambda: np.zeros(2, [("a", "f4"), ("b", "f4")]), "which no backend can compute with"),
        (lambda: {"deep": [keras.metrics.Mean()]}, "is a metric, Mean"),
    ],
)
def test_values_that_are_no_constants(value, text):
    with pytest.raises(ArgumentError) as error:
        shifted(value())
    assert text in message_of(error.value)


@pytest.mark.parametrize(
    "live",
    [
        lambda: keras.Variable(1.0, name="beta"),
        lambda: keras.Input((2,), name="z"),
        lambda: keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.5),
        lambda: shifted(keras.Variable(1.0)),
    ],
    ids=["variable", "tensor", "schedule", "loss"],
)
@pytest.mark.parametrize(
    "around",
    [
        Point,
        lambda live: [Point([live])],
        lambda live: {"a": (Point({"b": live}),)},
        lambda live: Point({1: {"c": live}}),
        lambda live: Point(Point(live)),
        lambda live: frozenset({Span(live)}) if is_hashable(live) else Span(live),
        lambda live: Span(Span(0, ignored=[live])),
    ],
)
def test_live_values_in_objects(live, around):
    live = live()
    with pytest.raises(ArgumentError) as error:
        shifted(around(live))
    text = message_of(error.value)
    assert text.startswith("'shift' of shifted() is a ")
    assert text.endswith(
        "live values and losses in tuples, lists and dicts only. Give one of these."
    )


def test_constants_in_objects_are_fine():
    value = Point((Point(1), "a", shifted(1), None))
    assert losses.described(what=value).args["what"] is value
    itself = Span(0, ignored=[])
    itself.ignored.append(itself)
    assert losses.described(what=itself).args["what"] is itself


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has tensors of strings")
@pytest.mark.parametrize("text", ["a", ["a", "b"], []])
def test_tensor_of_strings(text):
    import tensorflow as tf

    tensor = tf.constant(text, tf.string)
    for value in (tensor, [{"a": (tensor,)}]):
        with pytest.raises(ArgumentError, match="is a tensor of strings"):
            shifted(value)


def variable_of_the_backend():
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.Variable(1.0)
    import torch

    return torch.nn.Parameter(torch.ones(1))


@pytest.mark.skipif(BACKEND not in ("tensorflow", "torch"), reason="has no variables of its own")
def test_variable_of_the_backend():
    kind = {"tensorflow": "a tensorflow Variable", "torch": "a torch Parameter"}[BACKEND]
    with pytest.raises(
        ArgumentError, match=f"'shift' of shifted\\(\\) is {kind}: bound as a constant"
    ):
        shifted(variable_of_the_backend())


@pytest.mark.skipif(BACKEND != "torch", reason="only torch marks its tensors")
def test_tensor_that_requires_a_gradient():
    import torch

    tensor = torch.ones(1, requires_grad=True)
    with pytest.raises(ArgumentError, match="is a torch tensor that requires a gradient"):
        shifted(tensor * 2)
    assert to_float(shifted()(Y_TRUE, Y_PRED, shift=tensor * 2)) == 7  # what to write instead


@pytest.mark.fit
def test_tensor_of_the_step_is_no_constant(data):
    @with_args
    def outer(y_true, y_pred):
        return shifted(ops.mean(y_pred, axis=-1))(y_true, y_pred)

    model = linear_model()
    model.compile("sgd", loss=outer())
    with pytest.raises(ArgumentError) as error:
        model.fit(data.x, data.y, verbose=0)
    kind = {"torch": "a torch tensor that requires a gradient"}  # which traces nothing
    text = message_of(error.value)
    assert f"'shift' of shifted() is {kind.get(BACKEND, 'a tensor of a step that is')}" in text
    assert "at the call, loss(y_true, y_pred, name=" in text


def test_captured_constants_are_fine():
    later: list[float]
    margin = 2.0

    @with_args
    def hinge(y_true, y_pred):
        return mse(y_true, y_pred) + margin + later[0]

    later = [1.0]
    assert to_float(hinge()(Y_TRUE, Y_PRED)) == 8


def test_captured_values_are_not_saved():
    later: list[float]

    def outer(function):
        @functools.wraps(function)
        def inner(y_true, y_pred):
            return function(y_true, y_pred)

        return inner

    @with_args
    def hinge(y_true, y_pred):
        return mse(y_true, y_pred) + later[0]

    with pytest.raises(SavingError, match="hinge captures 'later' from"):
        hinge().get_config()  # `later` is not assigned yet
    later = [1.0]
    with pytest.raises(SavingError, match="hinge captures 'later' from"):
        hinge().get_config()
    partial = functools.update_wrapper(functools.partial(plus.__wrapped__, extra=2), mse)
    with pytest.raises(SavingError, match="mse captures .*'extra'"):
        with_args(outer(partial))().get_config()


def test_two_functions_of_one_name():
    def first(y_true, y_pred):
        return mse(y_true, y_pred)

    def second(y_true, y_pred):
        return mse(y_true, y_pred)

    with_args(first, name="same", package="two_functions")
    with_args(first, name="same", package="two_functions")  # the same one: fine
    with pytest.raises(SignatureError) as error:
        with_args(second, name="same", package="two_functions")
    text = message_of(error.value)
    assert text.startswith("Two different functions are called 'two_functions>same': test_two_func")
    assert "@with_args(package=...)" in text
    with_args(second, name="same", package="another")


def in_another_module(function, name):
    """A copy of a function, as if a module of that name defined it."""
    namespace = {**function.__globals__, "__name__": name, "__file__": f"/{name}.py"}
    copied = types.FunctionType(function.__code__, namespace, function.__name__)
    copied.__module__ = name
    return copied


def test_partials_of_functions_of_two_modules():
    one, other = (
        with_args(functools.partial(in_another_module(plus.__wrapped__, name), extra=extra))
        for name, extra in [("first_module", 1), ("second_module", 2)]
    )
    assert [one.function.key, other.function.key] == [
        "first_module>partial",
        "second_module>partial",
    ]
    assert one != other
    assert one() != other()
    assert [to_float(loss()(Y_TRUE, Y_PRED)) for loss in (one, other)] == [6, 7]


def test_partials_of_one_module():
    partials = [functools.partial(plus.__wrapped__, extra=extra) for extra in (1, 2)]
    one, other = map(with_args, partials)
    assert one() != other()
    assert [to_float(loss()(Y_TRUE, Y_PRED)) for loss in (one, other)] == [6, 7]


def test_partial_does_not_take_the_place_of_its_function():
    fixed = functools.update_wrapper(functools.partial(plus.__wrapped__, extra=1), plus.__wrapped__)
    with_args(fixed)
    config = keras.losses.serialize(plus(2))
    assert keras.losses.deserialize(config) is plus(2)
