"""Losses with arguments beside what people use with Keras: callbacks, tuners, wrappers, export.

Most models here are not trained: their loss is known, and what changes it is the argument.
"""

import keras
import numpy as np
import pytest

import losses
from helpers import (
    BACKEND,
    attached,
    error_of,
    fixed,
    linear_model,
    logs_of,
    predictions,
    step_itself,
    to_float,
)
from lossargs import attach, detach, live_args

pytestmark = pytest.mark.fit
SHIFTS = np.array([2, 1, 0, 1, 2, 3])  # of the epochs; best in the third


def fitted(model, data, *callbacks, epochs=6, **options):
    options = {"validation_data": (data.x, data.y), "verbose": 0, **options}
    return model.fit(data.x, data.y, epochs=epochs, callbacks=list(callbacks), **options).history


def up_and_down(shift):
    """Assigns a value in each epoch."""
    return keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: shift.assign(SHIFTS[e]))


# ---- Callbacks ----


def test_early_stopping(data):
    shift = fixed(0.0)
    model = attached(losses.shifted(shift), track=[losses.doubled(shift)])
    options = {"patience": 2, "mode": "min", "restore_best_weights": True}
    stopping = [
        keras.callbacks.EarlyStopping(monitor, **options)
        for monitor in ("val_shift", "val_doubled")
    ]
    history = fitted(model, data, up_and_down(shift), *stopping)
    assert history["shift"] == list(SHIFTS[:5])
    assert [(one.best_epoch, one.stopped_epoch) for one in stopping] == [(2, 4)] * 2
    assert to_float(shift) == 0  # of the best epoch, as all weights
    expected = {"loss": error_of(data), "shift": 0, "doubled": 2 * error_of(data)}
    assert logs_of(model, data.x, data.y) == pytest.approx(expected, rel=1e-5)


def test_learning_rates(data):
    """Callbacks set the optimizer's rate; a schedule in the loss counts steps."""
    shift = fixed(0.0)
    loss = losses.flexible(shift=shift, step=step_itself())
    model = attached(loss, rate=2.0**-20)
    reduce = keras.callbacks.ReduceLROnPlateau(
        "val_shift", factor=0.5, patience=1, mode="min", min_delta=0.5
    )
    history = fitted(model, data, up_and_down(shift), reduce, batch_size=6)
    rates = np.array(history["learning_rate"]) * 2**20
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.5, 0.25])
    assert history["shift"] == list(SHIFTS)
    assert history["step"] == pytest.approx([1, 3, 5, 7, 9, 11], abs=1e-4)
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-9 * (epoch + 1))
    history = fitted(model, data, scheduler, epochs=2, batch_size=6)
    assert history["learning_rate"] == pytest.approx([1e-9, 2e-9])
    assert history["step"] == pytest.approx([13, 15], abs=1e-4)


def test_tensorboard(tmp_path, data):
    pytest.importorskip("tensorflow", reason="Keras's TensorBoard callback writes by TensorFlow")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shift = fixed(0.0)
    model = attached(losses.shifted(shift), track=[losses.doubled(shift)])
    fitted(model, data, up_and_down(shift), keras.callbacks.TensorBoard(tmp_path))
    for folder in ("train", "validation"):
        events = EventAccumulator(str(tmp_path / folder)).Reload()

        def written(name, events=events):
            return [float(make_ndarray(e.tensor_proto)) for e in events.Tensors(f"epoch_{name}")]

        assert written("shift") == list(SHIFTS)
        np.testing.assert_allclose(written("loss"), error_of(data) + SHIFTS, rtol=1e-5)
        np.testing.assert_allclose(written("doubled"), 2 * (error_of(data) + SHIFTS), rtol=1e-5)


# ---- Optimizers ----


def learned_scale(optimizer, **live):
    """A model that is frozen, and whose loss is scaled by what the optimizer learns."""
    network = linear_model()
    network.trainable = False
    scale = losses.scaled(keras.Variable(1.0, name="scale"))
    loss = losses.both(first=scale, second=losses.shifted(fixed(0.0)), **live)
    model = attach(network, loss)
    model.compile(optimizer, loss=loss)
    return model


