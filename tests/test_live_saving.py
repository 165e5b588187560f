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
import networks
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
from networks import assert_same, saved, weights_of

pytestmark = pytest.mark.fit


def everything():
    """Return a VAE with a scheduled beta, a variable, a trained argument and a constant."""
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
    return attached(loss, keras.Model(x, x_hat), 0.01, track=[kl])


def fitted(model, epochs=1):
    x = vaes.data()
    return model.fit(x, x, batch_size=10, epochs=epochs, shuffle=False, verbose=0).history


def numbers(model):
    return logs_of(model, vaes.data(), vaes.data(), batch_size=10)


def live_values(model):
    return {name: to_float(variable) for name, variable in live_args(model).items()}


def test_loaded_model_continues(tmp_path):
    """Also where the loaded model is saved again."""
    model = everything()
    fitted(model)
    live_args(model)["weight"].assign(0.75)
    first = saved(model, tmp_path)
    loaded = saved(first, tmp_path)
    for one in (first, loaded):
        assert repr(one.loss) == repr(model.loss)
        assert live_values(one) == pytest.approx(live_values(model))
        trainable = {name: variable.trainable for name, variable in live_args(one).items()}
        assert trainable == {"weight": False, "log_var": True}
    for one in (loaded, model):
        live_args(one)["weight"].assign(0.125)
    assert numbers(loaded) == pytest.approx(numbers(model), rel=1e-5)
    logs, expected = fitted(loaded, 2), fitted(model, 2)
    assert logs["beta"] == expected["beta"] == pytest.approx([7 / 9, 1])
    assert logs["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert_same(weights_of(loaded), weights_of(model))


FRESH = """
    import json, sys
    sys.path.insert(0, {tests!r})
    import keras, kinds, losses, networks, vaes, lossargs
    import numpy as np
    everything, average, layers = map(keras.saving.load_model, {paths!r})
    x = vaes.data()
    results = [
        everything.evaluate(x, x, batch_size=10, verbose=0, return_dict=True),
        {{name: float(v.numpy()) for name, v in lossargs.live_args(everything).items()}},
        kinds.averages(average, [0, 1]),
        networks.fitted(layers, 2)["loss"],
        [np.array(v).tolist() for v in layers.weights],
    ]
    print(json.dumps(results))
"""


def test_fresh_process(tmp_path):
    """Models with all kinds of live values, with an own adapter, and with all cases of layers."""
    model, average = everything(), kinds.averaging_model()
    layers, loss, *_ = networks.attached(*networks.CASES)
    layers.compile(keras.optimizers.SGD(0.02, momentum=0.5), loss=loss)
    fitted(model)
    assert kinds.averages(average, [8, 8]) == [4, 6]
    networks.fitted(layers)
    paths = [str(tmp_path / f"{name}.keras") for name in ("everything", "average", "layers")]
    for one, path in zip((model, average, layers), paths, strict=True):
        one.save(path)
    code = textwrap.dedent(FRESH).format(tests=str(TESTS), paths=paths)
    printed = run_python(code, cwd=tmp_path).splitlines()[-1]
    logs, live, averages, history, weights = json.loads(printed)
    assert logs == pytest.approx(numbers(model), rel=1e-5)
    assert live == pytest.approx(live_values(model))
    assert averages == [3, 2]
    np.testing.assert_allclose(history, networks.fitted(layers, 2)["loss"], atol=1e-5)
    assert_same(weights, weights_of(layers))


@each_writer
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    expected = json.loads((folder / "live.json").read_text())
    model = keras.saving.load_model(folder / f"live-{written_on}.keras", compile=False)
    model.compile("sgd", loss=layer_of(model).loss)
    x = np.linspace(-1, 1, 36, dtype="float32").reshape(12, 3)
    assert logs_of(model, x, x[:, :2]) == pytest.approx(expected["logs"], rel=1e-5)
    assert live_values(model) == expected["live"]
    trainable = [name for name, variable in live_args(model).items() if variable.trainable]
    assert trainable == expected["trainable"]
    logs = model.train_on_batch(x, x[:, :2], return_dict=True)
    assert logs["schedule"] == pytest.approx(expected["logs"]["schedule"])


def test_dtype_and_options_of_a_variable(tmp_path):
    weights = keras.Variable(np.eye(2, dtype="float32"), name="weights")
    weights.constraint = keras.constraints.MaxNorm(3.0)
    weights.regularizer = keras.regularizers.L1(0.5)
    what = [fixed(3, "count", dtype="int32"), weights, fixed(float("nan"), "nan")]
    loaded = saved(attach(linear_model(), losses.described(what=what)), tmp_path)
    count, weights, nan = live_args(loaded).values()
    assert (count.dtype, count.name) == ("int32", "count")
    assert (weights.constraint.max_value, weights.regularizer.l1) == (3, 0.5)
    np.testing.assert_array_equal(weights.numpy(), np.eye(2))
    assert np.isnan(nan.numpy())


def test_objects_that_two_losses_share(tmp_path):
    """A variable and a layer in the losses of two outputs load as one."""
    x, head = keras.Input((3,)), networks.head()
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in "ab"}
    variable = losses.gaussian(log_var=keras.Variable(0.5, name="log_var"))
    layers = [networks.projected(head=head), networks.projected.options(name="other")(head=head)]
    loss = {
        name: losses.both(first=variable, second=layer, factor=1.0)
        for name, layer in zip("ab", layers, strict=True)
    }
    model = attached(loss, keras.Model(x, outputs), 0.01)
    y = {"a": networks.Y, "b": 2 * networks.Y}
    model.train_on_batch(networks.X, y)
    loaded = saved(model, tmp_path)
    for one in (model, loaded):
        assert list(live_args(one)) == ["log_var"]
        assert len(one.trainable_variables) == 7
        one.train_on_batch(networks.X, y)
    assert_same(weights_of(loaded), weights_of(model))


