"""Losses with arguments beside what people use with Keras: callbacks, tuners, wrappers, export.

Most models here are not trained: their loss is known, and what changes it is the argument.
"""

import csv

import keras
import numpy as np
import pytest

import losses
from helpers import BACKEND, linear_model, message_of, predictions, to_float
from lossargs import AttachError, LossArgs, attach, detach, live_args

pytestmark = pytest.mark.fit
SHIFTS = np.array([2, 1, 0, 1, 2, 3])  # of the epochs; best in the third


def variable(value=0.0, name="shift", **options):
    return keras.Variable(value, trainable=False, name=name, **options)


def frozen():
    return keras.optimizers.SGD(0.0)


def attached(loss, optimizer=None, model=None, **options):
    model = attach(model or linear_model(), loss, **options)
    model.compile(optimizer or frozen(), loss=loss)
    return model


def error_of(data):
    return float(np.mean((data.y - predictions(data.x)) ** 2))


def fitted(model, data, *callbacks, epochs=6, **options):
    options = {"validation_data": (data.x, data.y), "verbose": 0, **options}
    return model.fit(data.x, data.y, epochs=epochs, callbacks=list(callbacks), **options).history


def evaluated(model, data):
    return model.evaluate(data.x, data.y, verbose=0, return_dict=True)


def up_and_down(shift):
    """Assigns a value in each epoch."""
    return keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: shift.assign(SHIFTS[e]))


def loaded(path):
    return keras.saving.load_model(path)


@pytest.mark.parametrize("monitor", ["val_loss", "val_shift", "val_doubled"])
def test_early_stopping(data, monitor):
    shift = variable()
    model = attached(losses.shifted(shift), track=[losses.doubled(shift)])
    stopping = keras.callbacks.EarlyStopping(
        monitor, patience=2, mode="min", restore_best_weights=True
    )
    history = fitted(model, data, up_and_down(shift), stopping)
    assert history["shift"] == list(SHIFTS[:5])
    assert stopping.best_epoch == 2
    assert to_float(shift) == 0  # of the best epoch, as all weights
    expected = {"loss": error_of(data), "shift": 0, "doubled": 2 * error_of(data)}
    assert evaluated(model, data) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights_only", [True, False])
def test_model_checkpoint(tmp_path, data, weights_only):
    shift = variable()
    loss = losses.shifted(shift)
    path = tmp_path / ("best.weights.h5" if weights_only else "best.keras")
    checkpoint = keras.callbacks.ModelCheckpoint(
        path, "val_loss", save_best_only=True, save_weights_only=weights_only
    )
    model = attached(loss)
    fitted(model, data, up_and_down(shift), checkpoint)
    assert to_float(shift) == SHIFTS[-1]
    if weights_only:
        model.load_weights(path)
        best = model
    else:
        best = loaded(path)
        assert live_args(best)["shift"] is not shift
    assert to_float(live_args(best)["shift"]) == 0
    assert evaluated(best, data) == pytest.approx({"loss": error_of(data), "shift": 0}, rel=1e-5)
    live_args(best)["shift"].assign(4)
    assert evaluated(best, data)["loss"] == pytest.approx(error_of(data) + 4, rel=1e-5)


