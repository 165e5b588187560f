"""Live values, schedules and trained arguments are saved, loaded, and go on, on any backend."""

import json
import pickle
import textwrap

import keras
import numpy as np
import pytest

import losses
import vaes
from helpers import KERAS, TESTS, linear_model, predictions, run_python, to_float
from lossargs import AttachError, LossArgs, SavingError, attach, live_args

pytestmark = pytest.mark.fit


def variable(value=1.0, name="shift", **options):
    return keras.Variable(value, trainable=False, name=name, **options)


def everything():
    """A VAE whose beta is scheduled, with a variable, a trained argument and a constant."""
    x, z_mean, z_log_var, x_hat = vaes.tensors(
        sampled=False
    )  # Keras does not save the state of seeds

    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)
    total = losses.composed(
        main=losses.vae_loss(z_mean=z_mean, z_log_var=z_log_var, beta=schedule),
        weight=variable(0.5, "weight"),
    )
    trained = losses.gaussian(log_var=keras.Variable(0.25, name="log_var"))
    loss = losses.both(first=total, second=trained, factor=2.0)
    return keras.Model(x, attach(x_hat, loss, track=[losses.kl_term(
        z_mean=z_mean, z_log_var=z_log_var)])), loss  # fmt: skip


def fitted(model, epochs=1, **options):
    x = vaes.data()
    return model.fit(x, x, batch_size=10, epochs=epochs, shuffle=False, verbose=0, **options)


def numbers(model):
    x = vaes.data()
    return model.evaluate(x, x, batch_size=10, verbose=0, return_dict=True)


def weights_of(model):
    return [np.array(weight) for weight in model.get_weights()]


