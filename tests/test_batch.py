"""Arguments that come with the batch, from every kind of data that Keras takes."""

import keras
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, KERAS, linear_model, message_of, predictions
from lossargs import ArgumentError, BatchError, with_args
from losses import masked, scaled, shifted


def masked_mse(data, rows=slice(None)):
    """The mean of `masked` over these rows, by NumPy."""
    error = np.square(data.y - predictions(data.x)) * data.mask
    return error.mean(axis=-1)[rows].mean()


def compiled(loss, **options):
    model = linear_model()
    model.compile(keras.optimizers.SGD(0.0), loss=loss, **options)  # weights stay as they are
    return model


def test_arrays(data):
    model, batch = compiled(masked()), {"mask": data.mask}
    expected = pytest.approx(masked_mse(data), rel=1e-5)
    assert model.evaluate(data.x, data.y, sample_weight=batch, verbose=0) == expected
    assert model.test_on_batch(data.x, data.y, sample_weight=batch) == expected
    assert model.predict(data.x, verbose=0).shape == (12, 2)


@pytest.mark.fit
def test_train_on_batch(data):
    model = compiled(masked())
    loss = model.train_on_batch(data.x, data.y, sample_weight={"mask": data.mask})
    assert loss == pytest.approx(masked_mse(data), rel=1e-5)


@pytest.mark.fit
def test_arrays_with_validation_data_and_split(data):
    batch = {"mask": data.mask}
    history = compiled(masked()).fit(
        data.x,
        data.y,
        sample_weight=batch,
        batch_size=4,
        validation_data=(data.x[:8], data.y[:8], {"mask": data.mask[:8]}),
        verbose=0,
    )
    assert history.history["loss"][0] == pytest.approx(masked_mse(data), rel=1e-5)
    expected = masked_mse(data, slice(8))
    assert history.history["val_loss"][0] == pytest.approx(expected, rel=1e-5)

    history = compiled(masked()).fit(
        data.x, data.y, sample_weight=batch, validation_split=0.25, verbose=0
    )
    expected = masked_mse(data, slice(9, 12))
    assert history.history["val_loss"][0] == pytest.approx(expected, rel=1e-5)


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
        dataset = Batches(data)
        yield from (dataset[index] for index in range(len(dataset)))


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
SOURCES += [tf_dataset] if BACKEND in ("tensorflow", "numpy") else []
SOURCES += [torch_loader] if BACKEND == "torch" else []


@pytest.mark.parametrize("source", SOURCES)
def test_other_sources(data, source):
    loss = compiled(masked()).evaluate(source(data), steps=3, verbose=0)
    assert loss == pytest.approx(masked_mse(data), rel=1e-5)


@pytest.mark.fit
@pytest.mark.parametrize("source", SOURCES)
def test_training_on_other_sources(data, source):
    history = compiled(masked()).fit(
        source(data),
        steps_per_epoch=3,
        validation_data=source(data),
        validation_steps=3,
        shuffle=False,  # Keras would warn that it cannot
        verbose=0,
    )
    assert history.history["loss"][0] == pytest.approx(masked_mse(data), rel=1e-5)
    assert history.history["val_loss"][0] == pytest.approx(masked_mse(data), rel=1e-5)


@pytest.mark.fit
@pytest.mark.filterwarnings("ignore")  # torch.compile warns of much inside Keras
@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}], ids=str)
@pytest.mark.skipif(
    BACKEND == "torch" and KERAS < (3, 12), reason="torch.compile fails on this Keras, on any loss"
)
def test_compiled_and_eager(data, options):
    model = compiled(masked(), **options)
    loss = model.train_on_batch(data.x, data.y, sample_weight={"mask": data.mask})
    assert loss == pytest.approx(masked_mse(data), rel=1e-5)


@pytest.mark.fit
@pytest.mark.skipif(BACKEND == "torch", reason="Keras has one step per execution on torch")
def test_several_steps_per_execution(data):
    model = compiled(masked(), steps_per_execution=3)
    history = model.fit(Batches(data), verbose=0)
    assert history.history["loss"][0] == pytest.approx(masked_mse(data), rel=1e-5)


