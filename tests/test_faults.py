"""What goes wrong in a step is told by name, and what comes after it works."""

import gc
import weakref

import keras
import numpy as np
import pytest

from helpers import BACKEND, KERAS, attached, fixed, linear_model, logs_of
from lossargs import ArgumentError, BatchError, with_args
from losses import composed, masked, shifted

pytestmark = pytest.mark.fit
each = pytest.mark.parametrize
BROKEN = {"now": False}


@with_args
def fragile(y_true, y_pred, *, shift):
    if BROKEN["now"]:
        raise ZeroDivisionError("the user's own error")
    return keras.losses.mean_squared_error(y_true, y_pred) + shift


def compiled(loss, **options):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.01), loss=loss, **options)
    return model


def fitted(model, data, **options):
    return model.fit(data.x, data.y, shuffle=False, epochs=2, verbose=0, **options).history["loss"]


def assert_same(weights, others):
    for one, two in zip(weights, others, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


@each(("how", "eager"), [("fit", False), ("fit", True), ("evaluate", False)])
def test_exception_in_the_first_step(data, how, eager, monkeypatch):
    """Where Keras on JAX has taken the variables away, and would not bring them back."""
    monkeypatch.setitem(BROKEN, "now", True)
    shift = fixed(2.0)
    loss = fragile(shift=shift)
    model = attached(loss, rate=0.01, run_eagerly=eager)
    weights = model.get_weights()
    with pytest.raises(ZeroDivisionError, match="the user's own error") as error:
        getattr(model, how)(data.x, data.y, verbose=0)
    note = "".join(error.value.__notes__)
    assert "While computing the loss fragile with y_true: float32 (" in note
    assert "shift: float32 ()" in note
    assert_same(model.get_weights(), weights)
    monkeypatch.setitem(BROKEN, "now", False)
    shift.assign(5.0)
    expected = [value + 4 for value in fitted(compiled(fragile(shift=1.0)), data)]
    assert fitted(model, data) == pytest.approx(expected, rel=1e-5)
    gone = [weakref.ref(model.layers[-1]), weakref.ref(loss)]
    del error, model, loss, shift
    assert_gone(gone)


def assert_gone(references):
    keras.backend.clear_session()
    gc.collect()
    if BACKEND != "tensorflow":  # whose graphs keep what they were made of
        assert [reference() for reference in references] == [None] * len(references)


def test_nan_shows_in_the_logs_and_stops_the_run(data):
    model = attached(shifted(fixed(float("nan"))))
    stop = keras.callbacks.TerminateOnNaN()
    history = model.fit(data.x, data.y, epochs=5, verbose=0, callbacks=[stop]).history
    assert np.isnan([history["loss"], history["shift"]]).tolist() == [[True], [True]]


def test_exception_in_a_callback(data):
    """After an epoch the model has its variables, and keeps them."""
    model, other = (compiled(shifted(1.0)) for _ in range(2))
    fail = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, _: shifted()(data.y, data.y))
    with pytest.raises(ArgumentError, match="'shift'"):
        model.fit(data.x, data.y, shuffle=False, verbose=0, callbacks=[fail])
    other.fit(data.x, data.y, shuffle=False, verbose=0)
    assert_same(model.get_weights(), other.get_weights())


@each("state", [None, 1, ([],)])
def test_exception_in_a_fit_of_ones_own(data, state, monkeypatch):
    """It is the one that arrives, whatever the loop calls its variables."""
    monkeypatch.setitem(BROKEN, "now", True)

    class Own(keras.Model):
        def call(self, x):
            return x

        def fit(self, x, y, state):
            return fragile(shift=1.0)(y, self(x))

    with pytest.raises(ZeroDivisionError):
        Own().fit(data.y, data.y, state)


# ---- Batches ----

GOOD = np.ones((12, 2), "float32")
LENGTH, WIDTH = np.ones((5, 2), "float32"), np.ones((12, 5), "float32")
MISSING = "missing"


