"""A layer, a model or a random generator as an argument: called, trained, updated, saved."""

import gc
import json
import pickle
import textwrap
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import losses
import networks
from helpers import BACKEND, KERAS, TESTS, each_writer, linear_model, run_python
from lossargs import ArgumentError, AttachError, LossArgs, SavingError, attach, detach, with_args
from lossargs._keras import is_random_state
from networks import CASES, X, Y, fitted

pytestmark = pytest.mark.fit
HOW = {
    "as usual": {},
    "eager": {"run_eagerly": True, "jit_compile": False},
    "graph": {"jit_compile": False},
    "compiled": {"jit_compile": True},  # XLA, or torch.compile
    "several steps": {"steps_per_execution": 2},
    "accumulated": {},
}
if BACKEND == "torch":
    del HOW["several steps"]  # which Keras does not have there
SEVERAL = ["trained features", "own layer", "queue"]
VALIDATION = {"validation_data": (X[:8] + 1, Y[:8])}


def compiled(model, loss=None, rate=0.05, how="as usual"):
    options = {"gradient_accumulation_steps": 2} if how == "accumulated" else {"momentum": 0.5}
    model.compile(keras.optimizers.SGD(rate, **options), loss=loss, **HOW[how])
    return model


def attached(loss, network=None, rate=0.05, track=()):
    return compiled(attach(network or linear_model(), loss, track=track), loss, rate)


def built(layer, input_shape=None):
    layer.build(input_shape)
    return networks.filled(layer)


def weights_of(model):
    return [np.array(variable) for variable in model.weights]


def assert_same_weights(model, other, atol=1e-5):
    assert len(model.weights) == len(other.weights)
    for one, two in zip(weights_of(model), weights_of(other), strict=True):
        np.testing.assert_allclose(one, two, atol=atol)


