"""Arguments that come with the batch, from every kind of data that Keras takes."""

import keras
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, KERAS, attached, fixed, linear_model, predictions, raising
from lossargs import ArgumentError, BatchError, with_args
from losses import masked, scaled, shifted

each = pytest.mark.parametrize


def masked_mse(data, rows=slice(None)):
    """The mean of `masked` over these rows, by NumPy."""
    error = np.square(data.y - predictions(data.x)) * data.mask
    return pytest.approx(error.mean(axis=-1)[rows].mean(), rel=1e-5)


def compiled(loss, **options):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.0), loss=loss, **options)  # weights stay as they are
    return model


def evaluated(loss, data, batch, **options):
    return compiled(loss, **options).evaluate(data.x, data.y, sample_weight=batch, verbose=0)


def test_arrays(data):
    model, batch = compiled(masked()), {"mask": data.mask}
    assert model.evaluate(data.x, data.y, sample_weight=batch, verbose=0) == masked_mse(data)
    assert model.test_on_batch(data.x, data.y, sample_weight=batch) == masked_mse(data)
    assert model.predict(data.x, verbose=0).shape == (12, 2)
    # One row is for all samples.
    row = np.array([[0.5, 2.0]], "float32")
    model.reset_metrics()
    value = model.test_on_batch(data.x, data.y, sample_weight={"mask": row})
    data.mask = row
    assert value == masked_mse(data)


@pytest.mark.fit
def test_arrays_with_validation_data_and_split(data):
    model, batch = compiled(masked()), {"mask": data.mask}
    with pytest.raises(BatchError, match="'maks'.*Did you mean 'mask'"):  # in the first build
        model.fit(data.x, data.y, sample_weight={"maks": data.mask}, verbose=0)
    assert model.train_on_batch(data.x, data.y, sample_weight=batch) == masked_mse(data)
    options = {"sample_weight": batch, "batch_size": 4, "verbose": 0}
    validation = (data.x[:8], data.y[:8], {"mask": data.mask[:8]})
    history = model.fit(data.x, data.y, validation_data=validation, **options).history
    assert history["loss"][0] == masked_mse(data)
    assert history["val_loss"][0] == masked_mse(data, slice(8))
    history = model.fit(data.x, data.y, validation_split=0.25, **options).history
    assert history["val_loss"][0] == masked_mse(data, slice(9, 12))
    with pytest.raises(ArgumentError, match="also for validation"):
        model.fit(data.x, data.y, validation_data=(data.x, data.y), **options)


class Batches(keras.utils.PyDataset):
    def __init__(self, data):
        super().__init__()
        self.data = data

    def __len__(self):
        return 3

    def __getitem__(self, index):
        rows = slice(4 * index, 4 * index + 4)
        return self.data.x[rows], self.data.y[rows], {"mask": self.data.mask[rows]}


def generator(data):
    while True:
        yield from (Batches(data)[index] for index in range(3))


def tf_dataset(data):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices((data.x, data.y, {"mask": data.mask})).batch(4)


def torch_loader(data):
    torch = pytest.importorskip("torch")

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, row):
            return data.x[row], data.y[row], {"mask": data.mask[row]}

    return torch.utils.data.DataLoader(Rows(), batch_size=4)


SOURCES = [Batches, generator]
SOURCES += [tf_dataset] if BACKEND == "tensorflow" else []
SOURCES += [torch_loader] if BACKEND == "torch" else []


@each("source", SOURCES)
def test_other_sources(data, source):
    model = compiled(masked())
    assert model.evaluate(source(data), steps=3, verbose=0) == masked_mse(data)
    if BACKEND == "numpy":
        return
    history = model.fit(
        source(data), steps_per_epoch=3, validation_data=source(data), validation_steps=3,
        shuffle=False, verbose=0,  # Keras would warn that it cannot shuffle
    ).history  # fmt: skip
    assert [history["loss"][0], history["val_loss"][0]] == [masked_mse(data)] * 2