def test_averaged_weights(data):
    """The average of the optimizer is that of a learned argument too."""
    model = learned_scale(keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5), factor=0.0)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = fitted(model, data, swap, epochs=1, batch_size=6, shuffle=False)
    errors = (data.y - predictions(data.x)) ** 2
    steps = errors.reshape(2, -1).mean(axis=1)
    values = 1 - 0.1 * np.cumsum(steps)  # the derivative by the scale is the error
    assert to_float(live_args(model)["scale"]) == pytest.approx(np.mean(values), rel=1e-5)
    assert history["scale"] == pytest.approx([1 - 0.1 * steps[0]], rel=1e-5)


def test_gradient_accumulation(data):
    """A schedule counts steps of training, that is batches, and not updates of the optimizer."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model = learned_scale(optimizer, factor=step_itself())
    errors = np.mean((data.y - predictions(data.x)) ** 2, axis=-1).reshape(6, 2).mean(axis=1)
    logs = []
    for index in range(6):
        part = slice(2 * index, 2 * index + 2)
        model.reset_metrics()
        logs.append(model.train_on_batch(data.x[part], data.y[part], return_dict=True))
        expected = (logs[-1]["scale"] + index) * errors[index]
        assert logs[-1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert [one["factor"] for one in logs] == pytest.approx(range(6), abs=1e-4)
    updated = 1 - 0.1 * errors[:3].mean()
    assert [one["scale"] for one in logs] == pytest.approx([1] * 3 + [updated] * 3, rel=1e-5)
    last = to_float(live_args(model)["scale"])
    assert last == pytest.approx(updated - 0.1 * errors[3:].mean(), rel=1e-5)
    assert int(optimizer.iterations) == 2


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def test_loss_scale(data, mixed_float16):
    """The loss is scaled for the gradients only; live values keep float32."""
    scale = keras.Variable(1.0, name="scale")
    loss = losses.composed(main=losses.scaled(scale), weight=fixed(1 / 3, "weight"))
    model = attach(linear_model(), loss, track=[losses.doubled(0)])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=2.0**8)
    model.compile(optimizer, loss=loss)
    assert model.layers[0].compute_dtype == "float16"
    assert {v.dtype for v in live_args(model).values()} == {"float32"}
    error = error_of(data)
    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    assert logs["weight"] == np.float32(1 / 3)  # not what float16 makes of it
    assert logs["loss"] == pytest.approx(error / 3, rel=2e-3)
    assert logs["doubled"] == pytest.approx(2 * error, rel=2e-3)
    assert to_float(scale) == pytest.approx(1 - 0.5 * error / 3, rel=2e-3)
    assert to_float(optimizer.dynamic_scale) == 2**8


# ---- Searches ----


@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras_tuner.*")
def test_keras_tuner(tmp_path, data):
    tuner_of = pytest.importorskip("keras_tuner")

    def build(hp):
        gamma, live = hp.Float("gamma", 0.0, 5.0), fixed(hp.Float("live", 0.0, 100.0), "live")
        return attached(losses.flexible(gamma=gamma, live=live))

    tuner = tuner_of.RandomSearch(
        build, objective="val_loss", max_trials=2, seed=0, directory=tmp_path, project_name="t"
    )
    tuner.search(data.x, data.y, validation_data=(data.x, data.y), epochs=1, verbose=0)
    trials = tuner.oracle.trials.values()
    values = [trial.hyperparameters.values for trial in trials]
    assert len({value["gamma"] for value in values}) == len({v["live"] for v in values}) == 2
    expected = [error_of(data) + sum(value.values()) for value in values]
    assert [trial.score for trial in trials] == pytest.approx(expected, rel=1e-5)

    (best,) = tuner.get_best_models(1)
    logs, found = logs_of(best, data.x, data.y), tuner.get_best_hyperparameters(1)[0]
    assert logs == pytest.approx({"loss": min(expected), "live": found["live"]}, rel=1e-5)
    assert best.loss.args["gamma"] == found["gamma"]


def regressor(X, y, loss):  # noqa: N803
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    return attached(loss, model, 0.1)


def test_scikit_learn(data):
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    for loss in (losses.shifted(2), losses.shifted(np.ones(2)), losses.shifted(fixed(3.0))):
        estimator = keras.wrappers.SKLearnRegressor(regressor, model_kwargs={"loss": loss})
        assert base.clone(estimator).get_params()["model_kwargs"]["loss"] is loss
    grid = [losses.scaled(0.0), losses.scaled(1.0)]
    estimator = keras.wrappers.SKLearnRegressor(
        regressor, model_kwargs={"loss": grid[0]}, fit_kwargs={"epochs": 20, "verbose": 0}
    )
    search = selection.GridSearchCV(
        estimator, {"model_kwargs": [{"loss": loss} for loss in grid]}, cv=2, error_score="raise"
    )
    x = np.tile(data.x, (4, 1))
    search.fit(x, x.sum(axis=1))
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] < 0.1 < scores[1]  # what is scaled by zero learns nothing
    assert search.best_params_["model_kwargs"]["loss"] is grid[1]
    assert search.best_estimator_.model_.loss is grid[1]


# ---- Models that are changed or exported ----


def served(path, x):
    """What an exported model gives."""
    if BACKEND == "torch":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(path)
        feeds = zip(session.get_inputs(), x, strict=False)  # unused inputs are left out
        return session.run(None, {given.name: value for given, value in feeds})[0]
    import tensorflow as tf

    exported = tf.saved_model.load(path)
    return exported.serve(*x if len(x) == 1 else [x]).numpy()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.onnx.*")
@pytest.mark.filterwarnings("ignore:You are using the legacy:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The `native_serialization` parameter:DeprecationWarning")
@pytest.mark.parametrize("kind", ["variable", "input", "detached"])
def test_export(tmp_path, data, kind):
    for package in ("onnx", "onnxscript") if BACKEND == "torch" else ("tensorflow",):
        pytest.importorskip(
            package, reason="Keras exports by ONNX from PyTorch, else by TensorFlow"
        )
    of_an_input = losses.masked(mask=keras.Input((2,), name="mask"))
    model = attached(losses.shifted(fixed(3.0)) if kind == "variable" else of_an_input)
    model = detach(model) if kind == "detached" else model
    given = [data.x, data.mask.astype("float32")] if kind == "input" else [data.x]
    path = str(tmp_path / "exported")
    model.predict(given if len(given) > 1 else given[0], verbose=0)  # Keras asks for one call
    options = {"format": "onnx"} if BACKEND == "torch" else {}
    model.export(path, verbose=False, **options)
    np.testing.assert_allclose(served(path, given), predictions(data.x), rtol=1e-4, atol=1e-5)


# Two versions of Keras warn of layers that they do not quantize, each in its words.
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
@pytest.mark.filterwarnings("ignore:.*do not support quantization:UserWarning")
def test_quantization(tmp_path, data):
    model = attached(losses.shifted(fixed(3.0)))
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    quantized = model.predict(data.x, verbose=0)
    assert 0 < np.max(np.abs(quantized - predictions(data.x))) < 0.1
    model.save(tmp_path / "int8.keras")
    loaded = keras.saving.load_model(tmp_path / "int8.keras")
    live_args(loaded)["shift"].assign(1)
    error = np.mean((data.y - quantized) ** 2)
    for one, shift in ((model, 3), (loaded, 1)):
        logs = {"loss": error + shift, "shift": shift}
        assert logs_of(one, data.x, data.y) == pytest.approx(logs, rel=1e-4)


def test_lora(tmp_path, data):
    scale = keras.Variable(2.0, name="scale")
    model = attach(linear_model(), loss := losses.scaled(scale))
    model.layers[0].enable_lora(1)
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    names = {weight.name for weight in model.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b", "bias", "scale"}
    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    assert logs == pytest.approx({"loss": 2 * error_of(data), "scale": 2}, rel=1e-5)
    assert to_float(scale) == pytest.approx(2 - 0.1 * error_of(data), rel=1e-5)
    model.save(tmp_path / "lora.keras")
    loaded = keras.saving.load_model(tmp_path / "lora.keras")
    logs = logs_of(model, data.x, data.y)
    assert logs_of(loaded, data.x, data.y) == pytest.approx(logs, rel=1e-4)
