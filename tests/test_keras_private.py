"""Each name of Keras that lossargs uses and that has no public form, tested by itself.

The traceback of a failure shows the names, the file of Keras where to look for the replacement, and
what lossargs uses them for. Change `src/lossargs/_keras` and the test. This file imports nothing of
lossargs or of the other tests. If an import fails, run it with `pytest --noconftest`.
"""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
SOURCE = Path(__file__).parents[1] / "src/lossargs"
STEPS = ("train_step", "test_step", "predict_step")
X, Y = np.ones((4, 2), "float32"), np.ones((4, 1), "float32")
known = set()

only_jax = pytest.mark.skipif(BACKEND != "jax", reason="other backends leave variables in place")


def private(names, look):
    """Return a decorator for a test of names that are in a file of `keras/src`."""
    known.update(names.split())
    return lambda test: test


def find(name):
    """Return the object with a dotted name in `keras.src`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"keras.src.{module}"), attribute)


def code_of(cls, name):
    """Return the code of a method of Keras, below the decorators."""
    return inspect.unwrap(getattr(cls, name)).__code__


def running(*names):
    """Return the running methods of these names, innermost first: name, object, frame."""
    frame, found = sys._getframe(1), []
    while frame := frame.f_back:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if code.co_name in names and isinstance(owner, keras.Layer):
            bases = type(owner).__mro__
            assert code.co_qualname in {f"{base.__qualname__}.{code.co_name}" for base in bases}
            found.append((code.co_name, owner, frame))
    return found


def watched(look):
    """Return a layer and a loss that call a function, and a list of the results."""
    seen = []

    class Seeing(keras.layers.Layer):
        def call(self, x):
            seen.append(look())
            return x

    def loss(y_true, y_pred):
        seen.append(look())
        return mean_error(y_true, y_pred)

    return Seeing(), loss, seen


def mean_error(y_true, y_pred):
    return ops.mean(ops.square(ops.subtract(y_true, y_pred)), axis=-1)


def model_with(*layers, **compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense"), *layers])
    model.compile("sgd", **{"loss": mean_error, **compiled})
    return model


@private("AutocastScope _autocast seed_generator_state", "backend/common/variables.py")
def test_variables():
    """lossargs reads live values in their own precision, and recognizes random state."""
    scope = find("backend.common.variables.AutocastScope")
    variable = keras.Variable(1.0, dtype="float32")
    with scope("float16"):
        assert keras.backend.standardize_dtype(variable.value.dtype) == "float16"
        with scope(None):
            assert keras.backend.standardize_dtype(variable.value.dtype) == "float32"
    assert variable._autocast is True
    assert keras.Variable(1.0, autocast=False)._autocast is False
    assert keras.random.SeedGenerator(0).state.name == "seed_generator_state"


@private(
    "in_stateless_scope get_stateless_scope original_scope _value _direct_assign",
    "backend/common/stateless_scope.py and variables.py",
)
def test_stateless_scope():
    """lossargs notes which variables a loss reads, and passes updates on."""
    inside = find("backend.common.stateless_scope.in_stateless_scope")
    read, written = [], []

    class Noting(keras.StatelessScope):
        def get_current_value(self, variable):
            read.append(variable)

        def add_update(self, update):
            variable, value = update
            written.append(variable)
            variable._direct_assign(value)

    variable = keras.Variable(1.0, trainable=False)
    assert not inside()
    with Noting() as scope:
        assert inside()
        assert find("backend.common.stateless_scope.get_stateless_scope")() is scope
        assert scope.original_scope is None
        assert float(variable.value) == 1  # the variable's own where the scope says `None`
        assert float(ops.convert_to_tensor(variable)) == 1
        variable.assign(2.0)
    assert all(one is variable for one in [*read, *written])
    assert len(read) >= 2
    assert len(written) == 1
    assert float(variable.value) == float(variable._value) == 2

    with keras.StatelessScope() as outer:
        variable.assign(3.0)
        with keras.StatelessScope() as inner:
            assert inner.original_scope is outer
            assert inner.get_current_value(variable) is None
        assert float(outer.get_current_value(variable)) == 3


@private(
    "get_tensor_attr set_tensor_attr get_keras_mask set_keras_mask",
    "backend/common/tensor_attributes.py and masking.py",
)
@pytest.mark.fit
def test_tensor_attributes():
    """lossargs gives live values and masks to the loss with the predictions."""
    get, put = (find(f"backend.common.tensor_attributes.{n}_tensor_attr") for n in ("get", "set"))
    get_mask, set_mask = (find(f"backend.common.masking.{n}_keras_mask") for n in ("get", "set"))
    values, mask, seen = object(), ops.ones((4,), dtype="bool"), []

    class Marking(keras.layers.Layer):
        def call(self, x):
            x = ops.copy(x)
            put(x, "_private_values", values)
            return x

    def loss(y_true, y_pred):
        seen.append(get(y_pred, "_private_values"))
        return mean_error(y_true, y_pred)

    model_with(Marking(), loss=loss).fit(X, Y, verbose=0)
    assert seen[-1] is values  # the loss receives the object that the last layer returned
    tensor = ops.ones(4)
    assert get(tensor, "_private_values") is None
    assert get_mask(tensor) is None
    set_mask(tensor, mask)
    assert get_mask(tensor) is mask


@private("jax_state_sync _jax_state _jax_state_synced", "backend/jax/trainer.py")
@only_jax
def test_variables_in_an_epoch():
    """lossargs reads and assigns variables in the callbacks of an epoch on JAX."""
    synced, assigned = [], []

    class Following(type(keras.Variable(0.0))):
        @property
        def value(self):
            return super().value

        def _direct_assign(self, value):
            assigned.append(value)
            super()._direct_assign(value)

    class Callback(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            assert bias._value is None
            assert model._jax_state
            model.jax_state_sync()  # as `self.model` does
            assert bias._value is not None
            assert model._jax_state_synced
            synced.append(float(bias.value[0]))
            bias.assign([10.0])

    model = model_with()
    bias = model.layers[0].bias
    bias.__class__ = Following
    model.fit(X, Y, batch_size=2, verbose=0, shuffle=False, callbacks=[Callback()])
    assert len(assigned) >= 4  # by each sync, and each callback
    first, second = synced
    assert first != 0
    assert second not in (first, 10)  # trained from the value that was assigned
    assert second > 1
    assert float(bias.value[0]) == 10


@private("fit evaluate state", "backend/jax/trainer.py")
@only_jax
def test_taken_variables():
    """lossargs gives a model on JAX its variables back after an exception."""

    def look():
        for name, model, frame in running("fit", "evaluate"):
            if "state" not in frame.f_locals:
                continue  # the model is being built
            taken = [model.trainable_variables, model.non_trainable_variables]
            taken += [model.optimizer.variables] if name == "fit" else []
            taken += [model.metrics_variables]
            for variables, values in zip(taken, frame.f_locals["state"], strict=True):
                assert [v.shape for v in variables] == [value.shape for value in values]
                assert all(v._value is None for v in variables)
            assert frame.f_code is code_of(keras.Model, name)
            return name
        return None

    layer, _, seen = watched(look)
    model = model_with(layer)
    for method in ("fit", "evaluate"):
        getattr(model, method)(X, Y, verbose=0)
        assert seen[-1] == method


@private("in_symbolic_scope _symbolic_build", "trainers/trainer.py, _symbolic_build")
@pytest.mark.fit
def test_symbolic_build():
    """lossargs recognizes the build before the first step, and finds its model."""
    inside = find("backend.common.symbolic_scope.in_symbolic_scope")
    _, loss, seen = watched(lambda: (inside(), [one for _, one, _ in running("_symbolic_build")]))
    model = model_with(loss=loss, metrics=["mae"])
    model.train_on_batch(X, Y)
    symbolic = [found[0] for is_symbolic, found in seen if is_symbolic]
    assert symbolic or BACKEND == "tensorflow"  # it traces instead
    assert all(found is model for found in symbolic)
    assert not seen[-1][0]


@private(
    "train_step test_step predict_step compute_loss_and_updates compute_metrics",
    "backend/*/trainer.py and trainers/trainer.py",
)
@pytest.mark.fit
def test_steps():
    """lossargs finds the model of a step, and recognizes training and metrics."""

    def look():
        owners = {name: owner for name, owner, _ in reversed(running(*STEPS))}
        calls = running("compute_loss_and_updates")
        return owners, [frame.f_code is code_of(keras.Model, name) for name, _, frame in calls]

    layer, _, seen = watched(look)
    _, metric, metrics = watched(lambda: running("compute_metrics", "compute_loss")[0][0])
    model = model_with(layer, metrics=[metric])
    has_loss = [True] if BACKEND == "jax" else []
    for run, expected in (
        (model.fit, ({"train_step": model}, has_loss)),
        (model.evaluate, ({"test_step": model}, has_loss)),
        (lambda x, y, verbose: model.predict(x, verbose=verbose), ({"predict_step": model}, [])),
    ):
        seen.clear()
        run(X, Y, verbose=0)
        assert expected in seen
    assert metrics[-1] == "compute_metrics"


@private(
    "__call__ call_spec user_arguments_dict stateless_call kwargs",
    "layers/layer.py, Layer.__call__, CallSpec and stateless_call",
)
def test_training_argument():
    """lossargs reads the `training` argument of the call of a model."""

    def look():
        given = []
        for _, _, frame in running("__call__", "stateless_call"):
            if frame.f_code is code_of(keras.Layer, "__call__"):
                given.append(frame.f_locals["call_spec"].user_arguments_dict.get("training"))
            elif frame.f_code is code_of(keras.Layer, "stateless_call"):
                given.append(frame.f_locals["kwargs"].get("training"))
        return next((training for training in given if training is not None), None)

    layer, _, seen = watched(look)
    model = keras.Sequential([keras.Input((2,)), layer])
    for training in (True, False, None):
        model(X, training=training)
        assert seen[-1] is training
        model.stateless_call([], [], X, training=training)
        assert seen[-1] is training


@private(
    "get_global_attribute id_to_config_map id_to_obj_map use_legacy_config",
    "saving/serialization_lib.py and legacy/saving/saving_options.py",
)
def test_saving(tmp_path):
    """lossargs learns how a model is saved: with shared objects, or in the legacy format."""
    get_global = find("backend.common.global_state.get_global_attribute")
    seen, loaded = [], []

    class Noting(keras.layers.Layer):
        def get_config(self):
            shared = get_global("shared_objects/id_to_config_map") is not None
            seen.append((shared, bool(get_global("use_legacy_config"))))
            return super().get_config()

        @classmethod
        def from_config(cls, config):
            loaded.append(get_global("shared_objects/id_to_obj_map"))
            return cls(**config)

    layer = Noting()
    model = keras.Sequential([keras.Input((1,)), layer])
    for save, expected in (
        (layer.get_config, (False, False)),
        (lambda: keras.saving.serialize_keras_object(model), (False, False)),
        (lambda: model.save(tmp_path / "model.keras"), (True, False)),
        (lambda: model.save(tmp_path / "model.h5"), (False, True)),
    ):
        seen.clear()
        save()
        assert set(seen) == {expected}
    keras.saving.load_model(tmp_path / "model.keras", custom_objects={"Noting": Noting})
    assert isinstance(loaded[0], dict)


@private(
    "_compile_metrics _user_metrics _user_weighted_metrics output_names get_object_name",
    "trainers/trainer.py, compile_utils.py and utils/naming.py",
)
def test_names_in_the_logs():
    """lossargs refuses equal names in the logs, and metrics weighted by a batch entry."""
    model = model_with(metrics=["mae"], weighted_metrics=["mse"])
    assert model._compile_metrics._user_metrics == ["mae"]
    assert model._compile_metrics._user_weighted_metrics == ["mse"]
    assert model._functional.output_names == ["dense"]
    assert find("utils.naming.get_object_name")(mean_error) == "mean_error"
    assert find("utils.naming.get_object_name")(keras.metrics.Mean(name="a")) == "a"


@private(
    "squeeze_or_expand_to_same_rank scale_loss_for_distribution unscale_loss_for_distribution",
    "losses/loss.py",
)
def test_reduction():
    """lossargs evaluates a function as Keras does: ranks and replicas."""
    values = ops.convert_to_tensor([1.0, 3.0])
    same_rank = find("losses.loss.squeeze_or_expand_to_same_rank")
    assert [tuple(t.shape) for t in same_rank(values, ops.ones((2, 1)))] == [(2, 1), (2, 1)]
    for name in ("scale_loss_for_distribution", "unscale_loss_for_distribution"):
        assert float(find(f"losses.loss.{name}")(values[1])) == 3  # one replica


@private(
    "_convert_input_args _allow_non_tensor_positional_args _clear_losses",
    "layers/layer.py, Layer.__call__",
)
def test_calls():
    """lossargs calls layers with any arguments, and again without losing added losses."""

    class Taking(keras.layers.Layer):
        def call(self, x, other):
            self.seen = x
            return ops.convert_to_tensor(x)

        def _clear_losses(self):
            cleared.append(self)
            super()._clear_losses()

    cleared, layer = [], Taking()
    assert layer._convert_input_args
    with pytest.raises(ValueError, match="positional"):
        layer(ops.ones((1, 2)), "text")
    layer._convert_input_args, layer._allow_non_tensor_positional_args = False, True
    layer(X, "text")
    assert layer.seen is X
    assert layer in cleared


@private(
    "_flatten_layers _trainable_variables _non_trainable_variables _track_variable",
    "layers/layer.py",
)
def test_parts_of_a_layer():
    """lossargs finds all layers of a model, and the weights that each of them keeps itself."""
    layer = keras.layers.BatchNormalization()
    layer.build((None, 2))
    assert [v.name for v in layer._trainable_variables] == ["gamma", "beta"]
    assert [v.name for v in layer._non_trainable_variables] == ["moving_mean", "moving_variance"]
    inner = keras.Sequential([layer])
    model = keras.Sequential([inner])
    assert {id(model), id(inner), id(layer)} <= set(map(id, model._flatten_layers()))
    assert not model._trainable_variables
    variable = keras.Variable(1.0)
    model._track_variable(variable)
    assert model._trainable_variables[0] is variable
    assert any(one is variable for one in model.trainable_variables)


@private(
    "_keras_history _inbound_nodes _outbound_nodes compute_output_spec",
    "ops/node.py and operation.py, backend/*/core.py",
)
def test_graph():
    """lossargs follows the graph of a Functional model."""
    x, layer = keras.Input((2,)), keras.layers.Dense(1)
    y = layer(x)
    operation, index, _ = vars(y)["_keras_history"]
    node = operation._inbound_nodes[index]
    assert operation is node.operation is layer
    assert node.input_tensors[0] is x
    assert node.outputs[0] is y
    assert node.arguments.args == (x,)
    assert [one.operation for one in x._keras_history.operation._outbound_nodes] == [layer]
    source, index, _ = vars(x)["_keras_history"]
    assert not source._inbound_nodes[index].input_tensors
    spec = find("backend.compute_output_spec")(ops.sum, keras.KerasTensor((2, 3)))
    assert isinstance(spec, keras.KerasTensor)
    assert spec.shape == ()


def graph_of(cls):
    """Return what a model of this class is made of, and its output."""
    x, dense = keras.Input((2,)), keras.layers.Dense(1)
    return ([x, dense],) if cls is keras.Sequential else (x, dense(x))


@private("Functional", "models/functional.py and sequential.py")
def test_functional():
    """lossargs recognizes a Functional model, and makes one of the same class."""
    functional = find("models.functional.Functional")
    assert type(keras.Model(*graph_of(functional))) is functional
    assert not isinstance(keras.Sequential(), functional)
    for base in (functional, keras.Sequential):

        class Own(base):
            def __init__(self, *args, **kwargs):
                raise AssertionError("not called")

        model = Own.__new__(Own)
        vars(base)["__init__"](model, *graph_of(base), name="same")
        assert type(model) is Own
        assert model.name == "same"
        assert model.predict(X, verbose=0).shape == (4, 1)


@private("_modules _eval_epoch_iterator _torch_params", "backend/*/trainer.py and layer.py")
@pytest.mark.fit
def test_attributes_of_a_model():
    """lossargs tells the attributes that a user gave a model from those that Keras sets."""

    def names(model):
        return {*vars(model), *getattr(model, "_modules", ())}

    runs = {"history", "_jax_state", "_eval_epoch_iterator", "output_names", "_torch_params"}
    runs |= {"torch_params", "stop_evaluating", "stop_predicting"}  # the last two may be copied
    for cls in (find("models.functional.Functional"), keras.Sequential):
        model = cls(*graph_of(cls))
        model.compile("sgd", "mse")
        compiled = names(model)
        model.fit(X, Y, verbose=0, validation_data=(X, Y))
        model.evaluate(X, Y, verbose=0)
        model.predict(X, verbose=0)
        model.own = 1
        assert names(model) - compiled - runs == {"own"}


# Other words of `_keras`: its own attributes, and public names.
OTHERS = (
    "_assigning _backend _copies _copies_of _dropped _getframe _loss _models _sync "
    "CompositeExplicitAutograd DEF autocast copy distributed dtype_policy history inbound_nodes "
    "input_layers jax layers loss lossargs model mse name output_layers sgd shared_object_id "
    "stop_evaluating stop_predicting supports_jit tensorflow torch torch_params training x y zeros"
)


def used_names(source):
    """Return what a module imports from `keras.src`, and its attributes and words as strings."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.ImportFrom(module=str(module)) if module.startswith("keras.src"):
                names |= {alias.name for alias in node.names}
            case ast.Attribute(attr=name) if name.startswith("_"):
                names.add(name)
            case ast.Constant(value=str(text)) if re.fullmatch(r"([\w./]*[./])?\w+", text):
                names.add(re.split("[./]", text)[-1])
    return {name for name in names if name == "__call__" or not name.startswith("__")}


def test_every_name_has_a_test():
    sources = "\n".join(path.read_text() for path in sorted((SOURCE / "_keras").glob("*.py")))
    assert "import keras.src" not in sources
    used = used_names(sources)
    others = set(OTHERS.split())
    assert used - others - known == set(), "a name of Keras without a test in this file"
    assert used >= others
    assert len(used - others) > 40
    # Methods without a sign of being private, or that are only overridden.
    assert known - used == {"original_scope", "jax_state_sync", "_clear_losses"}


def test_new_names_are_found():
    source = "from keras.src.a import b\nx._private\nask(x, 'text', 'Model.method', 'of/words')"
    assert used_names(source) == {"b", "_private", "text", "method", "words"}