def assert_same(model, other):
    for one, two in zip(weights_of(model), weights_of(other), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_loaded_model_goes_on(tmp_path):
    model, loss = everything()
    model.compile("sgd", loss=loss)
    fitted(model)
    live_args(model)["weight"].assign(0.75)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")

    assert repr(loaded.loss) == repr(loss)
    assert {n: float(v.numpy()) for n, v in live_args(loaded).items()} == pytest.approx(
        {n: float(v.numpy()) for n, v in live_args(model).items()}
    )
    assert set(live_args(loaded)) == {"weight", "log_var"}
    assert not live_args(loaded)["weight"].trainable
    assert live_args(loaded)["log_var"].trainable
    for both_models in (loaded, model):
        live_args(both_models)["weight"].assign(0.125)
    assert numbers(loaded) == pytest.approx(numbers(model), rel=1e-5)
    logs, expected = fitted(loaded, 2).history, fitted(model, 2).history
    assert logs["beta"] == expected["beta"] == pytest.approx([7 / 9, 1])
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(loaded, model)

    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert repr(again.loss) == repr(loaded.loss)
    assert numbers(again) == pytest.approx(numbers(model), rel=1e-5)


FRESH = """
    import json, keras, losses, vaes
    import lossargs
    model = keras.saving.load_model({path!r}{options})
    {compile}
    x = vaes.data()
    live = {{n: float(v.numpy()) for n, v in lossargs.live_args(model).items()}}
    logs = model.evaluate(x, x, batch_size=10, verbose=0, return_dict=True)
    print(json.dumps([live, logs]))
"""


def test_fresh_process(tmp_path):
    model, loss = everything()
    model.compile("sgd", loss=loss)
    fitted(model)
    path = str(tmp_path / "model.keras")
    model.save(path)
    code = textwrap.dedent(FRESH.format(path=path, options="", compile=""))
    live, logs = json.loads(run_python(code).splitlines()[-1])
    assert live == pytest.approx({n: float(v.numpy()) for n, v in live_args(model).items()})
    assert logs == pytest.approx(numbers(model), rel=1e-5)


@pytest.mark.skipif(KERAS < (3, 15), reason="written by Keras 3.15, whose layers have more in them")
@pytest.mark.parametrize("written_on", ["jax", "tensorflow", "torch"])
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    expected = json.loads((folder / "live.json").read_text())
    model = keras.saving.load_model(folder / f"live-{written_on}.keras", compile=False)
    layer = next(layer for layer in model.layers if isinstance(layer, LossArgs))
    model.compile("sgd", loss=layer.loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    logs = model.evaluate(x, x[:, :2], verbose=0, return_dict=True)
    assert logs == pytest.approx(expected["logs"], rel=1e-5)
    names = live_args(model)
    assert {name: float(v.numpy()) for name, v in names.items()} == expected["live"]
    assert [name for name, v in names.items() if v.trainable] == expected["trainable"]
    history = model.fit(x, x[:, :2], batch_size=12, epochs=1, verbose=0).history
    assert history["schedule"] == pytest.approx([expected["logs"]["schedule"]])


def test_dtype_and_options_of_a_variable(tmp_path):
    count = variable(3, "count", dtype="int32")
    weights = keras.Variable(np.eye(2, dtype="float32"), name="weights")
    weights.constraint = keras.constraints.MaxNorm(3.0)
    weights.regularizer = keras.regularizers.L1(0.5)
    model = attach(linear_model(), losses.described(what=[count, weights]))
    model.save(tmp_path / "model.keras")
    loaded = live_args(keras.saving.load_model(tmp_path / "model.keras"))
    assert loaded["what_0"].dtype == "int32"
    assert loaded["what_0"].name == "count"
    assert loaded["what_1"].constraint.max_value == 3
    assert loaded["what_1"].regularizer.l1 == 0.5
    np.testing.assert_array_equal(loaded["what_1"].numpy(), np.eye(2))


def test_variable_shared_by_two_losses(tmp_path, data):
    x = keras.Input((3,), name="x")
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in ("a", "b")}
    log_var = keras.Variable(0.5, name="log_var")
    loss = {name: losses.gaussian(log_var=log_var) for name in outputs}
    model = keras.Model(x, attach(outputs, loss))
    model.compile("sgd", loss=loss)
    y = {"a": data.y, "b": 2 * data.y}
    model.fit(data.x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        assert list(live_args(one)) == ["log_var"]
        assert len(one.trainable_variables) == 5
        one.fit(data.x, y, epochs=3, verbose=0, shuffle=False)
    assert_same(loaded, model)


def test_clone_has_arguments_of_its_own(data):
    shift = variable(5.0)
    loss = losses.shifted(shift)
    model = attach(linear_model(), loss)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert live_args(clone)["shift"] is not shift
    clone.compile("sgd", loss=loss)
    with pytest.raises(AttachError, match="is attached to shifted.* and was compiled with shifted"):
        clone.evaluate(data.x, data.y, verbose=0)
    clone.compile("sgd", loss=clone.layers[-1].loss)
    live_args(clone)["shift"].assign(7.0)
    assert clone.evaluate(data.x, data.y, verbose=0, return_dict=True)["shift"] == 7
    assert float(shift.numpy()) == 5


@pytest.mark.parametrize("reads_tensors", [True, False])
def test_loaded_loss_with_another_constant(tmp_path, data, reads_tensors):
    network = linear_model()
    live = {"live": variable(5.0, "live")}
    if reads_tensors:
        live["tensor"] = network.inputs[0][:, 0]
    loss = losses.flexible(constant=1.0, **live)
    attach(network, loss).save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loss = loaded.layers[-1].loss.replace(constant=2.0)
    if reads_tensors:
        with pytest.raises(AttachError, match="'tensor' of .* this call of LossArgs gives none"):
            attach(linear_model(), loss)
    model = attach(loaded, loss)
    model.compile("sgd", loss=loss)
    live_args(model)["live"].assign(10.0)
    error = np.mean((data.y - predictions(data.x)) ** 2)
    expected = error + 12 + (data.x[:, 0].mean() if reads_tensors else 0)
    logs = model.evaluate(data.x, data.y, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)


def test_loss_alone_goes_through_pickle_and_json():
    loss = losses.flexible(a=variable(5.0), b=1)
    copied = pickle.loads(pickle.dumps(loss))
    assert repr(copied) == repr(loss)
    assert copied.args["a"] is not loss.args["a"]  # a variable of its own
    assert to_float(copied.args["a"].value) == 5
    configured = type(loss).from_config(loss.get_config())
    assert repr(configured) == repr(loss)
    assert to_float(configured.args["a"].value) == 5
    model = attach(linear_model(), loss)
    again = keras.models.model_from_json(model.to_json())
    assert repr(again.layers[-1].loss) == repr(loss)


# ---- Checkpoints ----


@pytest.mark.parametrize("weights_only", [True, False])
def test_model_checkpoint(tmp_path, weights_only):
    model, loss = everything()
    model.compile("sgd", loss=loss)
    path = str(tmp_path / ("c.weights.h5" if weights_only else "c.keras"))
    fitted(model, callbacks=[keras.callbacks.ModelCheckpoint(path, save_weights_only=weights_only)])
    expected = numbers(model)
    if weights_only:
        restored, loss = everything()
        restored.compile("sgd", loss=loss)
        restored.load_weights(path)
    else:
        restored = keras.saving.load_model(path)
    assert numbers(restored) == pytest.approx(expected, rel=1e-5)
    assert fitted(restored).history["beta"] == pytest.approx([7 / 9])


def test_backup_and_restore(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    straight, loss = everything()
    straight.compile("sgd", loss=loss)
    expected = fitted(straight, 4).history

    for attempt in range(2):
        model, loss = everything()
        model.compile("sgd", loss=loss)
        backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
        if attempt == 0:
            with pytest.raises(KeyboardInterrupt):
                fitted(model, 4, callbacks=[backup, Stop()])
        else:
            history = fitted(model, 4, callbacks=[backup]).history
    for name in ("beta", "loss", "kl_term"):
        assert history[name] == pytest.approx(expected[name][2:], rel=1e-5), name
    assert_same(model, straight)


def test_weight_of_a_layer_as_an_argument(tmp_path, data):
    network = linear_model()
    loss = losses.described(what=network.layers[0].kernel)
    model = attach(network, loss)
    model.compile("sgd", loss=loss)
    model.fit(data.x, data.y, verbose=0)
    with pytest.raises(SavingError, match="'what' of .* shares weights with the layer 'dense"):
        keras.models.clone_model(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert live_args(loaded)["what"] is loaded.layers[0].kernel
    assert len(loaded.weights) == len(model.weights) == 2
    for one in (model, loaded):
        one.fit(data.x, data.y, verbose=0)
    assert_same(loaded, model)
    model.save_weights(tmp_path / "model.weights.h5")


def test_saved_while_a_variable_is_nan(tmp_path):
    shift = variable(float("nan"))
    model = attach(linear_model(), losses.shifted(shift))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.isnan(live_args(loaded)["shift"].numpy())


def test_subclassed_model(tmp_path, data):
    loss = losses.masked()
    model = vaes.Subclassed(loss)
    model.compile("sgd", loss=loss)
    expected = model.evaluate(data.x, data.y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.evaluate(data.x, data.y, verbose=0) == pytest.approx(expected, rel=1e-6)