def test_csv_logger(tmp_path, data):
    shift = variable()
    model = attached(losses.shifted(shift), track=[losses.doubled(shift)])
    fitted(model, data, up_and_down(shift), keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = {"loss", "shift", "doubled"}
    assert set(rows[0]) == {"epoch", *names, *(f"val_{name}" for name in names)}
    for prefix in ("", "val_"):
        assert [float(row[f"{prefix}shift"]) for row in rows] == list(SHIFTS)
        np.testing.assert_allclose(
            [float(row[f"{prefix}loss"]) for row in rows], error_of(data) + SHIFTS, rtol=1e-5
        )
        np.testing.assert_allclose(
            [float(row[f"{prefix}doubled"]) for row in rows],
            2 * (error_of(data) + SHIFTS),
            rtol=1e-5,
        )


@pytest.mark.parametrize("monitor", ["val_loss", "val_shift"])
def test_reduce_lr_on_plateau(data, monitor):
    shift = variable()
    model = attached(losses.shifted(shift), keras.optimizers.SGD(2.0**-20))
    reduce = keras.callbacks.ReduceLROnPlateau(
        monitor, factor=0.5, patience=1, mode="min", min_delta=0.5
    )
    history = fitted(model, data, up_and_down(shift), reduce)
    rates = np.array(history["learning_rate"]) * 2**20
    np.testing.assert_allclose(rates, [1, 1, 1, 1, 0.5, 0.25])
    assert history["shift"] == list(SHIFTS)


def test_learning_rate_scheduler(data):
    """It sets the optimizer's rate; a schedule in the loss goes its own way."""
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)  # the step itself
    model = attached(losses.shifted(schedule))
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch: 1e-9 * (epoch + 1))
    history = fitted(model, data, scheduler, epochs=3, batch_size=6)
    assert history["shift"] == pytest.approx([1, 3, 5], abs=1e-4)
    assert history["learning_rate"] == pytest.approx([1e-9, 2e-9, 3e-9])


class Interrupted(Exception):  # noqa: N818
    pass


def test_backup_and_restore(tmp_path, data):
    """An interrupted run goes on where it was: weights, a live value, and the place of a schedule.

    `test_kill.py` does so with killed processes.
    """
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)  # the step itself

    def trained(*callbacks, stop_in=None):
        shift = variable()
        model = attached(losses.flexible(shift=shift, step=schedule), keras.optimizers.SGD(0.1))

        def assign(epoch, logs):
            if epoch == stop_in:
                raise Interrupted
            live_args(model)["shift"].assign(to_float(shift) + 1)  # so that it depends on its past

        assigning = keras.callbacks.LambdaCallback(on_epoch_begin=assign)
        options = {"epochs": 4, "batch_size": 6, "shuffle": False}
        return model, lambda: fitted(model, data, *callbacks, assigning, **options)

    model, run = trained()
    expected = run()
    assert expected["shift"] == [1, 2, 3, 4]
    assert expected["step"] == pytest.approx([1, 3, 5, 7], abs=1e-4)

    backup = tmp_path / "backup"
    _, run = trained(keras.callbacks.BackupAndRestore(backup), stop_in=2)
    with pytest.raises(Interrupted):
        run()
    resumed, run = trained(keras.callbacks.BackupAndRestore(backup))
    history = run()
    assert set(history) == set(expected)
    for name, values in history.items():
        assert values == pytest.approx(expected[name][2:], rel=1e-5), name
    for one, two in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5)


def test_tensorboard(tmp_path, data):
    pytest.importorskip("tensorflow", reason="Keras's TensorBoard callback writes by TensorFlow")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    shift = variable()
    model = attached(losses.shifted(shift), track=[losses.doubled(shift)])
    fitted(model, data, up_and_down(shift), keras.callbacks.TensorBoard(tmp_path))
    for folder in ("train", "validation"):
        events = EventAccumulator(str(tmp_path / folder)).Reload()

        def written(name, events=events):
            return [float(make_ndarray(e.tensor_proto)) for e in events.Tensors(f"epoch_{name}")]

        assert written("shift") == list(SHIFTS)
        np.testing.assert_allclose(written("loss"), error_of(data) + SHIFTS, rtol=1e-5)
        np.testing.assert_allclose(written("doubled"), 2 * (error_of(data) + SHIFTS), rtol=1e-5)


