"""What goes wrong in a step is told by name, and what comes after it works."""

import gc
import weakref

import keras
import numpy as np
import pytest

import losses
from helpers import BACKEND, KERAS, linear_model, values_on_tensors
from lossargs import ArgumentError, BatchError, attach, with_args
from lossargs._live import StepValues

pytestmark = pytest.mark.fit

BROKEN = {"now": False}


@with_args
def fragile(y_true, y_pred, *, shift):
    if BROKEN["now"]:
        raise ZeroDivisionError("the user's own error")
    return keras.losses.mean_squared_error(y_true, y_pred) + shift


@pytest.fixture
def broken():
    BROKEN["now"] = True
    yield BROKEN
    BROKEN["now"] = False


def compiled(loss, **options):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.01), loss=loss, **options)
    return model


def fitted(model, data, **batch):
    history = model.fit(
        data.x, data.y, sample_weight=batch or None, shuffle=False, epochs=2, verbose=0
    )
    return history.history["loss"]


@pytest.mark.parametrize("how", ["fit", "evaluate"])
def test_exception_in_the_function(data, how, broken):
    model = compiled(fragile(shift=1.0))
    with pytest.raises(ZeroDivisionError, match="the user's own error") as error:
        getattr(model, how)(data.x, data.y, verbose=0)
    note = "".join(error.value.__notes__)
    assert note.startswith("It was raised in the loss fragile, called with y_true: float32 (")
    assert "shift: float" in note
    del error
    broken["now"] = False
    assert fitted(model, data) == pytest.approx(
        fitted(compiled(fragile(shift=1.0)), data), rel=1e-6
    )
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert not values_on_tensors()
    if BACKEND == "torch":
        assert gone() is None


@pytest.mark.parametrize("entry", ["text", "object", "none"])
def test_entry_of_no_numbers(data, entry):
    values = {
        "text": np.array(["a"] * 12),
        "object": np.array([object()] * 12, dtype=object),
        "none": None,
    }[entry]
    loss = losses.masked()
    with pytest.raises(BatchError, match="The batch entry 'mask' for masked is"):
        loss(data.y, data.y, {"mask": values})


def test_nan_shows_in_the_logs_and_stops_the_run(data):
    shift = keras.Variable(1.0, trainable=False, name="shift")
    loss = losses.shifted(shift)
    model = attach(linear_model(), loss)
    model.compile("sgd", loss=loss)
    shift.assign(float("nan"))
    history = model.fit(
        data.x, data.y, epochs=5, verbose=0, callbacks=[keras.callbacks.TerminateOnNaN()]
    ).history
    assert len(history["loss"]) == 1
    assert np.isnan(history["loss"][0])
    assert np.isnan(history["shift"][0])


GOOD = np.ones((12, 2), "float32")
LENGTH, WIDTH = np.ones((5, 2), "float32"), np.ones((12, 5), "float32")
MISSING = "missing"


def batches(data, *masks):
    for mask in masks:
        yield data.x, data.y, {} if mask is MISSING else {"mask": mask}