def saved(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return keras.saving.load_model(tmp_path / "model.keras")


# ---- As written by hand ----


@pytest.mark.filterwarnings("ignore")  # torch's own, of torch.compile
@pytest.mark.parametrize(
    ("cases", "how"),
    [*(([case], "as usual") for case in CASES), *((SEVERAL, how) for how in HOW)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_numbers_of_compute_loss(cases, how):
    if how == "compiled" and BACKEND == "torch" and KERAS < (3, 12):
        pytest.skip("torch.compile fails on any loss of this Keras")
    model, loss, *_ = networks.attached(*cases)
    # By hand, torch.compile reads what the step has assigned already.
    how_by_hand = "graph" if (how, BACKEND) == ("compiled", "torch") else how
    expected = compiled(networks.by_hand(*cases), rate=0.02, how=how_by_hand)
    logs = fitted(compiled(model, loss, 0.02, how=how), 2, **VALIDATION)
    expected_logs = fitted(expected, 2, **VALIDATION)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(logs[name], expected_logs[name], atol=1e-5)
    assert_same_weights(model, expected)


def test_error_in_a_later_step():
    broken = []

    @with_args
    def fragile(y_true, y_pred, *, head):
        if broken:
            raise ZeroDivisionError("of the user")
        return keras.losses.mean_squared_error(y_true, head(y_pred))

    loss = fragile(head=networks.head())
    model = compiled(attach(linear_model(), loss), loss, how="eager")
    fitted(model)
    broken.append(True)
    with pytest.raises(ZeroDivisionError, match="of the user") as caught:
        fitted(model)
    assert any("While computing the loss fragile" in note for note in caught.value.__notes__)


def test_trainable_changes_between_compiles():
    model, loss, features = networks.attached("trained features")
    for is_trained in (True, False, True):
        features.trainable = is_trained
        compiled(model, loss)
        before = weights_of(features.layers[0])
        fitted(model)
        after = weights_of(features.layers[0])
        assert all(np.allclose(*pair) != is_trained for pair in zip(before, after, strict=True))


def test_weights_set_from_outside_cost_no_trace():
    calls = []

    @with_args
    def counting(y_true, y_pred, *, scale):
        calls.append(scale)
        return keras.losses.mean_squared_error(y_true, y_pred) * scale(ops.ones((1, 1)))[0]

    scale = built(keras.layers.Dense(1, use_bias=False), (None, 1))
    model = attached(counting(scale=scale), rate=0.0)
    seen = []
    for value in range(1, 101):
        scale.set_weights([np.full((1, 1), value)])
        model.reset_metrics()
        seen.append(model.train_on_batch(X, Y, return_dict=True)["loss"])
    np.testing.assert_allclose(seen, seen[0] * np.arange(1, 101), rtol=1e-5)
    assert len(calls) == 100 if BACKEND == "torch" else len(calls) <= 2
    assert all(layer is scale for layer in calls)


def test_weights_set_by_a_callback_within_an_epoch():
    head = networks.head()
    model = attached(networks.projected(head=head), rate=0.0)
    seen = []

    class Double(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.array(head.kernel).sum())
            head.set_weights([2 * weight for weight in head.get_weights()])

    first = np.array(head.kernel).sum()
    fitted(model, callbacks=[Double()])
    np.testing.assert_allclose(seen, first * 2.0 ** np.arange(4), rtol=1e-5)
    np.testing.assert_allclose(np.array(head.kernel).sum(), first * 16, rtol=1e-5)


def test_mixed_precision():
    model, loss, _ = networks.attached("trained features")
    other, other_loss, half = networks.attached("trained features")
    half.layers[0].dtype_policy = keras.DTypePolicy("mixed_bfloat16")
    dtypes = []
    half.layers[0].activation = lambda x: dtypes.append(x.dtype) or ops.tanh(x)
    logs, expected = (fitted(compiled(*pair), 2) for pair in ((other, other_loss), (model, loss)))
    np.testing.assert_allclose(logs["loss"], expected["loss"], rtol=0.02)
    assert {keras.backend.standardize_dtype(dtype) for dtype in dtypes} == {"bfloat16"}
    assert {variable.dtype for variable in half.weights} == {"float32"}


@pytest.mark.parametrize("where", ["list", "dict", "inner loss", "tracked loss"])
def test_nested_in_other_values(where):
    head = networks.head()

    @with_args
    def nested(y_true, y_pred, *, parts=(), inner=None):
        if inner is not None:
            return inner(y_true, y_pred)
        part = parts["head"][0] if isinstance(parts, dict) else parts[1]
        return networks.projected.__wrapped__(y_true, y_pred, head=part)

    value = networks.projected(head=head)
    loss, track = {
        "list": (nested(parts=["head", head]), ()),
        "dict": (nested(parts={"head": (head, 2)}), ()),
        "inner loss": (nested(inner=value), ()),
        "tracked loss": (nested(inner=value), [value]),
    }[where]
    model, expected = attached(loss, track=track), compiled(networks.by_hand("head"))
    logs, expected_logs = fitted(model, 2), fitted(expected, 2)
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], atol=1e-5)
    assert_same_weights(model, expected)
    if track:
        np.testing.assert_allclose(logs["projected"], logs["loss"], atol=1e-6)


def test_tracked_loss_updates_nothing():
    loss = networks.centred(centres=built(networks.Centres()))
    model = attached(networks.total(terms=[loss]), track=[loss])
    expected = compiled(networks.by_hand("centre loss"))
    logs, expected_logs = fitted(model, 2), fitted(expected, 2)
    np.testing.assert_allclose(logs["loss"], expected_logs["loss"], atol=1e-5)
    np.testing.assert_allclose(logs["centred"], logs["loss"], atol=1e-6)
    assert_same_weights(model, expected)


def test_evaluation_changes_nothing():
    model, loss, *_ = networks.attached("centre loss", "queue", "batch statistics")
    fitted(compiled(model, loss, 0.02))
    before = weights_of(model)
    values = [model.evaluate(X, Y, batch_size=8, verbose=0) for _ in range(2)]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    np.testing.assert_equal(weights_of(model), before)


def test_metric_of_a_layer_is_logged():
    @networks.package
    class Watched(keras.layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.size = keras.metrics.Mean(name="size")

        def call(self, x):
            self.size.update_state(ops.mean(x))
            return super().call(x)

    model = attached(networks.projected(head=built(Watched(2), (None, 2))), rate=0.0)
    logs = fitted(model, validation_data=(X, Y))
    expected = model.predict(X, verbose=0).mean()
    assert logs["size"] == logs["val_size"] == [pytest.approx(expected, abs=1e-5)]


def test_subclassed_model():
    class Own(keras.Model):
        def __init__(self, loss):
            super().__init__()
            self.dense, self.head = keras.layers.Dense(2), networks.head()
            self.loss_args = LossArgs(loss)

        def call(self, x):
            return self.loss_args(self.dense(x), head=self.head)

    loss = networks.projected()
    model, expected = compiled(Own(loss), loss), compiled(networks.by_hand("head"))
    model(X)
    model.dense.set_weights(linear_model().get_weights())
    np.testing.assert_allclose(fitted(model, 2)["loss"], fitted(expected, 2)["loss"], atol=1e-5)
    assert_same_weights(model.head, expected.parts[0])


# ---- Loops of one's own ----


def gradients(model, loss, variables):
    """Of the loss, in a loop as one would write it on the backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(ops.convert_to_tensor(Y), model(X, training=True))
        return tape.gradient(value, [v.value for v in variables])
    if BACKEND == "jax":
        import jax

        def value_of(values):
            given = {id(v): v.value for v in model.trainable_variables}
            given |= {id(v): value for v, value in zip(variables, values, strict=True)}
            y_pred, _ = model.stateless_call(
                [given[id(v)] for v in model.trainable_variables],
                [v.value for v in model.non_trainable_variables],
                X,
                training=True,
            )
            return loss(Y, y_pred)

        return jax.jit(jax.grad(value_of))([v.value for v in variables])
    loss(ops.convert_to_tensor(Y), model(X, training=True)).backward()
    return [v.value.grad for v in variables]


def test_gradient_in_a_loop_of_ones_own():
    model, loss, head = networks.attached("head")
    x, y = model.predict(X, verbose=0), Y
    kernel, bias = head.get_weights()
    found = gradients(model, loss, head.trainable_variables)
    slope = 2 * (x @ kernel + bias - y) / y.size
    np.testing.assert_allclose(ops.convert_to_numpy(found[1]), slope.sum(axis=0), atol=1e-5)
    expected = x.T @ slope + 0.01 * np.sign(kernel)
    np.testing.assert_allclose(ops.convert_to_numpy(found[0]), expected, atol=1e-5)


def test_update_in_a_loop_of_ones_own():
    model, loss, queue = networks.attached("queue")
    dense = model.layers[0]
    if BACKEND == "jax":  # which has no place for the new value
        text = "contrasted assigns the variable '.*rows' after .* model.stateless_compute_loss"
        with pytest.raises(ArgumentError, match=text):
            gradients(model, loss, dense.trainable_variables)
        return
    gradients(model, loss, dense.trainable_variables)
    np.testing.assert_allclose(queue.rows, model.predict(X, verbose=0)[:20], atol=1e-6)


# ---- One object stays one object ----


def own_network():
    x = keras.Input((3,))
    first, second = keras.layers.Dense(2, "tanh"), keras.layers.Dense(2)
    return x, first, second, keras.Model(x, second(first(x)))


@with_args
def seen_by(y_true, y_pred, *, network, other=None):
    error = keras.losses.mean_squared_error(y_true, y_pred)
    rows = ops.concatenate([y_pred, y_pred[:, :1]], axis=-1)
    for one in (network, other):
        error = error if one is None else error + ops.mean(ops.square(one(rows)), axis=-1)
    return error


def whole_model():
    model = own_network()[-1]
    return model, {"network": model}


def part_of_the_graph():
    x, first, _, model = own_network()
    return model, {"network": keras.Model(x, first.output)}


def layers_in_a_sequential_model():
    _, first, _, model = own_network()
    return model, {"network": keras.Sequential([keras.Input((3,)), first])}


def layers_on_another_input():
    _, first, _, model = own_network()
    x = keras.Input((3,))
    return model, {"network": keras.Model(x, first(x))}


def two_networks_of_one():
    _, first, second, model = own_network()
    x = keras.Input((3,))
    return model, {
        "network": keras.Sequential([keras.Input((3,)), first]),
        "other": keras.Model(x, second(first(x))),
    }


def layer_called_twice():
    x = keras.Input((3,))
    dense = keras.layers.Dense(3, "tanh")
    inside = dense(x)
    return keras.Model(x, dense(inside)[:, :2]), {"network": keras.Model(x, inside)}


def layer_within_a_layer():
    encoder = own_network()[-1]
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(2)(encoder(x))), {"network": encoder.layers[1]}


def layer_within_a_layer_of_a_sequential_model():
    encoder = own_network()[-1]
    outer = keras.Sequential([keras.Input((3,)), encoder, keras.layers.Dense(2)])
    return outer, {"network": encoder.layers[1]}


def network_of_layers_within_a_layer():
    x, first, _, encoder = own_network()
    outer = keras.Input((3,))
    outputs = keras.layers.Dense(2)(encoder(outer))
    return keras.Model(outer, outputs), {"network": keras.Model(x, first.output)}


def layer_of_the_graph_and_its_network():
    encoder = own_network()[-1]
    x = keras.Input((3,))
    return keras.Model(x, keras.layers.Dense(2)(encoder(x))), {
        "network": encoder,
        "other": encoder.layers[1],
    }


SHARED = [
    whole_model, part_of_the_graph, layers_in_a_sequential_model, layers_on_another_input,
    two_networks_of_one, layer_called_twice, layer_within_a_layer,
    layer_within_a_layer_of_a_sequential_model, network_of_layers_within_a_layer,
    layer_of_the_graph_and_its_network,
]  # fmt: skip


@pytest.mark.parametrize("make", SHARED, ids=lambda make: make.__name__)
def test_shared_layers_load_as_one(make, tmp_path):
    network, args = make()
    count = len(network.weights)
    model = attached(seen_by(**args), network)
    assert len(model.weights) == count
    fitted(model)
    loaded = saved(model, tmp_path)
    for one in (loaded, saved(loaded, tmp_path)):
        assert_same_weights(one, model, atol=0)
        logs = one.evaluate(X, Y, verbose=0, return_dict=True)
        assert logs == pytest.approx(model.evaluate(X, Y, verbose=0, return_dict=True), rel=1e-5)
    logs, expected = fitted(loaded, 2), fitted(model, 2)
    np.testing.assert_allclose(logs["loss"], expected["loss"], atol=1e-5)
    assert_same_weights(loaded, model)
    np.testing.assert_allclose(loaded.predict(X), model.predict(X), atol=1e-5)


def test_one_layer_in_the_losses_of_two_outputs(tmp_path):
    x, head = keras.Input((3,)), networks.head()
    outputs = {name: keras.layers.Dense(2, name=name)(x) for name in "ab"}
    loss = {name: networks.projected(head=head) for name in "ab"}
    model = attached(loss, keras.Model(x, outputs))
    y = {"a": Y, "b": 2 * Y}
    assert len(model.weights) == 6
    model.fit(X, y, verbose=0)
    loaded = saved(model, tmp_path)
    for one in (model, loaded):
        one.fit(X, y, epochs=2, shuffle=False, verbose=0)
    assert_same_weights(loaded, model)


@pytest.mark.parametrize("case", CASES)
def test_saved_and_trained_on(case, tmp_path):
    model, loss, _ = networks.attached(case)
    fitted(compiled(model, loss))
    loaded = saved(model, tmp_path)
    assert repr(loaded.loss).partition("(")[0] == repr(loss).partition("(")[0]
    np.testing.assert_allclose(fitted(loaded, 2)["loss"], fitted(model, 2)["loss"], atol=1e-5)
    assert_same_weights(loaded, model)


LOAD = """
    import json, keras, networks
    import numpy as np
    model = keras.saving.load_model({path!r}, compile={compiled})
    if not model.compiled:  # PyTorch's optimizer is in the file
        model.compile(keras.optimizers.SGD(0.02, momentum=0.5), loss=model.layers[-1].loss)
    history = networks.fitted(model, 2)["loss"]
    print(json.dumps([history, [np.array(v).tolist() for v in model.weights]]))
"""


def in_a_fresh_process(path, **options):
    code = textwrap.dedent(LOAD.format(path=str(path), **options))
    return json.loads(run_python(code).splitlines()[-1])


def test_fresh_process(tmp_path):
    model, loss, *_ = networks.attached(*CASES)
    fitted(compiled(model, loss, 0.02))
    model.save(tmp_path / "model.keras")
    history, weights = in_a_fresh_process(tmp_path / "model.keras", compiled=True)
    np.testing.assert_allclose(history, fitted(model, 2)["loss"], atol=1e-5)
    for one, two in zip(weights, weights_of(model), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


@each_writer
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    path = folder / f"layers-{written_on}.keras"
    history, weights = in_a_fresh_process(path, compiled=False)
    expected = json.loads((folder / "layers.json").read_text())
    np.testing.assert_allclose(history, expected["loss"], atol=1e-5)
    assert len(weights) == len(expected["weights"])
    for one, two in zip(weights, expected["weights"], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


# ---- Taken out again ----


def test_detached_model_has_none_of_it(tmp_path):
    model, loss, features = networks.attached("frozen features")
    fitted(compiled(model, loss))
    detached, reference = detach(model), weakref.ref(features)
    assert len(detached.weights) == 2
    detached.save_weights(tmp_path / "small.weights.h5")
    predicted = model.predict(X, verbose=0)
    assert len(attach(detached, loss).weights) == len(model.weights) == 10
    del model, loss, features
    keras.backend.clear_session()
    gc.collect()
    assert reference() is None or BACKEND == "tensorflow"  # which keeps its graphs
    detached.set_weights([np.zeros((3, 2)), np.zeros(2)])
    detached.load_weights(tmp_path / "small.weights.h5")
    np.testing.assert_array_equal(detached.predict(X, verbose=0), predicted)


def test_predict_never_runs_it():
    class Refusing(keras.layers.Layer):
        def call(self, x, training=None):
            raise NotImplementedError

    model = attached(networks.perceptual(features=Refusing()))
    assert model.predict(X, verbose=0).shape == model(X).shape == (32, 2)
    with pytest.raises(NotImplementedError):
        model.evaluate(X, Y, verbose=0)


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.nightly)])
def test_nothing_is_left_of_many_models(count):
    features = networks.features(trainable=False)
    left = []

    def cycle():
        head = networks.head()
        loss = losses.both(
            first=networks.projected(head=head),
            second=networks.perceptual(features=features),
            factor=1.0,
        )
        model = attach(linear_model(), loss)
        model.compile("sgd", loss=loss, run_eagerly=True)
        model.train_on_batch(X[:2], Y[:2])
        detach(model)
        left.extend(map(weakref.ref, (head, loss, model, model.layers[-1])))

    for number in range(1, count + 1):
        cycle()
        if number % 20 == 0:
            keras.backend.clear_session()
            gc.collect()
    assert [one() for one in left if one() is not None] == []


def test_compiled_models_are_let_go():
    def trained():
        model, loss, part = networks.attached("trained features")
        fitted(compiled(model, loss))
        return [weakref.ref(one) for one in (loss, part, model.layers[-1])]

    left = [trained() for _ in range(2)]
    keras.backend.clear_session()
    for _ in range(3):
        gc.collect()
    assert [reference() for reference in left[0]] == [None] * 3


# ---- Random generators ----


@with_args
def noisy(y_true, y_pred, *, seed):
    noise = keras.random.uniform(ops.shape(y_pred)[:1], seed=seed)
    return 0.0 * keras.losses.mean_squared_error(y_true, y_pred) + noise


def test_generator_of_a_layer_of_the_model(tmp_path):
    """Keras saves it with the layer, and would save it once more with the loss."""
    dropout = keras.layers.Dropout(0.5)
    layers = [keras.Input((3,)), dropout, keras.layers.Dense(2)]
    x = layers[0]
    y = layers[2](dropout(x))
    for plain in (keras.Sequential(layers), keras.Model(x, y)):
        model = attach(plain, noisy(seed=dropout.seed_generator))
        with pytest.raises(SavingError, match="'seed' is a random generator of the layer 'dropout"):
            model.save(tmp_path / "model.keras")
    attach(keras.Model(x, y), noisy(seed=keras.random.SeedGenerator())).save(
        tmp_path / "model.keras"
    )


def test_states_that_no_compiler_of_pytorch_sees():
    drop = keras.layers.Dropout(0.5)
    assert all(
        map(is_random_state, (drop.seed_generator.state, keras.random.SeedGenerator().state))
    )
    assert not is_random_state(keras.Variable(1.0, name="other"))


def noisy_model(seed=3):
    generator = keras.random.SeedGenerator(seed)
    loss = noisy(seed=generator)
    return attached(loss), generator


def test_new_numbers_in_every_step_of_training():
    model, generator = noisy_model()
    seen = fitted(model, 3, **VALIDATION)
    assert len(set(seen["loss"])) == 3
    assert len(set(seen["val_loss"])) <= 3
    np.testing.assert_array_equal(generator.state.value, [3, 12])
    model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(generator.state.value, [3, 12])
    by_hand = keras.random.SeedGenerator(3)
    means = [
        np.mean(ops.convert_to_numpy(keras.random.uniform((8,), seed=by_hand))) for _ in range(4)
    ]
    assert seen["loss"][0] == pytest.approx(np.mean(means), rel=1e-5)


class Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["model", "weights", "backup"])
def test_resumed_run_draws_what_the_uninterrupted_one_would(how, tmp_path):
    expected = fitted(noisy_model()[0], 4)["loss"]
    model, _ = noisy_model()
    if how == "backup":
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            fitted(model, 4, callbacks=[backup, Stop()])
        resumed = fitted(noisy_model()[0], 4, callbacks=[backup])["loss"]
    else:
        fitted(model, 2, **VALIDATION)
        other = saved(model, tmp_path) if how == "model" else noisy_model(seed=4)[0]
        other.optimizer.build(other.trainable_variables)
        if how == "weights":
            model.save_weights(tmp_path / "model.weights.h5")
            other.load_weights(tmp_path / "model.weights.h5")
        resumed = fitted(other, 2)["loss"]
    assert resumed == pytest.approx(expected[2:], rel=1e-6)


def test_seeds_of_a_layer_advance():
    drop = keras.layers.Dropout(0.5, seed=3)

    @with_args
    def dropped(y_true, y_pred, *, drop):
        return ops.mean(drop(y_pred, training=True), axis=-1)

    fitted(attached(dropped(drop=drop)))
    np.testing.assert_array_equal(drop.seed_generator.state.value, [3, 4])


def test_one_generator_in_two_losses(tmp_path):
    seed = keras.random.SeedGenerator(3)
    loss = losses.both(first=noisy(seed=seed), second=noisy(seed=seed), factor=2.0)
    model = attached(loss)
    fitted(model)
    np.testing.assert_array_equal(seed.state.value, [3, 8])
    loaded = saved(model, tmp_path)
    assert fitted(loaded)["loss"] == pytest.approx(fitted(model)["loss"])


# ---- What cannot work ----


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: keras.layers.Dense(2), AttachError, "'features' of .* is not built: 'dense"),
        (keras.metrics.Mean, ArgumentError, "'features' of perceptual.. to a metric, Mean, which"),
        (keras.optimizers.SGD, ArgumentError, "to an optimizer, SGD, whose variables"),
        (lambda: networks.attached("head")[0], AttachError, "'features' of .* is attached to a lo"),
    ],
    ids=["not built", "metric", "optimizer", "attached model"],
)
def test_arguments_that_cannot_work(make, error, text):
    with pytest.raises(error, match=text):
        fitted(attached(networks.perceptual(features=make())))
    loss = networks.perceptual(features=networks.features())
    assert np.isfinite(fitted(attached(loss))["loss"]).all()


def test_layer_built_after_attach():
    layer = keras.layers.Dense(2)
    model = attached(networks.perceptual(features=layer))
    layer.build((None, 2))
    assert np.isfinite(fitted(model)["loss"]).all()


def test_layer_in_a_loss_that_is_not_attached():
    model, (_, loss, _) = linear_model(), networks.attached("head")
    with pytest.raises(AttachError, match=r"has live arguments \('head'\), .* attach\(model, loss"):
        fitted(compiled(model, loss))


def test_captured_network():
    features = networks.features()

    @with_args
    def capturing(y_true, y_pred):
        return keras.losses.mean_squared_error(features(y_true), features(y_pred))

    text = r"Pass it, or its layer .* def capturing\(y_true, y_pred, \*, layer\)"
    with pytest.raises(ArgumentError, match=text):
        fitted(compiled(linear_model(), capturing()))


def test_trainable_weight_that_the_loss_assigns():
    @with_args
    def clipping(y_true, y_pred, *, head):
        head.kernel.assign(ops.clip(head.kernel, -0.1, 0.1))
        return keras.losses.mean_squared_error(y_true, head(y_pred))

    head = networks.head()
    with pytest.raises(ArgumentError, match="clipping assigns the trainable weight '.*kernel'"):
        fitted(attached(clipping(head=head)))
    head.trainable = False
    fitted(attached(clipping(head=head)))
    assert np.abs(head.kernel).max() == pytest.approx(0.1)


def test_copies_that_would_lose_weights():
    model, *_ = networks.attached("own layer")
    with pytest.raises(SavingError, match="'layer' of .* shares weights with the layer 'dense"):
        keras.models.clone_model(model)
    model, loss, _ = networks.attached("head")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    fitted(compiled(clone, clone.layers[-1].loss))
    fitted(compiled(model, loss))
    assert_same_weights(clone, model)
    with pytest.raises(SavingError, match="'head' of projected.. is .*saved with its model only"):
        pickle.dumps(loss)


@pytest.mark.parametrize("where", ["outputs of a model", "own class", "own Sequential"])
def test_networks_that_a_model_cannot_share(where, tmp_path):
    class Own(keras.Model):
        pass

    class OwnSequential(keras.Sequential):
        pass

    x, first, second, _ = own_network()
    y = second(first(x))
    loss = seen_by(network=keras.Sequential([keras.Input((3,)), first]))
    if where == "outputs of a model":
        model = keras.Model(x, attach(y, loss))
    else:
        own = Own(x, y) if where == "own class" else OwnSequential([x, first, second])
        model = attach(own, loss)
        assert type(model) is type(own)
    fitted(compiled(model, loss))
    with pytest.raises(SavingError, match="cannot be saved: 'network' shares layers with the mode"):
        model.save(tmp_path / "model.keras")