@pytest.mark.fit
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per execution on torch")
def test_several_steps_per_execution(data):
    history = compiled(masked(), steps_per_execution=3).fit(Batches(data), verbose=0).history
    assert history["loss"][0] == masked_mse(data)


def test_sample_weight_in_the_dict_is_the_ordinary_one(data):
    value = evaluated(masked(), data, {"mask": data.mask, "sample_weight": data.weight})
    data.mask = data.mask * data.weight[:, None]
    assert value == masked_mse(data)
    alone, ordinary = (
        evaluated(shifted(1), data, weight, weighted_metrics=["mae"])
        for weight in ({"sample_weight": data.weight}, data.weight)
    )
    assert alone == ordinary


def test_dtypes(data):
    seen = {}

    @with_args
    def watching(y_true, y_pred, **entries):
        for name, value in entries.items():
            assert ops.is_tensor(value)
            seen.setdefault(name, set()).add(keras.backend.standardize_dtype(value.dtype))
        return keras.losses.mean_squared_error(y_true, y_pred)

    names = ["bool", "int32", "uint8", "float16", "float32", "float64"]
    batch = {name: np.ones((12, 2), name) for name in names}
    model = compiled(watching())
    model.evaluate(data.x, data.y, sample_weight=batch, verbose=0)
    model.test_on_batch(data.x, data.y, sample_weight=batch)
    assert seen == {name: {"float32" if "float" in name else name} for name in names}


def test_outputs_with_a_batch_each(data):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {n: keras.layers.Dense(2, name=n)(inputs) for n in ("a", "b")})
    model.set_weights(linear_model().get_weights() * 2)
    model.compile(loss={"a": masked(), "b": shifted(1)})
    batch = {"a": {"mask": data.mask}, "b": data.weight}
    y = {"a": data.y, "b": data.y}
    logs = model.test_on_batch(data.x, y, sample_weight=batch, return_dict=True)
    assert logs["a_loss"] == masked_mse(data)


@pytest.mark.fit
def test_no_targets():
    @with_args
    def energy(y_true, y_pred, scale):
        assert y_true is None
        return scale * ops.mean(y_pred**2, axis=-1)

    x, weight = np.ones((8, 3), "float32"), np.arange(8, dtype="float32")
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model = attached(energy(fixed(2.0)), network, track=[energy.options(name="other")(4.0)])
    expected = 2 * model.predict(x, verbose=0)[:, 0] ** 2
    history = model.fit(x, validation_data=(x,), verbose=0).history
    assert [*history["loss"], *history["val_loss"]] == pytest.approx([np.mean(expected)] * 2)
    assert history["other"] == pytest.approx([2 * np.mean(expected)])
    if KERAS < (3, 15) and BACKEND == "torch":
        return  # a generator's batch cannot hold None there
    batches = ((x, None, {"sample_weight": weight}) for _ in range(2))
    history = model.fit(batches, steps_per_epoch=2, shuffle=False, verbose=0).history
    assert history["loss"] == pytest.approx([np.mean(weight * expected)])


# ---- Errors ----


@pytest.mark.fit
def test_weighted_metrics_that_would_take_a_wrong_weight(data):
    model = compiled(masked(), weighted_metrics=["mae"], run_eagerly=True)
    batch = {"mask": data.mask[:, 0], "sample_weight": data.weight}
    with raising(BatchError, "weighted_metrics=['mae']", "'mask'", "metrics=[...]"):
        model.fit(data.x, data.y, sample_weight=batch, verbose=0)
    model = compiled(scaled(), weighted_metrics=["mae"])
    model.evaluate(data.x, data.y, verbose=0)  # builds the metrics
    with pytest.raises(BatchError, match=r"weighted_metrics=\['mae'\].*'scale'"):
        model.evaluate(data.x, data.y, sample_weight={"scale": data.weight}, verbose=0)
