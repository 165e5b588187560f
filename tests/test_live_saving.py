"""Live values, schedules and trained arguments are saved, loaded, and continue, on any backend."""

import copy
import json
import pickle
import textwrap

import keras
import numpy as np
import pytest

import kinds
import losses
import vaes
from helpers import (
    TESTS,
    attached,
    each_writer,
    error_of,
    fixed,
    layer_of,
    linear_model,
    logs_of,
    run_python,
    to_float,
)
from lossargs import AttachError, SavingError, attach, live_args, with_args

pytestmark = pytest.mark.fit


def everything():
    """A VAE whose beta is scheduled, with a variable, a trained argument and a constant."""
    # Not sampled: Keras does not save the state of seeds.
    x, z_mean, z_log_var, x_hat = vaes.tensors(sampled=False)
    schedule = keras.optimizers.schedules.PolynomialDecay(0.0, 9, 1.0)
    kl = losses.kl_term(z_mean=z_mean, z_log_var=z_log_var)
    total = losses.composed(
        main=losses.vae_loss(z_mean=z_mean, z_log_var=z_log_var, beta=schedule),
        weight=fixed(0.5, "weight"),
    )
    trained = losses.gaussian(log_var=keras.Variable(0.25, name="log_var"))
    loss = losses.both(first=total, second=trained, factor=2.0)
    model = keras.Model(x, attach(x_hat, loss, track=[kl]))
    model.compile("sgd", loss=loss)
    return model


def fitted(model, epochs=1):
    x = vaes.data()
    return model.fit(x, x, batch_size=10, epochs=epochs, shuffle=False, verbose=0).history


def numbers(model):
    return logs_of(model, vaes.data(), vaes.data(), batch_size=10)


def live_values(model):
    return {name: to_float(variable) for name, variable in live_args(model).items()}


def assert_same(model, other):
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_loaded_model_continues(tmp_path):
    model = everything()
    fitted(model)
    live_args(model)["weight"].assign(0.75)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert repr(loaded.loss) == repr(model.loss)
    assert live_values(loaded) == pytest.approx(live_values(model))
    assert {name: v.trainable for name, v in live_args(loaded).items()} == {
        "weight": False, "log_var": True
    }  # fmt: skip
    for one in (loaded, model):
        live_args(one)["weight"].assign(0.125)
    assert numbers(loaded) == pytest.approx(numbers(model), rel=1e-5)
    logs, expected = fitted(loaded, 2), fitted(model, 2)
    assert logs["beta"] == expected["beta"] == pytest.approx([7 / 9, 1])
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(loaded, model)

    loaded.save(tmp_path / "again.keras")
    again = keras.saving.load_model(tmp_path / "again.keras")
    assert repr(again.loss) == repr(loaded.loss)
    assert numbers(again) == pytest.approx(numbers(model), rel=1e-5)


FRESH = """
    import json, keras, kinds, losses, vaes, lossargs
    model = keras.saving.load_model("everything.keras")
    x = vaes.data()
    print(json.dumps(model.evaluate(x, x, batch_size=10, verbose=0, return_dict=True)))
    print(json.dumps({n: float(v.numpy()) for n, v in lossargs.live_args(model).items()}))
    print(json.dumps(kinds.averages(keras.saving.load_model("average.keras"), [0, 1])))
"""


def test_fresh_process(tmp_path):
    model, average = everything(), kinds.averaging_model()
    fitted(model)
    assert kinds.averages(average, [8, 8]) == [4, 6]
    model.save(tmp_path / "everything.keras")
    average.save(tmp_path / "average.keras")
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n{textwrap.dedent(FRESH)}"
    logs, live, averages = run_python(code, cwd=tmp_path).splitlines()[-3:]
    assert json.loads(logs) == pytest.approx(numbers(model), rel=1e-5)
    assert json.loads(live) == pytest.approx(live_values(model))
    assert json.loads(averages) == [3, 2]