def test_averaged_weights(data):
    """The average of the optimizer is that of a learned argument too."""
    network = linear_model()
    network.trainable = False
    scale = keras.Variable(1.0, name="scale")
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)
    model = attached(losses.scaled(scale), optimizer, network)
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    history = fitted(model, data, swap, epochs=1, batch_size=6, shuffle=False)
    errors = (data.y - predictions(data.x)) ** 2
    steps = errors.reshape(2, -1).mean(axis=1)
    values = 1 - 0.1 * np.cumsum(steps)  # the derivative by the scale is the error
    assert to_float(live_args(model)["scale"]) == pytest.approx(np.mean(values), rel=1e-5)
    assert history["scale"] == pytest.approx([1 - 0.1 * steps[0]], rel=1e-5)


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has no steps_per_execution on PyTorch")
def test_steps_per_execution(data):
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)
    loss = losses.shifted(schedule)
    model = attach(linear_model(), loss)
    model.compile(frozen(), loss=loss, steps_per_execution=2)
    history = fitted(model, data, epochs=2, batch_size=3)
    assert history["shift"] == pytest.approx([3, 7], abs=1e-4)
    assert history["loss"] == pytest.approx([error_of(data) + 1.5, error_of(data) + 5.5], rel=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:keras_tuner.*")
def test_keras_tuner(tmp_path, data):
    tuner_of = pytest.importorskip("keras_tuner")
    built = []

    def build(hp):
        gamma = hp.Float("gamma", 0.0, 5.0)
        loss = losses.flexible(
            gamma=gamma,
            offset=hp.Choice("offset", [0.0, 10.0]),
            live=variable(hp.Float("live", 0.0, 100.0), "live"),
        )
        built.append(gamma)
        return attached(loss)

    tuner = tuner_of.RandomSearch(
        build, objective="val_loss", max_trials=4, seed=0, directory=tmp_path, project_name="t"
    )
    tuner.search(data.x, data.y, validation_data=(data.x, data.y), epochs=1, verbose=0)
    trials = list(tuner.oracle.trials.values())
    values = [trial.hyperparameters.values for trial in trials]
    assert len({value["gamma"] for value in values}) == 4
    assert len({value["live"] for value in values}) == 4
    assert {value["gamma"] for value in values} <= set(built)
    expected = [error_of(data) + sum(value.values()) for value in values]
    assert [trial.score for trial in trials] == pytest.approx(expected, rel=1e-5)

    (best,) = tuner.get_best_models(1)
    logs = evaluated(best, data)
    assert logs["loss"] == pytest.approx(min(expected), rel=1e-5)
    assert best.loss.args["gamma"] == tuner.get_best_hyperparameters(1)[0]["gamma"]
    assert logs["live"] == pytest.approx(tuner.get_best_hyperparameters(1)[0]["live"])
    best.save(tmp_path / "best.keras")
    assert evaluated(loaded(tmp_path / "best.keras"), data) == pytest.approx(logs, rel=1e-5)


def regressor(X, y, loss):  # noqa: N803
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, kernel_initializer="zeros")])
    return attached(loss, keras.optimizers.SGD(0.1), model)


@pytest.mark.nightly
def test_grid_search_of_a_regressor(data):
    selection = pytest.importorskip("sklearn.model_selection")
    grid = [losses.scaled(0.0), losses.scaled(1.0)]
    estimator = keras.wrappers.SKLearnRegressor(
        regressor, model_kwargs={"loss": grid[0]}, fit_kwargs={"epochs": 20, "verbose": 0}
    )
    search = selection.GridSearchCV(
        estimator, {"model_kwargs": [{"loss": loss} for loss in grid]}, cv=2, error_score="raise"
    )
    x = np.tile(data.x, (4, 1))
    search.fit(x, x.sum(axis=1))
    given = [params["model_kwargs"]["loss"] for params in search.cv_results_["params"]]
    assert all(one is two for one, two in zip(given, grid, strict=True))
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] < 0.1 < scores[1]  # what is scaled by zero learns nothing
    assert search.best_params_["model_kwargs"]["loss"] is grid[1]
    assert search.best_estimator_.model_.loss is search.best_params_["model_kwargs"]["loss"]


def classifier(X, y, loss):  # noqa: N803
    layer = keras.layers.Dense(3, "softmax", kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((3,)), layer])
    model.compile(keras.optimizers.SGD(1.0), loss=loss)
    return model


