"""A layer, a model or a random generator as an argument: called, trained, updated, saved."""

import gc
import json
import pickle
import weakref

import keras
import numpy as np
import pytest
from keras import ops

import losses
import networks
from helpers import BACKEND, TESTS, each_writer, linear_model, predictions
from lossargs import ArgumentError, AttachError, LossArgs, SavingError, attach, detach, with_args
from lossargs._keras import is_random_state
from networks import CASES, X, Y, assert_trained_alike, fitted, saved, weights_of

pytestmark = pytest.mark.fit
each = pytest.mark.parametrize
SEVERAL = ["trained features", "own layer", "queue"]
VALIDATION = {"validation_data": (X[:8] + 1, Y[:8])}


def compiled(model, loss=None, rate=0.02, how=None):
    options = {"gradient_accumulation_steps": 2} if how == "accumulated" else {"momentum": 0.5}
    model.compile(keras.optimizers.SGD(rate, **options), loss=loss, **networks.HOW.get(how, {}))
    return model


def attached(loss, network=None, rate=0.02, track=()):
    return compiled(attach(network or linear_model(), loss, track=track), loss, rate)


@each("case", CASES)
def test_numbers_of_compute_loss(case, tmp_path):
    """Training, also of a loaded model, equals `compute_loss`; evaluation changes nothing."""
    model, loss, _ = networks.attached(case)
    expected = compiled(networks.by_hand(case))
    assert_trained_alike(compiled(model, loss), expected, 2, **VALIDATION)
    before = weights_of(model)
    model.evaluate(X, Y, batch_size=8, verbose=0)
    np.testing.assert_equal(weights_of(model), before)
    loaded = saved(model, tmp_path)
    assert repr(loaded.loss).partition("(")[0] == repr(loss).partition("(")[0]
    assert_trained_alike(loaded, expected)


@each("how", [*networks.HOW, "accumulated"])
def test_ways_to_run_a_step(how):
    """Several networks in one loss train as by hand; `test_live_parity.py` has torch.compile."""
    model, loss, *_ = networks.attached(*SEVERAL)
    expected = compiled(networks.by_hand(*SEVERAL), how=how)
    assert_trained_alike(compiled(model, loss, how=how), expected, 2, **VALIDATION)


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
        before = weights_of(features.layers[0])
        fitted(compiled(model, loss))
        after = weights_of(features.layers[0])
        assert all(np.allclose(*pair) != is_trained for pair in zip(before, after, strict=True))