def of_shapes():
    """What the backend raises for shapes that do not fit."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.errors.InvalidArgumentError, r"Incompatible shapes|required broadcastable shapes"
    return {
        "jax": (TypeError, "got incompatible shapes for broadcasting"),
        "torch": (RuntimeError, r"The size of tensor a \(\d+\) must match .* tensor b \(\d+\)"),
    }[BACKEND]


@each("entry", [np.array(["a"] * 12), np.array([object()] * 12, dtype=object), None])
def test_entry_of_no_numbers(data, entry):
    with pytest.raises(BatchError, match="The batch entry 'mask' for masked"):
        masked()(data.y, data.y, {"mask": entry})


@each("mask", [LENGTH, WIDTH], ids=["length", "width"])
def test_entry_of_a_wrong_shape(data, mask):
    kind, text = of_shapes()
    with pytest.raises(kind, match=text) as error:
        masked()(data.y, data.y, {"mask": mask})
    assert f"mask: float32 {mask.shape}" in "".join(error.value.__notes__)


def test_entry_of_a_wrong_width_in_the_first_step(data):
    """All backends know the widths when they trace."""
    kind, text = of_shapes()
    if BACKEND == "tensorflow":
        kind, text = ValueError, "Dimensions must be equal, but are (2 and 5|5 and 2)"
    with pytest.raises(kind, match=text) as error:
        fitted(compiled(masked()), data, sample_weight={"mask": WIDTH})
    if KERAS >= (3, 16) and BACKEND == "tensorflow":
        return  # Keras wraps a ValueError, and TensorFlow drops the notes of the wrapped one
    note = "".join(error.value.__notes__)
    length = "None" if BACKEND == "tensorflow" else "12"
    assert f"y_pred: float32 ({length}, 2); mask: float32 ({length}, 5)" in note


def run(model, how, data, *masks):
    batches = ((data.x, data.y, {} if mask is MISSING else {"mask": mask}) for mask in masks)
    if how == "evaluate":
        return model.evaluate(batches, steps=len(masks), verbose=0)
    options = {"steps_per_epoch": len(masks), "shuffle": False, "verbose": 0}
    return model.fit(batches, **options).history["loss"][0]


def error_in_the_third_step(mask, *, eager):
    """The class of the error, its text, and what its notes say."""
    kind, text = of_shapes()
    if mask is LENGTH:
        # TensorFlow makes the graph for any length, and fails in a run.
        is_graph = BACKEND == "tensorflow" and not eager
        return (kind, "masked/", "") if is_graph else (kind, text, f"mask: float32 {mask.shape}")
    if BACKEND == "tensorflow":  # its data pipeline refuses an element unlike the first two
        return kind, r"dictionary key mismatch; expected key\(s\): .*'mask'", ""
    return ArgumentError, "masked needs .*'mask'", ""


@each(
    ("how", "eager", "live"),
    [("fit", False, True), ("fit", True, False), ("evaluate", False, False)],
)
def test_error_in_a_later_step(data, how, eager, live):
    """The model is then as the steps before left it, and continues from there."""
    shift = fixed(2.0)
    loss = composed(main=masked(), weight=shift) if live else masked()
    model, other = (
        attached(loss, rate=0.01) if live else compiled(loss, run_eagerly=eager) for _ in range(2)
    )
    for mask in (LENGTH, MISSING):
        kind, text, note = error_in_the_third_step(mask, eager=eager)
        with pytest.raises(kind, match=text) as error:
            run(model, how, data, GOOD, GOOD, mask)
        assert note in "".join(getattr(error.value, "__notes__", []))
        run(other, how, data, GOOD, GOOD)
        assert_same(model.get_weights(), other.get_weights())
        for then in ("evaluate", "fit"):
            one, two = (run(m, then, data, GOOD) for m in (model, other))
            assert one == pytest.approx(two, rel=1e-5)
    if live:
        shift.assign(5.0)
        batch = {"sample_weight": {"mask": GOOD}}
        assert logs_of(model, data.x, data.y, **batch)["weight"] == 5
        gone = [weakref.ref(model.layers[-1]), weakref.ref(loss)]
        del error, model, other, loss, shift
        assert_gone(gone)


def test_array_of_a_wrong_length_in_fit(data):
    """Keras compares the lengths itself, and does not know the names of the entries."""
    model = compiled(masked())
    with pytest.raises(ValueError, match="ambiguous") as error:
        fitted(model, data, sample_weight={"mask": LENGTH})
    assert "'sample_weight' sizes: 5" in str(error.value)
    good = {"sample_weight": {"mask": GOOD}}
    assert fitted(model, data, **good) == fitted(compiled(masked()), data, **good)