@pytest.mark.nightly
def test_grid_search_of_a_classifier(data):
    selection = pytest.importorskip("sklearn.model_selection")
    grid = [losses.focal(alpha=0.0), losses.focal(alpha=1.0, gamma=1.0)]
    estimator = keras.wrappers.SKLearnClassifier(
        classifier, model_kwargs={"loss": grid[0]}, fit_kwargs={"epochs": 20, "verbose": 0}
    )
    search = selection.GridSearchCV(
        estimator, {"model_kwargs": [{"loss": loss} for loss in grid]}, cv=2, error_score="raise"
    )
    x = np.tile(data.x, (4, 1))
    search.fit(x, np.argmax(x, axis=1))
    assert search.best_params_["model_kwargs"]["loss"] is grid[1]
    assert np.mean(search.predict(x).ravel() == np.argmax(x, axis=1)) > 0.8


def test_cloned_estimators_keep_the_loss():
    base = pytest.importorskip("sklearn.base")
    shift = variable(3.0)
    for loss in (losses.shifted(2), losses.shifted(np.ones(2)), losses.shifted(shift)):
        estimator = keras.wrappers.SKLearnRegressor(regressor, model_kwargs={"loss": loss})
        clone = base.clone(estimator)
        assert clone is not estimator
        assert clone.get_params()["model_kwargs"]["loss"] is loss


@pytest.mark.parametrize("functional", [True, False])
def test_clone_model(data, functional):
    """A clone has live values of its own, and a loss: that of its layer."""
    shift = variable(3.0)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)
    loss = losses.flexible(shift=shift, step=schedule)
    model = linear_model()
    if functional:
        model = keras.Model(model.inputs[0], model.outputs[0])
    model = attached(loss, model=model)
    fitted(model, data, epochs=4)
    clone = keras.models.clone_model(model)
    assert type(clone) is type(model)
    copy = live_args(clone)["shift"]
    assert copy is not shift
    assert to_float(copy) == 3

    clone.compile(frozen(), loss=loss)
    with pytest.raises(AttachError) as error:
        clone.fit(data.x, data.y, verbose=0)
    assert "For a model that was loaded or cloned" in message_of(error.value)
    (layer,) = [layer for layer in clone.layers if isinstance(layer, LossArgs)]
    clone.compile(frozen(), loss=layer.loss)
    copy.assign(5)
    assert to_float(shift) == 3
    assert evaluated(clone, data)["step"] == 0  # as all that layers count
    clone.set_weights(model.get_weights())
    logs = evaluated(clone, data)
    assert logs == pytest.approx({"loss": error_of(data) + 7, "shift": 3, "step": 4}, rel=1e-5)
    copy.assign(0)
    assert evaluated(model, data) == pytest.approx(logs, rel=1e-5)


