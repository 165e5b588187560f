"""What attach, detach, saving and copying keep, and what a loss makes of batches and targets."""

import copy
import functools
import pickle

import keras
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, KERAS
from lossargs import Adapter, LossArgs, LossArgsError, attach, detach, with_args
from losses import composed, masked, scaled, shifted

pytestmark = [
    pytest.mark.fit,
    pytest.mark.skipif(KERAS < (3, 15), reason="older Keras keeps less of a model"),
]
register = keras.saving.register_keras_serializable("keeping")
X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
YY = {"p": Y, "q": Y}
Dense = keras.layers.Dense
mse = keras.losses.mean_squared_error
huber = with_args(keras.losses.huber)
energy = with_args(lambda y, p, k: k * ops.mean(p**2, axis=-1) if y is None else None)
constant = functools.partial(keras.Variable, trainable=False)
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
# Schedules whose value is the step.
PIECES = {"boundaries": list(range(16)), "values": [float(step) for step in range(17)]}
steps = functools.partial(keras.optimizers.schedules.PiecewiseConstantDecay, **PIECES)


@with_args
def penalized(y_true, y_pred, weight):
    return mse(y_true, y_pred) + ops.sum(weight**2)


@register
class Count(Adapter):
    shape = ()

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def value(self, tensor, training):
        value = ops.copy(self.count.value)
        if training:
            self.count.assign(value + 1)
        return value


@register
class Own(keras.Model):
    def __init__(self, inputs, outputs, name=None, **kwargs):
        super().__init__(inputs, outputs, name=name, **kwargs)
        self.own = self.add_weight(shape=(), regularizer="l2", name="own")
        self.add_weight(shape=(2,), initializer="ones", name="unnamed", trainable=False)
        self.blocks, self.table, self._note = [Dense(1)], {"a": Dense(1)}, None
        self.mean, self.trained = keras.metrics.Mean("mean"), 0

    def train_step(self, *args):
        self.trained += 1
        return super().train_step(*args)


@register
class Holder(keras.Model):
    def __init__(self, loss=None, **kwargs):
        super().__init__(**kwargs)
        self.dense = Dense(1, kernel_initializer="zeros")
        self.dense.build((None, 3))
        self.loss_args = LossArgs(loss or penalized(self.dense.kernel))
        self.given = loss

    def call(self, x):
        return self.loss_args(self.dense(x))

    def get_config(self):
        return {**super().get_config(), "loss": self.given}

    @classmethod
    def from_config(cls, config):
        return cls(keras.saving.deserialize_keras_object(config.pop("loss")), **config)


def functional(cls=keras.Model, units=1, names=""):
    x = keras.Input((3,))
    outputs = [Dense(units, kernel_initializer="zeros")(x) for _ in names or "y"]
    return cls(x, dict(zip(names, outputs, strict=True)) if names else outputs[0])


def sequential(units=1):
    return keras.Sequential([keras.Input((3,)), Dense(units, kernel_initializer="zeros")])


def compiled(model, loss, rate=0.0):
    model.compile(keras.optimizers.SGD(rate), loss=loss)
    return model


def trained(model, loss, x=X, y=Y, rate=0.0):
    compiled(model, loss, rate).fit(x, y, batch_size=2, shuffle=False, verbose=0)
    return model


def logs(model, x=X, y=Y, **options):
    return model.evaluate(x, y, batch_size=8, verbose=0, return_dict=True, **options)


def loss_of(model):
    return next(one for one in model.layers if isinstance(one, LossArgs)).loss


@pytest.fixture
def reload(tmp_path):
    def reload(model, name="model.keras"):
        model.save(tmp_path / name)
        return keras.saving.load_model(tmp_path / name)

    return reload


def test_own_parts():
    model, loss = trained(functional(Own), "mse", rate=0.1), shifted(steps())
    model._note = "kept"
    attached = attach(model, loss)
    assert (attached.compiled, len(attached.weights)) == (False, len(model.weights) + 1)
    trained(attached, loss)
    detached = detach(attached)
    for one in (attached, detached):
        assert (type(one), one.own, one._note) == (type(model), model.own, "kept")
        assert (one.blocks[0], one.table["a"]) == (model.blocks[0], model.table["a"])
        assert one.trained
        assert one.mean in one.metrics
    assert [w.path for w in detached.weights] == [w.path for w in model.weights]
    assert logs(compiled(attach(detached, loss), loss))["shift"] == 4