def test_weights_set_by_a_callback_cost_no_trace():
    """The next step of the epoch, and the next `fit`, use the weights."""
    calls, seen = [], []

    @with_args
    def counting(y_true, y_pred, *, scale):
        calls.append(scale)
        return keras.losses.mean_squared_error(y_true, y_pred) * scale(ops.ones((1, 1)))[0]

    class Double(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append(np.array(scale.kernel).item())
            scale.set_weights([2 * weight for weight in scale.get_weights()])

    scale = networks.built(keras.layers.Dense(1, use_bias=False), (None, 1))
    scale.set_weights([np.ones((1, 1))])
    model = attached(counting(scale=scale), rate=0.0)
    errors = ((Y - predictions(X)) ** 2).reshape(4, -1).mean(axis=1)
    for factors in 2.0 ** np.arange(8).reshape(2, 4):
        expected = [np.mean(factors * errors)]
        np.testing.assert_allclose(fitted(model, callbacks=[Double()])["loss"], expected, rtol=1e-5)
    assert seen == list(2.0 ** np.arange(8))
    assert np.array(scale.kernel) == 2**8
    assert len(calls) == 8 if BACKEND == "torch" else len(calls) <= 2
    assert all(layer is scale for layer in calls)


def test_mixed_precision():
    """The layers compute in their own dtypes."""
    logs, dtypes = {}, []
    for policy in ("float32", "mixed_bfloat16"):
        model, loss, features = networks.attached("trained features")
        features.layers[0].dtype_policy = keras.DTypePolicy(policy)
        features.layers[0].activation = lambda x: dtypes.append(x.dtype) or ops.tanh(x)
        logs[policy] = fitted(compiled(model, loss), 2)["loss"]
        computed = {keras.backend.standardize_dtype(dtype) for dtype in dtypes}
        assert computed == {policy.removeprefix("mixed_")}
        assert {variable.dtype for variable in features.weights} == {"float32"}
        dtypes.clear()
    np.testing.assert_allclose(*logs.values(), rtol=0.02)


@each("last", [False, True])
def test_nested_in_other_values(last):
    """Layers in containers and inner losses are trained; a tracked loss updates nothing more.

    It reads the state before the step, also if it is the last of the tracked losses.
    """
    head, centres = networks.head(), networks.built(networks.Centres())
    projected, centred = networks.projected(head=head), networks.centred(centres=centres)
    again = networks.centred.options(name="again")(centres=centres)

    @with_args
    def nested(y_true, y_pred, *, parts, inner):
        (part, _) = parts["head"][1]
        return networks.projected.__wrapped__(y_true, y_pred, head=part) + inner(y_true, y_pred)

    loss = nested(parts={"head": ["head", (head, 2)]}, inner=centred)
    track = [projected, centred, again] if last else [again, projected, centred]
    model = attached(loss, track=track)
    expected = compiled(networks.by_hand("head", "centre loss"))
    logs = assert_trained_alike(model, expected, 2)
    tracked = np.add(logs["projected"], logs["centred"])
    np.testing.assert_allclose(tracked, logs["loss"], atol=1e-6)
    np.testing.assert_allclose(logs["again"], logs["centred"], atol=1e-6)


def test_metric_of_a_layer_is_logged():
    @networks.package
    class Watched(keras.layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.size = keras.metrics.Mean(name="size")

        def call(self, x):
            self.size.update_state(ops.mean(x))
            return super().call(x)

    model = attached(networks.projected(head=networks.built(Watched(2), (None, 2))), rate=0.0)
    logs = fitted(model, validation_data=(X, Y))
    assert logs["size"] == logs["val_size"] == [pytest.approx(predictions(X).mean(), abs=1e-5)]


def test_subclassed_model():
    class Own(keras.Model):
        def __init__(self, loss):
            super().__init__()
            self.dense, self.head = linear_model().layers[0], networks.head()
            self.loss_args = LossArgs(loss)

        def call(self, x):
            return self.loss_args(self.dense(x), head=self.head)

    loss = networks.projected()
    assert_trained_alike(compiled(Own(loss), loss), compiled(networks.by_hand("head")), 2)


def gradients(model, loss):
    """Return the gradients of all variables, in a loop as one would write it on the backend."""
    variables = [variable.value for variable in model.trainable_variables]
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = loss(tf.constant(Y), model(X, training=True))
        return tape.gradient(value, variables)
    if BACKEND == "jax":
        import jax

        def value_of(variables):
            state = [variable.value for variable in model.non_trainable_variables]
            y_pred, _ = model.stateless_call(variables, state, X, training=True)
            return loss(Y, y_pred)

        return jax.jit(jax.grad(value_of))(variables)
    loss(ops.convert_to_tensor(Y), model(X, training=True)).backward()
    return [variable.grad for variable in variables]


def test_gradient_in_a_loop_of_ones_own():
    model, loss, head = networks.attached("head")
    x, (kernel, bias) = predictions(X), head.get_weights()
    found = map(ops.convert_to_numpy, gradients(model, loss)[2:])
    slope = 2 * (x @ kernel + bias - Y) / Y.size
    expected = [x.T @ slope + 0.01 * np.sign(kernel), slope.sum(axis=0)]
    networks.assert_same(found, expected)


def test_update_in_a_loop_of_ones_own():
    model, loss, queue = networks.attached("queue")
    if BACKEND == "jax":  # which has no place for the new value
        text = "contrasted assigns the variable '.*rows' after .* model.stateless_compute_loss"
        with pytest.raises(ArgumentError, match=text):
            gradients(model, loss)
        return
    gradients(model, loss)
    np.testing.assert_allclose(queue.rows, predictions(X)[:20], atol=1e-6)


@with_args
def seen_by(y_true, y_pred, network, other=None):
    error = keras.losses.mean_squared_error(y_true, y_pred)
    rows = ops.concatenate([y_pred, y_pred[:, :1]], axis=-1)
    for one in (network, other):
        error = error if one is None else error + ops.mean(ops.square(one(rows)), axis=-1)
    return error


def chain(*layers):
    x = y = keras.Input((3,))
    for layer in layers:
        y = layer(y)
    return keras.Model(x, y)


def sequence(*layers):
    return keras.Sequential([keras.Input((3,)), *layers])


def own_layers():
    """Return two layers and a model of them."""
    first, second = keras.layers.Dense(2, "tanh"), keras.layers.Dense(2)
    return first, second, chain(first, second)


def part(model):
    return keras.Model(model.input, model.layers[1].output)


def within(model):
    return chain(model, keras.layers.Dense(2))


def layer_called_twice():
    x, layer = keras.Input((3,)), keras.layers.Dense(3, "tanh")
    inside = layer(x)
    return keras.Model(x, layer(inside)[:, :2]), keras.Model(x, inside)


SHARED = {  # a model, and the networks of its loss
    "whole model": lambda a, b, model: (model, model),
    "part of the graph": lambda a, b, model: (model, part(model)),
    "layers in a Sequential model": lambda a, b, model: (model, sequence(a)),
    "layers on another input": lambda a, b, model: (model, chain(a)),
    "two networks of one": lambda a, b, model: (model, sequence(a), chain(a, b)),
    "layer called twice": lambda *_: layer_called_twice(),
    "layer within a layer": lambda a, b, model: (within(model), a),
    "within a Sequential model": lambda a, b, model: (sequence(model, keras.layers.Dense(2)), a),
    "network of layers within a layer": lambda a, b, model: (within(model), part(model)),
    "layer of the graph and its network": lambda a, b, model: (within(model), model, a),
}


@each("make", SHARED.values(), ids=SHARED)
def test_shared_layers_load_as_one(make, tmp_path):
    """Also where the loaded model is saved again."""
    network, *seen = make(*own_layers())
    count = len(network.weights)
    model = attached(seen_by(*seen), network)
    assert len(model.weights) == count
    fitted(model)
    loaded = saved(model, tmp_path)
    again = saved(loaded, tmp_path)
    for one in (loaded, again):
        networks.assert_same(weights_of(one), weights_of(model), atol=0)
    assert_trained_alike(again, model)
    np.testing.assert_allclose(again.predict(X), model.predict(X), atol=1e-5)


@each_writer
def test_models_written_on_other_backends(written_on):
    folder = TESTS / "models"
    expected = json.loads((folder / "layers.json").read_text())
    # PyTorch's optimizer is in the file.
    model = keras.saving.load_model(folder / f"layers-{written_on}.keras", compile=False)
    compiled(model, model.layers[-1].loss)
    np.testing.assert_allclose(fitted(model, 2)["loss"], expected["loss"], atol=1e-5)
    networks.assert_same(weights_of(model), expected["weights"])


def assert_gone(references):
    keras.backend.clear_session()
    for _ in range(3):
        gc.collect()
    assert [one() for one in references if one() is not None] == []


def test_detached_model_has_none_of_it(tmp_path):
    model, loss, features = networks.attached("frozen features")
    fitted(compiled(model, loss))
    detached, reference = detach(model), weakref.ref(features)
    assert len(detached.weights) == 2
    detached.save_weights(tmp_path / "small.weights.h5")
    predicted = model.predict(X, verbose=0)
    assert len(attach(detached, loss).weights) == len(model.weights) == 10
    del model, loss, features
    if BACKEND != "tensorflow":  # which keeps its graphs
        assert_gone([reference])
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


@each("count", [5, pytest.param(200, marks=pytest.mark.nightly)])
def test_nothing_is_left_of_many_models(count):
    features, left = networks.features(trainable=False), []
    for number in range(1, count + 1):
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
        del head, loss, model
        if number % 20 == 0:
            keras.backend.clear_session()
    assert_gone(left)


def test_compiled_models_are_let_go():
    def trained():
        model, loss, features = networks.attached("trained features")
        fitted(compiled(model, loss))
        return [weakref.ref(one) for one in (loss, features, model.layers[-1])]

    first, _ = trained(), trained()
    assert_gone(first)


@with_args
def noisy(y_true, y_pred, *, seed):
    noise = keras.random.uniform(ops.shape(y_pred)[:1], seed=seed)
    return 0.0 * keras.losses.mean_squared_error(y_true, y_pred) + noise


def noisy_model(seed=3):
    generator = keras.random.SeedGenerator(seed)
    return attached(noisy(seed=generator)), generator


def test_generator_of_a_layer_of_the_model(tmp_path):
    """Keras saves it with the layer, and would save it once more with the loss."""
    path, dropout = tmp_path / "model.keras", keras.layers.Dropout(0.5)
    for plain in (sequence(dropout), chain(dropout)):
        model = attach(plain, noisy(seed=dropout.seed_generator))
        with pytest.raises(SavingError, match="'seed' is a random generator of the layer 'dropout"):
            model.save(path)
    attach(plain, noisy(seed=keras.random.SeedGenerator())).save(path)


def test_states_that_no_compiler_of_pytorch_sees():
    for generator in (keras.layers.Dropout(0.5).seed_generator, keras.random.SeedGenerator()):
        assert is_random_state(generator.state)
    assert not is_random_state(keras.Variable(1.0, name="other"))


def test_new_numbers_in_every_step_of_training():
    """Validation and evaluation do not advance the generator."""
    model, generator = noisy_model()
    seen = fitted(model, 3, **VALIDATION)
    assert len(set(seen["loss"])) == 3
    model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(generator.state.value, [3, 12])
    by_hand = keras.random.SeedGenerator(3)
    numbers = [ops.convert_to_numpy(keras.random.uniform((8,), seed=by_hand)) for _ in range(4)]
    assert seen["loss"][0] == pytest.approx(np.mean(numbers), rel=1e-5)


def test_resumed_run_draws_what_the_uninterrupted_one_would(tmp_path):
    """From a saved model, from saved weights, and from a backup."""
    expected = fitted(noisy_model()[0], 4)["loss"]
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    model, weights = noisy_model()[0], tmp_path / "model.weights.h5"
    fitted(model, 2, callbacks=[backup], **VALIDATION)
    model.save_weights(weights)
    loaded, other = saved(model, tmp_path), noisy_model(seed=4)[0]
    other.optimizer.build(other.trainable_variables)
    other.load_weights(weights)
    resumed = [fitted(one, 2)["loss"] for one in (loaded, other)]
    resumed.append(fitted(noisy_model()[0], 4, callbacks=[backup])["loss"])
    assert resumed == [pytest.approx(expected[2:], rel=1e-6)] * 3


def test_one_generator_in_two_losses(tmp_path):
    seed = keras.random.SeedGenerator(3)
    model = attached(losses.both(first=noisy(seed=seed), second=noisy(seed=seed), factor=2.0))
    fitted(model)
    np.testing.assert_array_equal(seed.state.value, [3, 8])
    assert_trained_alike(saved(model, tmp_path), model)


def test_seeds_of_a_layer_advance():
    @with_args
    def dropped(y_true, y_pred, *, drop):
        return ops.mean(drop(y_pred, training=True), axis=-1)

    drop = keras.layers.Dropout(0.5, seed=3)
    fitted(attached(dropped(drop=drop)))
    np.testing.assert_array_equal(drop.seed_generator.state.value, [3, 4])


def perceiving(features):
    return attached(networks.perceptual(features=features))


@each(
    ("make", "error", "text"),
    [
        (keras.metrics.Mean, ArgumentError, "'features' of perceptual.. to a metric, Mean, which"),
        (keras.optimizers.SGD, ArgumentError, "to an optimizer, SGD, whose variables"),
        (lambda: networks.attached("head")[0], AttachError, "'features' of .* is attached to a lo"),
    ],
    ids=["metric", "optimizer", "attached model"],
)
def test_arguments_that_cannot_work(make, error, text):
    with pytest.raises(error, match=text):
        fitted(perceiving(make()))


def test_layer_built_after_attach():
    layer = keras.layers.Dense(2)
    model = perceiving(layer)
    with pytest.raises(AttachError, match="'features' of .* is not built: 'dense"):
        fitted(perceiving(keras.layers.Dense(2)))
    layer.build((None, 2))
    assert np.isfinite(fitted(model)["loss"]).all()


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
    loss = clipping(head=head)
    with pytest.raises(ArgumentError, match="clipping assigns the trainable weight '.*kernel'"):
        fitted(attached(loss))
    head.trainable = False
    fitted(attached(loss))
    assert np.abs(head.kernel).max() == pytest.approx(0.1)


def test_copies_that_would_lose_weights():
    model, *_ = networks.attached("own layer")
    with pytest.raises(SavingError, match="'layer' of .* shares weights with the layer 'dense"):
        keras.models.clone_model(model)
    model, loss, _ = networks.attached("head")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    assert_trained_alike(compiled(clone, clone.layers[-1].loss), compiled(model, loss))
    with pytest.raises(SavingError, match="'head' of projected.. is .*saved with its model only"):
        pickle.dumps(loss)


class Own(keras.Model):
    pass


class OwnSequential(keras.Sequential):
    pass


@each("cls", [None, Own, OwnSequential])
def test_networks_that_a_model_cannot_share(cls, tmp_path):
    """With the layer in the graph of a model, or a class of the user."""
    first, second, model = own_layers()
    loss = seen_by(sequence(first))
    if cls is None:
        model = keras.Model(model.input, attach(model.output, loss))
    else:
        parts = [model.input, first, second]
        model = attach(cls(parts) if cls is OwnSequential else cls(parts[0], model.output), loss)
        assert type(model) is cls
    fitted(compiled(model, loss))
    with pytest.raises(SavingError, match="cannot be saved: 'network' shares layers with the mode"):
        model.save(tmp_path / "model.keras")