def with_mask():
    """A model with an input that only its loss reads."""
    model, mask = linear_model(), keras.Input((2,), name="mask")
    loss = losses.masked(mask=mask)
    return attached(loss, model=model)


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
    if BACKEND == "torch":
        pytest.importorskip("onnx", reason="Keras exports by ONNX from PyTorch")
        pytest.importorskip("onnxscript", reason="Keras exports by ONNX from PyTorch")
    else:
        pytest.importorskip("tensorflow", reason="Keras exports by TensorFlow from JAX")
    model = attached(losses.shifted(variable(3.0))) if kind == "variable" else with_mask()
    if kind == "detached":
        model = detach(model)
    given = [data.x, data.mask.astype("float32")] if kind == "input" else [data.x]
    path = str(tmp_path / "exported")
    model.predict(given if len(given) > 1 else given[0], verbose=0)  # Keras asks for one call
    options = {"format": "onnx"} if BACKEND == "torch" else {}
    model.export(path, verbose=False, **options)
    np.testing.assert_allclose(served(path, given), predictions(data.x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method:UserWarning")
def test_quantization(tmp_path, data):
    shift = variable(3.0)
    model = attached(losses.shifted(shift))
    model.quantize("int8")
    assert model.layers[0].quantization_mode == "int8"
    quantized = model.predict(data.x, verbose=0)
    assert 0 < np.max(np.abs(quantized - predictions(data.x))) < 0.1
    expected = np.mean((data.y - quantized) ** 2)
    assert evaluated(model, data)["loss"] == pytest.approx(expected + 3, rel=1e-4)
    live_args(model)["shift"].assign(1)
    assert evaluated(model, data)["loss"] == pytest.approx(expected + 1, rel=1e-4)
    model.save(tmp_path / "int8.keras")
    again = loaded(tmp_path / "int8.keras")
    logs = {"loss": expected + 1, "shift": 1}
    assert evaluated(again, data) == pytest.approx(logs, rel=1e-4)


def test_lora(tmp_path, data):
    scale = keras.Variable(2.0, name="scale")
    loss = losses.scaled(scale)
    model = attach(linear_model(), loss)
    dense = model.layers[0]
    kernel = np.array(keras.ops.convert_to_numpy(dense.kernel))
    dense.enable_lora(1)
    model.compile(keras.optimizers.SGD(0.1), loss=loss)
    names = {weight.name for weight in model.trainable_variables}
    assert names == {"lora_kernel_a", "lora_kernel_b", "bias", "scale"}
    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    assert logs == pytest.approx({"loss": 2 * error_of(data), "scale": 2}, rel=1e-5)
    assert to_float(scale) == pytest.approx(2 - 0.1 * error_of(data), rel=1e-5)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(dense._kernel), kernel)
    before = evaluated(model, data)
    model.save(tmp_path / "lora.keras")
    again = loaded(tmp_path / "lora.keras")
    assert evaluated(again, data) == pytest.approx(before, rel=1e-4)
    assert to_float(live_args(again)["scale"]) == pytest.approx(to_float(scale))


def test_gradient_accumulation(data):
    """A schedule counts steps of training, that is batches, and not updates of the optimizer."""
    network = linear_model()
    network.trainable = False
    scale = keras.Variable(1.0, name="scale")
    step = keras.optimizers.schedules.PolynomialDecay(0.0, 100, 100.0)
    loss = losses.both(
        first=losses.scaled(scale), second=losses.shifted(variable(0.0)), factor=step
    )
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=3)
    model = attached(loss, optimizer, network)
    errors = np.mean((data.y - predictions(data.x)) ** 2, axis=-1).reshape(6, 2).mean(axis=1)
    scales, factors = [], []
    for index in range(6):
        part = slice(2 * index, 2 * index + 2)
        model.reset_metrics()
        logs = model.train_on_batch(data.x[part], data.y[part], return_dict=True)
        scales.append(logs["scale"])
        factors.append(logs["factor"])
        expected = (logs["scale"] + index) * errors[index]
        assert logs["loss"] == pytest.approx(expected, rel=1e-4)
    assert factors == pytest.approx(range(6), abs=1e-4)
    updated = 1 - 0.1 * errors[:3].mean()
    assert scales == pytest.approx([1] * 3 + [updated] * 3, rel=1e-5)
    assert to_float(scale) == pytest.approx(updated - 0.1 * errors[3:].mean(), rel=1e-5)
    assert int(optimizer.iterations) == 2


@pytest.fixture
def mixed_float16():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


def test_loss_scale(data, mixed_float16):
    """The loss is scaled for the gradients only; live values keep float32."""
    shift, scale = variable(1 / 3), keras.Variable(1.0, name="scale")
    inner = losses.scaled(scale)
    loss = losses.composed(main=inner, weight=shift)
    model = attach(linear_model(), loss, track=[losses.doubled(0)])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5), initial_scale=2.0**8)
    model.compile(optimizer, loss=loss)
    assert model.layers[0].compute_dtype == "float16"
    assert {keras.backend.standardize_dtype(v.dtype) for v in live_args(model).values()} == {
        "float32"
    }
    error = error_of(data)
    logs = model.train_on_batch(data.x, data.y, return_dict=True)
    assert logs["weight"] == np.float32(1 / 3)  # not what float16 makes of it
    assert logs["loss"] == pytest.approx(error / 3, rel=2e-3)
    assert logs["doubled"] == pytest.approx(2 * error, rel=2e-3)
    assert to_float(scale) == pytest.approx(1 - 0.5 * error / 3, rel=2e-3)
    assert to_float(optimizer.dynamic_scale) == 2**8
