"""What attach, detach, saving and copying keep of a model."""

import copy
import functools
import pickle

import keras
import numpy as np
import pytest
from keras import ops

from helpers import BACKEND, KERAS, fixed, layer_of, logs_of
from lossargs import Adapter, AttachError, LossArgs, LossArgsError, attach, detach, with_args
from losses import composed, flexible, masked, scaled, shifted

pytestmark = [
    pytest.mark.fit,
    pytest.mark.skipif(KERAS < (3, 15), reason="older Keras keeps less of a model"),
]
register = keras.saving.register_keras_serializable("keeping")
each = pytest.mark.parametrize
X, Y = np.ones((8, 3), "float32"), np.zeros((8, 1), "float32")
YY = {"p": Y, "q": Y}
huber = with_args(keras.losses.huber)
Dense = functools.partial(keras.layers.Dense, kernel_initializer="zeros")
# A schedule whose value is the step; piecewise, so that loaded ones have equal configs.
PIECES = {"boundaries": list(range(16)), "values": [float(step) for step in range(17)]}
steps = functools.partial(keras.optimizers.schedules.PiecewiseConstantDecay, **PIECES)


@with_args
def penalized(y_true, y_pred, weight):
    return keras.losses.mean_squared_error(y_true, y_pred) + ops.sum(weight**2)


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
        self.dense = Dense(1)
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
    outputs = [Dense(units)(x) for _ in names or "y"]
    return cls(x, dict(zip(names, outputs, strict=True)) if names else outputs[0])


def sequential(units=1):
    return keras.Sequential([keras.Input((3,)), Dense(units)])


def compiled(model, loss, rate=0.0):
    # What a model keeps does not depend on compilation, which takes most of the time.
    model.compile(keras.optimizers.SGD(rate), loss=loss, run_eagerly=True)
    return model


def trained(model, loss, x=X, y=Y, rate=0.0):
    compiled(model, loss, rate).fit(x, y, batch_size=2, shuffle=False, verbose=0)
    return model


def logs(model, x=X, y=Y, **options):
    return logs_of(model, x, y, batch_size=8, **options)


@pytest.fixture
def reload(tmp_path):
    def reload(model):
        model.save(tmp_path / "model.keras")
        return keras.saving.load_model(tmp_path / "model.keras")

    return reload


def test_own_parts():
    model, loss = trained(functional(Own), "mse", rate=0.1), shifted(steps())
    model._note, model.supports_jit, model.autocast = "kept", False, False
    attached = attach(model, loss)
    assert (attached.compiled, len(attached.weights)) == (False, len(model.weights) + 1)
    trained(attached, loss)
    detached = detach(attached)
    for one in (attached, detached):
        assert (type(one), one.own, one._note) == (type(model), model.own, "kept")
        assert (one.blocks[0], one.table["a"]) == (model.blocks[0], model.table["a"])
        assert (one.supports_jit, one.autocast) == (False, False)
        assert one.trained
        assert one.mean in one.metrics
    assert [w.path for w in detached.weights] == [w.path for w in model.weights]
    assert logs(compiled(attach(detached, loss), loss))["shift"] == 4
    if BACKEND == "torch":  # for optimizers of PyTorch
        parameters = {id(parameter) for parameter in attached.parameters()}
        assert parameters >= {id(w.value) for w in attached.trainable_weights}


@each("cls", [keras.Model, register(type("Sub", (keras.Model,), {}))])
@each("kind", [None, "list of one", list, tuple, dict])
def test_output_names(kind, cls, reload):
    x = keras.Input((3,))
    a, b = Dense(1, name="a")(x), Dense(1, name="b")(x)
    outputs = {None: a, "list of one": [a], list: [a, b], tuple: (a, b), dict: {"p": a, "q": b}}
    model = cls(x, outputs[kind])
    names = ["p", "q"] if kind is dict else list(model.output_names)
    losses = {name: shifted.options(name=name * 2)(fixed(2.0)) for name in names}
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
        compiled(attached, losses["a"])
    loaded = reload(reload(attached))
    assert logs(loaded, X, y) == want
    assert detach(loaded).output_names == model.output_names


def live_loss():
    """A loss with a live value of each kind."""
    return flexible(variable=keras.Variable(2.0), schedule=steps(), adapter=Count())


def trained_on_live_values():
    loss = live_loss()
    return trained(attach(sequential(), loss), loss)