@pytest.mark.parametrize("name", ["supports_jit", "autocast"])
def test_own_flags(name):
    model = functional(Own)
    setattr(model, name, False)
    attached = attach(model, shifted(constant(1.0)))

    assert (getattr(attached, name), getattr(detach(attached), name)) == (False, False)


@pytest.mark.skipif(BACKEND != "torch", reason="parameters of PyTorch")
def test_parameters_of_own_loops():
    model = attach(functional(Own), shifted(constant(1.0)))
    known = {id(parameter) for parameter in model.parameters()}

    assert [w.path for w in model.trainable_weights if id(w.value) not in known] == []


def test_attached_layer_of_a_sequential_model():
    model = keras.Sequential([keras.Input((3,)), attach(functional(), shifted(steps()))])
    with pytest.raises(LossArgsError, match="Detach"):
        detach(model)


@pytest.mark.parametrize("cls", [keras.Model, register(type("Sub", (keras.Model,), {}))])
@pytest.mark.parametrize("kind", [None, "list of one", list, tuple, dict])
def test_output_names(kind, cls, reload):
    x = keras.Input((3,))
    a, b = Dense(1, name="a")(x), Dense(1, name="b")(x)
    outputs = {None: a, "list of one": [a], list: [a, b], tuple: (a, b), dict: {"p": a, "q": b}}
    model = cls(x, outputs[kind])
    names = ["p", "q"] if kind is dict else list(model.output_names)
    losses = {name: shifted.options(name=name * 2)(constant(2.0)) for name in names}
    attached = compiled(attach(model, losses if kind else losses["a"]), losses)
    y = keras.tree.map_structure(lambda _: Y, model.output)
    want = logs(attached, X, y)
    assert len(names) == 1 or {f"{name}_loss" for name in names} <= want.keys()
    assert detach(attached).output_names == attached.output_names == model.output_names
    if cls is not keras.Model and kind in (list, tuple, "list of one"):
        with pytest.raises(LossArgsError, match="dict of outputs"):
            reload(attached)
        return
    if cls is not keras.Model and kind is None:  # the name is not in the logs
        losses = losses["a"]
        compiled(attached, losses)

    loaded = reload(reload(attached))
    assert logs(loaded, X, y) == want
    assert detach(loaded).output_names == model.output_names


LOSSES = [lambda: shifted(keras.Variable(2.0)), lambda: shifted(steps()), lambda: shifted(Count())]
AGAIN = [
    lambda model, loss, other: attach(detach(attach(detach(detach(model)), loss)), loss),
    lambda model, loss, other: attach(model, composed(main=loss)),
    lambda model, loss, other: attach(attach(model, other), loss),
    lambda model, loss, other: attach(detach(attach(detach(model), other)), loss),
]


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("loss", LOSSES[1:])
def test_positions(loss, again, reload):
    loss = loss()
    model = trained(attach(sequential(), loss), loss)
    loaded = reload(reload(model))
    for one in (again(model, loss, huber(constant(1.0))), again(loaded, loss_of(loaded), huber())):
        assert logs(compiled(one, loss_of(one)))["loss"] == 4


def test_one_schedule_in_a_second_loss(reload):
    losses = {"p": shifted(schedule := steps()), "q": scaled(schedule)}
    model = attach(functional(names="pq"), {"p": losses["p"]})
    trained(model, {"p": losses["p"], "q": "mse"}, X, YY)
    model = trained(attach(model, losses), losses, X, YY)
    assert logs(model, X, YY)["p_loss"] == 8

    assert logs(reload(model), X, YY)["p_loss"] == 8


def test_bound_loss_replaced_by_a_plain_one():
    first = {"p": shifted(constant(1.0)), "q": huber(constant(2.0))}
    second = {**first, "q": "mse"}
    model = compiled(attach(attach(functional(names="pq"), first), second), second)
    assert logs(model, X, YY)["loss"] == 1


def weight_of(kind):
    x = keras.Input((3,))
    inner = {"Functional": functional, "Sequential": sequential}.get(kind, lambda units: None)
    layer = inner(units=3) or (keras.layers.Embedding(2, 3) if kind == "embedding" else Dense(3))
    y = layer(layer(x)) if kind == "shared" else keras.layers.Flatten()(layer(x))
    model = Own(x, Dense(1)(y))
    return model, model.own if kind == "own" else layer.weights[0]