def test_loaded_loss_with_another_constant(tmp_path, data):
    network = linear_model()
    live = {"live": fixed(5.0, "live"), "tensor": network.inputs[0][:, 0]}
    loaded = saved(attach(network, losses.flexible(constant=1.0, **live)), tmp_path)
    loss = layer_of(loaded).loss.replace(constant=2.0)
    with pytest.raises(AttachError, match="'tensor'"):
        attach(linear_model(), loss)
    model = attached(loss, loaded)
    live_args(model)["live"].assign(10.0)
    expected = error_of(data) + 12 + data.x[:, 0].mean()
    assert logs_of(model, data.x, data.y)["loss"] == pytest.approx(expected, rel=1e-5)


def test_saved_weights_do_not_depend_on_the_logs(tmp_path, data):
    loss, mae = losses.shifted(fixed(2.0)), with_args(keras.losses.mean_absolute_error)()
    plain, tracking = (attached(loss, track=track) for track in ((), mae))
    plain.fit(data.x, data.y, verbose=0)
    plain.save_weights(tmp_path / "model.weights.h5")
    tracking.load_weights(tmp_path / "model.weights.h5")
    assert len(plain.weights) == len(tracking.weights)


def test_loss_alone_goes_through_pickle_and_json():
    loss = losses.flexible(a=fixed(5.0), b=1)
    for copied in (pickle.loads(pickle.dumps(loss)), type(loss).from_config(loss.get_config())):
        assert repr(copied) == repr(loss)
        assert copied.args["a"] is not loss.args["a"]  # a variable of its own
        assert to_float(copied.args["a"]) == 5
    again = keras.models.model_from_json(attach(linear_model(), loss).to_json())
    assert repr(layer_of(again).loss) == repr(loss)


def test_copies_of_a_variable_after_fit(data):
    value = fixed(1.0)
    model = attached(losses.shifted(value))
    model.fit(data.x, data.y, verbose=0)
    copies = [copy.deepcopy(value), pickle.loads(pickle.dumps(value))]
    value.assign(5.0)
    assert [(to_float(one), type(one)) for one in copies] == [(1.0, keras.Variable)] * 2
    assert live_args(model)["shift"] is value


def test_legacy_format_is_refused(tmp_path):
    with pytest.raises(SavingError, match=r"HDF5.*model\.save"):
        attach(linear_model(), losses.shifted(fixed())).save(tmp_path / "model.h5")