@each_writer
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    expected = json.loads((folder / "live.json").read_text())
    model = keras.saving.load_model(folder / f"live-{written_on}.keras", compile=False)
    model.compile("sgd", loss=layer_of(model).loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    assert logs_of(model, x, x[:, :2]) == pytest.approx(expected["logs"], rel=1e-5)
    assert live_values(model) == expected["live"]
    names = live_args(model)
    assert [name for name, v in names.items() if v.trainable] == expected["trainable"]
    logs = model.train_on_batch(x, x[:, :2], return_dict=True)
    assert logs["schedule"] == pytest.approx(expected["logs"]["schedule"])


def test_dtype_and_options_of_a_variable(tmp_path):
    weights = keras.Variable(np.eye(2, dtype="float32"), name="weights")
    weights.constraint = keras.constraints.MaxNorm(3.0)
    weights.regularizer = keras.regularizers.L1(0.5)
    what = [fixed(3, "count", dtype="int32"), weights, fixed(float("nan"), "nan")]
    attach(linear_model(), losses.described(what=what)).save(tmp_path / "model.keras")
    count, weights, nan = live_args(keras.saving.load_model(tmp_path / "model.keras")).values()
    assert (count.dtype, count.name) == ("int32", "count")
    assert (weights.constraint.max_value, weights.regularizer.l1) == (3, 0.5)
    np.testing.assert_array_equal(weights.numpy(), np.eye(2))
    assert np.isnan(nan.numpy())


def test_variable_shared_by_two_losses(tmp_path, data):
    x = keras.Input((3,), name="x")
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in ("a", "b")}
    log_var = keras.Variable(0.5, name="log_var")
    model = attached(
        {name: losses.gaussian(log_var=log_var) for name in outputs}, keras.Model(x, outputs), 0.01
    )
    y = {"a": data.y, "b": 2 * data.y}
    model.train_on_batch(data.x, y)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    for one in (model, loaded):
        assert list(live_args(one)) == ["log_var"]
        assert len(one.trainable_variables) == 5
        one.train_on_batch(data.x, y)
    assert_same(loaded, model)


@pytest.mark.parametrize("reads_tensors", [True, False])
def test_loaded_loss_with_another_constant(tmp_path, data, reads_tensors):
    network, live = linear_model(), {"live": fixed(5.0, "live")}
    if reads_tensors:
        live["tensor"] = network.inputs[0][:, 0]
    attach(network, losses.flexible(constant=1.0, **live)).save(tmp_path / "model.keras")

    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loss = layer_of(loaded).loss.replace(constant=2.0)
    if reads_tensors:
        with pytest.raises(AttachError, match="'tensor'"):
            attach(linear_model(), loss)
    model = attached(loss, loaded)
    live_args(model)["live"].assign(10.0)
    expected = error_of(data) + 12 + (data.x[:, 0].mean() if reads_tensors else 0)
    assert logs_of(model, data.x, data.y)["loss"] == pytest.approx(expected, rel=1e-5)


def test_saved_weights_do_not_depend_on_the_logs(tmp_path, data):
    mae = with_args(keras.losses.mean_absolute_error)()
    loss = losses.shifted(fixed(2.0))
    models = [attached(loss, track=track) for track in ((), mae)]
    models[0].fit(data.x, data.y, verbose=0)
    models[0].save_weights(tmp_path / "model.weights.h5")
    models[1].load_weights(tmp_path / "model.weights.h5")
    assert len(models[0].weights) == len(models[1].weights)


def test_loss_alone_goes_through_pickle_and_json():
    loss = losses.flexible(a=fixed(5.0), b=1)
    for copied in (pickle.loads(pickle.dumps(loss)), type(loss).from_config(loss.get_config())):
        assert repr(copied) == repr(loss)
        assert copied.args["a"] is not loss.args["a"]  # a variable of its own
        assert to_float(copied.args["a"]) == 5
    again = keras.models.model_from_json(attach(linear_model(), loss).to_json())
    assert repr(layer_of(again).loss) == repr(loss)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))])
def test_copy_of_a_variable_after_fit(copied, data):
    value = fixed(1.0)
    model = attached(losses.shifted(value))
    model.fit(data.x, data.y, verbose=0)
    other = copied(value)
    value.assign(5.0)
    assert (to_float(other), type(other)) == (1.0, keras.Variable)
    assert live_args(model)["shift"] is value


def test_legacy_format_is_refused(tmp_path):
    with pytest.raises(SavingError, match=r"HDF5.*model\.save"):
        attach(linear_model(), losses.shifted(fixed())).save(tmp_path / "model.h5")