def test_positions(reload):
    model = trained_on_live_values()
    loaded = reload(reload(model))
    for one, other in ((model, huber(fixed())), (loaded, huber())):
        loss = layer_of(one).loss
        for again in (
            attach(detach(attach(detach(detach(one)), loss)), loss),
            attach(one, composed(main=loss)),
            attach(attach(one, other), loss),
            attach(detach(attach(detach(one), other)), loss),
        ):
            expected = {"loss": 10, "variable": 2, "schedule": 4, "adapter": 4}
            assert logs(compiled(again, layer_of(again).loss)).items() >= expected.items()


def test_one_schedule_in_a_second_loss(reload):
    schedule = steps()
    losses = {"p": shifted(schedule), "q": scaled(schedule)}
    model = attach(functional(names="pq"), {"p": losses["p"]})
    trained(model, {"p": losses["p"], "q": "mse"}, X, YY)
    model = trained(attach(model, losses), losses, X, YY)
    assert logs(model, X, YY)["p_loss"] == 8
    assert logs(reload(model), X, YY)["p_loss"] == 8


def test_bound_loss_replaced_by_a_plain_one():
    first = {"p": shifted(fixed()), "q": huber(fixed(2.0))}
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


@each("kind", ["Functional", "Sequential", "shared", "embedding", "own"])
def test_weight_as_argument(kind, reload):
    model, weight = weight_of(kind)
    weight.assign(0.5 * ops.ones(weight.shape))
    loss = composed(main=penalized(weight), weight=fixed(0.5))
    model = trained(attach(model, loss), loss, rate=0.05)
    if kind == "own":
        with pytest.raises(LossArgsError, match="is a weight of the model itself"):
            reload(model)
        return
    with pytest.raises(LossArgsError, match="'weight' of .* shares weights with the layer"):
        keras.models.clone_model(model)
    loaded = reload(reload(model))
    loss = layer_of(loaded).loss
    again = reload(compiled(attach(detach(loaded), loss), loss, 0.05))
    copied = copy.deepcopy(model)
    values = []
    for one in (model, loaded, again, copied):
        assert len(one.weights) == len(model.weights)
        one.fit(X, Y + 1, shuffle=False, verbose=0)
        value = logs(one)["loss"]
        one.set_weights([np.full(w.shape, 0.25) for w in one.weights])
        values.append([value, logs(one)["loss"]])
    np.testing.assert_allclose(values[1:], [values[0]] * 3, rtol=1e-4)


@each("copied", [copy.deepcopy, keras.models.clone_model, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model = trained_on_live_values()
    other = copied(model)
    other.set_weights(model.get_weights())
    assert not {id(v) for v in other.variables} & {id(v) for v in model.variables}
    with pytest.raises(AttachError, match="loaded or cloned"):
        logs(compiled(other, model.loss))
    assert logs(compiled(other, layer_of(other).loss)) == logs(model)


def test_subclass_that_holds_its_loss(reload, tmp_path):
    model = Holder(live_loss())
    trained(model, model.loss_args.loss)
    model.save_weights(tmp_path / "model.weights.h5")
    loaded, second = reload(reload(model)), reload(model)
    assert logs(loaded) == logs(model)
    assert not {id(v) for v in loaded.variables} & {id(v) for v in second.variables}
    second.set_weights([w * 0 for w in second.get_weights()])
    second.load_weights(tmp_path / "model.weights.h5")
    assert logs(second) == logs(model)


@each("is_dict", [False, True])
@each("name", ["new", None])
def test_new_input(name, is_dict, reload):
    x, new = keras.Input((3,), name="x"), keras.Input((2,), name=name)
    model = keras.Model({"x": x} if is_dict else x, Dense(1)(x))
    loss = masked(mask=keras.layers.Dense(1, kernel_initializer="ones")(new))
    attached = compiled(attach(model, loss), loss)
    data = [X if tensor.name == "x" else X[:, :2] for tensor in attached.inputs]
    data = {t.name: x for t, x in zip(attached.inputs, data, strict=True)} if is_dict else data
    loaded = reload(reload(attached))
    assert logs(loaded, data, Y + 1)["loss"] == logs(attached, data, Y + 1)["loss"] == 2
    for one in (attached, loaded):
        assert (len(detach(one).inputs), len(detach(one).weights)) == (1, 2)