def of_shapes():
    """What the backend raises for shapes that do not fit."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.errors.InvalidArgumentError, r"Incompatible shapes|required broadcastable shapes"
    return {
        "jax": (TypeError, "got incompatible shapes for broadcasting"),
        "torch": (RuntimeError, r"The size of tensor a \(\d+\) must match .* tensor b \(\d+\)"),
    }[BACKEND]


def of_none(function):
    """What is raised for a `None` in what a generator yields, after others without one."""
    text = f"The batch entry 'mask' for {function} is None"
    if BACKEND == "tensorflow":
        if KERAS < (3, 15):  # a bare error of older ones, out of its data pipeline
            import tensorflow as tf

            return tf.errors.OpError, "could not be converted|'NoneType' object has no attribute"
        return of_shapes()[0], "could not be converted to the expected type"
    if KERAS < (3, 15):  # older ones refuse it themselves
        return ValueError, f"{text}|Invalid dtype: object"
    return BatchError, text


@pytest.mark.parametrize("mask", [LENGTH, WIDTH], ids=["length", "width"])
def test_entry_of_a_wrong_shape(data, mask):
    kind, text = of_shapes()
    with pytest.raises(kind, match=text) as error:
        losses.masked()(data.y, data.y, {"mask": mask})
    assert f"mask: float32 {mask.shape}" in "".join(error.value.__notes__)


def test_entry_of_a_wrong_width_in_the_first_step(data):
    """All backends know the widths when they trace."""
    kind, text = of_shapes()
    if BACKEND == "tensorflow":
        kind, text = ValueError, "Dimensions must be equal, but are (2 and 5|5 and 2)"
    with pytest.raises(kind, match=text) as error:
        compiled(losses.masked()).fit(data.x, data.y, sample_weight={"mask": WIDTH}, verbose=0)
    note = "".join(error.value.__notes__)
    length = "None" if BACKEND == "tensorflow" else "12"
    assert f"y_pred: float32 ({length}, 2); mask: float32 ({length}, 5)" in note


def test_array_of_a_wrong_length_in_fit(data):
    """Keras compares the lengths itself, and does not know the names of the entries."""
    model = compiled(losses.masked())
    with pytest.raises(ValueError, match="ambiguous") as error:
        fitted(model, data, mask=LENGTH)
    assert "'sample_weight' sizes: 5" in str(error.value)
    assert fitted(model, data, mask=GOOD) == fitted(compiled(losses.masked()), data, mask=GOOD)


def test_entry_of_one_row_is_for_all_samples(data):
    row = np.array([[0.5, 2.0]], "float32")
    expected = run(compiled(losses.masked()), "evaluate", data, GOOD * row)
    assert run(compiled(losses.masked()), "evaluate", data, row) == pytest.approx(expected)


def run(model, how, data, *masks):
    if how == "fit":
        steps = {"steps_per_epoch": len(masks), "shuffle": False}
        return model.fit(batches(data, *masks), verbose=0, **steps).history["loss"][0]
    return model.evaluate(batches(data, *masks), steps=len(masks), verbose=0)


def check_error_in_the_third_step(model, how, data, mask, *, eager):
    kind, text, note = *of_shapes(), None
    if mask is None:
        kind, text = of_none("masked")
    elif mask is MISSING:
        kind, text = ArgumentError, "masked needs a value for 'mask'"
    else:
        note = f"mask: float32 {mask.shape}"
    if BACKEND == "tensorflow" and mask is not None:
        # Its data pipeline refuses an element unlike the first two, which no loss gets to see.
        if mask is WIDTH:
            text, note = r"Generator yielded an element of shape \(12, 5\)", None
        elif mask is MISSING:
            text = r"dictionary key mismatch; expected key\(s\): .*'mask'"
        elif mask is LENGTH and not eager:
            text, note = "masked/", None  # the graph is made for any length, and fails in a run
        kind = of_shapes()[0]
    with pytest.raises(kind, match=text) as error:
        run(model, how, data, GOOD, GOOD, mask)
    assert note is None or note in "".join(error.value.__notes__)


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("how", ["fit", "evaluate"])
def test_error_in_a_later_step(data, how, eager):
    """The model is then as the steps before left it, and goes on from there."""
    model, other = (compiled(losses.masked(), run_eagerly=eager) for _ in range(2))
    for mask in (LENGTH, WIDTH, MISSING, None):
        check_error_in_the_third_step(model, how, data, mask, eager=eager)
        run(other, how, data, GOOD, GOOD)
        for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5)
        assert run(model, "evaluate", data, GOOD) == pytest.approx(
            run(other, "evaluate", data, GOOD), rel=1e-5
        )
        assert run(model, "fit", data, GOOD) == pytest.approx(
            run(other, "fit", data, GOOD), rel=1e-5
        )


@with_args
def live_masked(y_true, y_pred, *, mask, shift):
    error = keras.ops.mean(mask * keras.ops.square(y_true - y_pred), axis=-1)
    return error + shift


@pytest.mark.parametrize("mask", [LENGTH, None], ids=["length", "none"])
def test_nothing_stays_on_tensors_of_a_failed_step(data, mask):
    """With a live argument, which travels on the predictions."""
    shift = keras.Variable(2.0, trainable=False, name="shift")
    loss = live_masked(shift=shift)
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(0.01), loss=loss)
    kind, text = of_shapes() if mask is LENGTH else of_none("live_masked")
    with pytest.raises(kind, match=text):
        run(model, "fit", data, GOOD, GOOD, mask)
    shift.assign(5.0)
    history = model.fit(batches(data, GOOD), steps_per_epoch=1, shuffle=False, verbose=0).history
    assert history["shift"] == [5.0]
    del model, loss, shift
    assert_nothing_is_carried()


def assert_nothing_is_carried():
    keras.backend.clear_session()
    gc.collect()
    assert not values_on_tensors()
    if BACKEND != "tensorflow":  # whose graphs keep tensors and what these carry
        assert not [one for one in gc.get_objects() if isinstance(one, StepValues)]


@pytest.mark.parametrize("eager", [False, True], ids=["compiled", "eager"])
@pytest.mark.parametrize("how", ["fit", "evaluate"])
def test_exception_in_the_first_step_of_an_attached_model(data, how, eager, broken):
    """Where Keras on JAX has taken the variables away, and would not bring them back."""
    shift = keras.Variable(2.0, trainable=False, name="shift")
    loss = fragile(shift=shift)
    model = attach(linear_model(), loss)
    model.compile(keras.optimizers.SGD(0.01), loss=loss, run_eagerly=eager)
    weights = model.get_weights()
    with pytest.raises(ZeroDivisionError):
        getattr(model, how)(data.x, data.y, verbose=0)
    for one, two in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, two)
    broken["now"] = False
    shift.assign(5.0)
    expected = [value + 4 for value in fitted(compiled(fragile(shift=1.0)), data)]
    assert fitted(model, data) == pytest.approx(expected, rel=1e-5)
    del model, loss, shift
    assert_nothing_is_carried()


def test_exception_in_a_callback(data):
    """After an epoch the model has its variables, and keeps them."""
    model, other = (compiled(losses.shifted(1.0)) for _ in range(2))
    fail = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: losses.shifted()(data.y, data.y)
    )
    with pytest.raises(ArgumentError, match="needs a value for 'shift'"):
        model.fit(data.x, data.y, shuffle=False, verbose=0, callbacks=[fail])
    other.fit(data.x, data.y, shuffle=False, verbose=0)
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.parametrize("state", [None, 1, ([],)])
def test_exception_in_a_fit_of_ones_own(data, state, broken):
    """It is the one that arrives, whatever the loop calls its variables."""

    class Own(keras.Model):
        def call(self, x):
            return x

        def fit(self, x, y, state):
            return loss(y, self(x))

    loss = fragile(shift=1.0)
    with pytest.raises(ZeroDivisionError):
        Own().fit(data.y, data.y, state)