def test_sample_weight_in_the_dict_is_the_ordinary_one(data):
    batch = {"mask": data.mask, "sample_weight": data.weight}
    error = (np.square(data.y - predictions(data.x)) * data.mask).mean(axis=-1)
    loss = compiled(masked()).evaluate(data.x, data.y, sample_weight=batch, verbose=0)
    assert loss == pytest.approx((error * data.weight).mean(), rel=1e-5)
    alone = {"sample_weight": data.weight}
    values = [
        compiled(shifted(1)).evaluate(data.x, data.y, sample_weight=weight, verbose=0)
        for weight in (alone, data.weight)
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.ones((12, 2), "bool"), "bool"),
        (np.ones((12, 2), "int32"), "int32"),
        (np.ones((12, 2), "uint8"), "uint8"),
        (np.ones((12, 2), "float32"), "float32"),
        (np.ones((12, 2), "float64"), "float32"),
        (np.ones((12, 2), "float16"), "float32"),
    ],
    ids=lambda value: str(getattr(value, "dtype", "")),
)
def test_dtypes(data, array, expected):
    seen = set()

    @with_args
    def watching(y_true, y_pred, *, mask):
        assert ops.is_tensor(mask)
        seen.add(keras.backend.standardize_dtype(mask.dtype))
        return keras.losses.mean_squared_error(y_true, y_pred)

    model = compiled(watching())
    model.evaluate(data.x, data.y, sample_weight={"mask": array}, verbose=0)
    model.test_on_batch(data.x, data.y, sample_weight={"mask": array})
    assert seen == {expected}


def test_batch_comes_before_the_bound_value_and_the_default(data):
    plain = compiled(scaled()).evaluate(data.x, data.y, verbose=0)
    batch = {"scale": np.full(12, 3.0)}
    for loss in (scaled(), scaled(2)):
        value = compiled(loss).evaluate(data.x, data.y, sample_weight=batch, verbose=0)
        assert value == pytest.approx(3 * plain, rel=1e-5)


def test_outputs_with_a_batch_each(data):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, {n: keras.layers.Dense(2, name=n)(inputs) for n in ("a", "b")})
    kernel = np.linspace(-1, 1, 6, dtype="float32").reshape(3, 2)
    model.set_weights([kernel, np.zeros(2), kernel, np.zeros(2)])
    model.compile(loss={"a": masked(), "b": shifted(1)})
    logs = model.test_on_batch(
        data.x,
        {"a": data.y, "b": data.y},
        sample_weight={"a": {"mask": data.mask}, "b": data.weight},
        return_dict=True,
    )
    assert logs["a_loss"] == pytest.approx(masked_mse(data), rel=1e-5)


@pytest.mark.parametrize("given", [None, np.ones(12)], ids=["nothing", "weights"])
def test_nothing_in_the_batch(data, given):
    with pytest.raises(ArgumentError, match="masked needs a value for 'mask'"):
        compiled(masked()).evaluate(data.x, data.y, sample_weight=given, verbose=0)


@pytest.mark.fit
def test_validation_data_without_the_batch(data):
    with pytest.raises(ArgumentError, match="also for validation and evaluate"):
        compiled(masked()).fit(
            data.x,
            data.y,
            sample_weight={"mask": data.mask},
            validation_data=(data.x, data.y),
            verbose=0,
        )


@pytest.mark.fit
def test_after_an_error_the_next_fit_works(data):
    model = compiled(masked())
    with pytest.raises(BatchError, match="'maks'.*Did you mean 'mask'"):
        model.fit(data.x, data.y, sample_weight={"maks": data.mask}, verbose=0)
    history = model.fit(data.x, data.y, sample_weight={"mask": data.mask}, verbose=0)
    assert history.history["loss"][0] == pytest.approx(masked_mse(data), rel=1e-5)


def test_factory_given_to_compile_without_calling_it(data):
    def two(y_true, y_pred, a, b):
        return y_true - y_pred + a + b

    for factory in (shifted, scaled, with_args(two)):
        with pytest.raises(ArgumentError) as error:
            compiled(factory).evaluate(data.x, data.y, verbose=0)
        assert "call it: loss=" in message_of(error.value)


@pytest.mark.fit
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_weighted_metrics_that_would_take_a_wrong_weight(data, run_eagerly):
    model = compiled(masked(), weighted_metrics=["mae"], run_eagerly=run_eagerly)
    with pytest.raises(BatchError) as error:
        model.fit(
            data.x,
            data.y,
            sample_weight={"mask": data.mask[:, 0], "sample_weight": data.weight},
            verbose=0,
        )
    text = message_of(error.value)
    assert text.startswith("weighted_metrics=['mae'] would be weighted by the batch entry 'mask'")
    assert text.endswith("Give these metrics as metrics=[...], without weights.")


def test_weighted_metrics_after_they_were_built(data):
    model = compiled(scaled(), weighted_metrics=["mae"])
    model.evaluate(data.x, data.y, verbose=0)
    with pytest.raises(
        BatchError, match=r"weighted_metrics=\['mae'\] would be weighted by .*'scale'"
    ):
        model.evaluate(data.x, data.y, sample_weight={"scale": data.weight}, verbose=0)


@pytest.mark.fit
def test_weighted_metrics_with_weights_only(data):
    model = compiled(shifted(1), weighted_metrics=["mae"])
    logs = [
        model.evaluate(data.x, data.y, sample_weight=weight, verbose=0, return_dict=True)["mae"]
        for weight in ({"sample_weight": data.weight}, data.weight)
    ]
    assert logs[0] == logs[1]
