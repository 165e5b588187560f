"""What goes wrong in a step is told by name, and what comes after it works."""

import gc
import weakref

import keras
import numpy as np
import pytest

import losses
from helpers import BACKEND, linear_model
from lossargs import BatchError, _carried, attach, with_args

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
    if BACKEND != "tensorflow":
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
    assert not _carried._by_id
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


def batches(data, *masks):
    for mask in masks:
        yield data.x, data.y, {"mask": mask}


@pytest.mark.parametrize("shape", [(5, 2), (12, 5)], ids=["length", "width"])
def test_entry_of_a_wrong_shape(data, shape):
    loss = losses.masked()
    model = compiled(loss)
    good, wrong = np.ones((12, 2), "float32"), np.ones(shape, "float32")
    expected = model.evaluate(batches(data, good), steps=1, verbose=0)
    with pytest.raises(Exception, match=r"(?s)") as error:
        model.evaluate(batches(data, wrong), steps=1, verbose=0)
    with pytest.raises(Exception, match=r"(?s)") as direct:
        loss(data.y, data.y, {"mask": wrong})
    note = f"mask: float32 {shape}"
    assert note in "".join(direct.value.__notes__)
    if BACKEND != "tensorflow":  # where the graph is made for any length, and fails when it runs
        assert note in "".join(error.value.__notes__)
    if BACKEND == "jax":  # where Keras keeps variables elsewhere during a step, and loses them here
        model = compiled(loss)
    assert model.evaluate(batches(data, good), steps=1, verbose=0) == pytest.approx(
        expected, rel=1e-6
    )