@pytest.mark.parametrize("kind", ["Functional", "Sequential", "shared", "embedding", "own"])
def test_weight_as_argument(kind, reload):
    model, weight = weight_of(kind)
    loss = composed(main=penalized(weight), weight=constant(0.5))
    model = trained(attach(model, loss), loss, rate=0.05)
    if kind == "own":
        with pytest.raises(LossArgsError, match="is a weight of the model itself"):
            reload(model)
        return
    loaded = reload(reload(model))
    assert len(loaded.weights) == len(model.weights)
    loss = loss_of(loaded)
    again = reload(compiled(attach(detach(loaded), loss), loss, 0.05))
    for one in (model, loaded, again):
        one.fit(X, Y + 1, shuffle=False, verbose=0)
    close([logs(one)["loss"] for one in (loaded, again)], logs(model)["loss"])
    for one in (model, loaded, again):
        one.set_weights([np.full(w.shape, 0.5) for w in one.weights])
    close([logs(one)["loss"] for one in (loaded, again)], logs(model)["loss"])
    copied = copy.deepcopy(model)
    assert (len(copied.weights), logs(copied)) == (len(model.weights), logs(model))


COPIES = [
    copy.deepcopy,
    keras.models.clone_model,
    lambda model: pickle.loads(pickle.dumps(model)),
]


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("loss", LOSSES)
def test_copies(loss, copied):
    loss = loss()
    model = trained(attach(sequential(), loss), loss)
    copied = copied(model)
    copied.set_weights(model.get_weights())
    compiled(copied, loss_of(copied))
    assert logs(copied) == logs(model)
    assert not {id(v) for v in copied.variables} & {id(v) for v in model.variables}


@pytest.mark.parametrize("loss", LOSSES)
def test_subclass_that_holds_its_loss(loss, reload, tmp_path):
    model = Holder(loss())
    trained(model, model.loss_args.loss)
    model.save_weights(tmp_path / "model.weights.h5")

    loaded, second = reload(reload(model)), reload(model)
    assert logs(loaded) == logs(model)
    assert not {id(v) for v in loaded.variables} & {id(v) for v in second.variables}
    second.set_weights([w * 0 for w in second.get_weights()])
    second.load_weights(tmp_path / "model.weights.h5")
    assert logs(second) == logs(model)


@pytest.mark.parametrize("is_dict", [False, True])
@pytest.mark.parametrize("name", ["new", None])
def test_new_input(name, is_dict, reload):
    x, new = keras.Input((3,), name="x"), keras.Input((2,), name=name)
    model = keras.Model({"x": x} if is_dict else x, Dense(1, kernel_initializer="zeros")(x))
    loss = masked(mask=Dense(1, kernel_initializer="ones")(new))
    attached = compiled(attach(model, loss), loss)
    data = [X if tensor.name == "x" else X[:, :2] for tensor in attached.inputs]
    data = {t.name: x for t, x in zip(attached.inputs, data, strict=True)} if is_dict else data
    loaded = reload(reload(attached))
    assert logs(loaded, data, Y + 1)["loss"] == logs(attached, data, Y + 1)["loss"] == 2
    for one in (attached, loaded):
        assert (len(detach(one).inputs), len(detach(one).weights)) == (1, 2)


SQUARE = [
    lambda y, p, e: (p[:, 0] @ ops.transpose(p[:, 1]) - (e[:, None] - e[None])) ** 2,
    lambda y, p, e: e[:, None] * mse(y, p),
]


@pytest.mark.parametrize("loss", SQUARE)
def test_flat_entries_on_purpose(loss):
    model = keras.Sequential([keras.Input((3,)), Dense(128), keras.layers.Reshape((8, 8, 2))])
    e, y = ops.arange(8, dtype="float32"), np.zeros((8, 8, 8, 2))
    want = logs(compiled(model, lambda y, p: loss(y[:, 0], p[:, 0], e)), X, y)["loss"]
    bound = with_args(lambda y, p, e: loss(y[:, 0], p[:, 0], e))()

    close(logs(compiled(model, bound), X, y, sample_weight={"e": np.arange(8.0)})["loss"], want)


def test_no_targets():
    loss, weight = energy(constant(2.0)), np.arange(8, dtype="float32")
    model = keras.Sequential([keras.Input((3,)), Dense(1)])
    model = compiled(attach(model, loss, track=[energy.options(name="other")(4.0)]), loss)
    want = 2 * model.predict(X, verbose=0)[:, 0] ** 2
    history = model.fit(X, validation_data=(X,), verbose=0).history
    close([history[name] for name in ("loss", "val_loss")], np.full((2, 1), np.mean(want)))
    batches = ((X, None, {"sample_weight": weight}) for _ in range(2))
    history = model.fit(batches, steps_per_epoch=2, shuffle=False, verbose=0).history
    close(history["loss"], [np.mean(weight * want)])
