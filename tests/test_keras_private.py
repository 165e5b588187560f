"""Each name of Keras that lossargs uses and that has no public form, tried by itself.

A failure says what the name is used for, and where to look. This file imports nothing of lossargs
or the other tests: where an import is gone, run `pytest --noconftest tests/test_keras_private.py`.
"""

import ast
import functools
import importlib
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

BACKEND = keras.backend.backend()
SOURCE = Path(__file__).parents[1] / "src/lossargs"
known = set()


def private(*names, used, look):
    """A test of names; what it raises becomes a text that says what to do."""
    known.update(names)

    def decorate(test):
        @functools.wraps(test)
        def explained(*args, **kwargs):
            try:
                test(*args, **kwargs)
            except Exception as error:
                raise AssertionError(
                    f"{', '.join(names)}: gone from Keras {keras.__version__}, or different: "
                    f"{error!r}. lossargs uses it {used}. Look in {look} of Keras for what does "
                    "that now, and mend src/lossargs/_keras.py, and the list of this test."
                ) from error

        return explained

    return decorate


def find(name):
    """What stands under a dotted name of `keras.src`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"keras.src.{module}"), attribute)


def mean_error(y_true, y_pred):
    return ops.mean(ops.square(ops.subtract(y_true, y_pred)), axis=-1)


def model_with(**compiled):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="dense")])
    model.compile("sgd", **{"loss": mean_error, **compiled})
    return model


def trained(model):
    model.train_on_batch(np.ones((2, 2), "float32"), np.ones((2, 1), "float32"))


class Watch:
    """Calls a function in the loss of a model and keeps what it gives."""

    def __init__(self, function):
        self.function, self.seen = function, []

    def __call__(self, y_true, y_pred):
        self.seen.append(self.function())
        return mean_error(y_true, y_pred)


def names_on_stack(*wanted):
    """The `self` of the innermost calls of functions of these names."""
    frame, found = sys._getframe(), {}
    while frame is not None:
        if frame.f_code.co_name in wanted:
            found.setdefault(frame.f_code.co_name, frame.f_locals.get("self"))
        frame = frame.f_back
    return found


@private(
    "backend.common.variables.AutocastScope",
    used="so that LossArgs reads live values in their own precision",
    look="keras/src/backend/common/variables.py",
)
def test_autocast_scope():
    scope = find("backend.common.variables.AutocastScope")
    variable = keras.Variable(1.0, dtype="float32")
    with scope("float16"):
        assert keras.backend.standardize_dtype(variable.value.dtype) == "float16"
        with scope(None):
            assert keras.backend.standardize_dtype(variable.value.dtype) == "float32"


@private(
    "backend.compute_output_spec",
    used="to find the shapes of derivatives",
    look="keras/src/backend/*/core.py",
)
def test_compute_output_spec():
    spec = find("backend.compute_output_spec")(ops.sum, keras.KerasTensor((2, 3)))
    assert isinstance(spec, keras.KerasTensor)
    assert spec.shape == ()


@private(
    "backend.common.global_state.get_global_attribute",
    used="to see what Keras keeps while it calls a layer and while it saves",
    look="keras/src/backend/common/global_state.py",
)
def test_get_global_attribute():
    assert find("backend.common.global_state.get_global_attribute")("no such name") is None


@private(
    "current_call_ctx",
    used="to learn whether a layer is called with training=True",
    look="keras/src/layers/layer.py, CallContext",
)
def test_current_call_context():
    seen = []

    @keras.saving.register_keras_serializable("private")
    class Seeing(keras.layers.Layer):
        def call(self, x):
            get = find("backend.common.global_state.get_global_attribute")
            seen.append(getattr(get("current_call_ctx"), "training", None))
            return x

    layer = Seeing()
    for training in (True, False):
        keras.Sequential([layer])(np.ones((1, 1)), training=training)
        assert seen[-1] is training
    get = find("backend.common.global_state.get_global_attribute")
    assert getattr(get("current_call_ctx"), "training", None) is None


@private(
    "shared_objects/id_to_config_map",
    used="to know whether a model is written as a whole, where one object met twice loads as one",
    look="keras/src/saving/serialization_lib.py, ObjectSharingScope",
)
def test_sharing_scope():
    get, seen = find("backend.common.global_state.get_global_attribute"), []

    class Seeing(keras.layers.Layer):
        def get_config(self):
            seen.append(get("shared_objects/id_to_config_map"))
            return super().get_config()

    layer = Seeing()
    layer.get_config()
    assert seen.pop() is None
    model = keras.Sequential([keras.Input((1,)), layer])
    scope = find("saving.serialization_lib.ObjectSharingScope")
    with scope():
        keras.saving.serialize_keras_object(model)
    assert seen[-1] is not None


@private(
    "backend.common.masking.get_keras_mask",
    "backend.common.masking.set_keras_mask",
    used="to hand the mask of the predictions on to the loss",
    look="keras/src/backend/common/masking.py",
)
def test_masks():
    tensor, mask = ops.ones((2, 3)), ops.ones((2,), dtype="bool")
    assert find("backend.common.masking.get_keras_mask")(tensor) is None
    find("backend.common.masking.set_keras_mask")(tensor, mask)
    assert find("backend.common.masking.get_keras_mask")(tensor) is mask


@private(
    "backend.common.stateless_scope.in_stateless_scope",
    used="to keep traced values out of variables on JAX",
    look="keras/src/backend/common/stateless_scope.py",
)
def test_in_stateless_scope():
    inside = find("backend.common.stateless_scope.in_stateless_scope")
    assert not inside()
    with keras.StatelessScope():
        assert inside()


@private(
    "backend.common.symbolic_scope.in_symbolic_scope",
    "_symbolic_build",
    used="to tell the loss of stand-ins, before the first step, from the loss of a step, and to "
    "find the model there",
    look="keras/src/trainers/trainer.py, _symbolic_build",
)
@pytest.mark.fit
def test_symbolic_build():
    inside = find("backend.common.symbolic_scope.in_symbolic_scope")
    loss = Watch(lambda: (inside(), names_on_stack("_symbolic_build").get("_symbolic_build")))
    model = model_with(loss=loss, metrics=["mae"])
    trained(model)
    symbolic = [found for is_symbolic, found in loss.seen if is_symbolic]
    if BACKEND != "tensorflow":  # it traces instead
        assert symbolic
    assert all(found is model for found in symbolic)
    assert not loss.seen[-1][0]


@private(
    "train_step",
    "test_step",
    "predict_step",
    used="to find the model on the stack, and to tell training from evaluation",
    look="keras/src/backend/*/trainer.py",
)
@pytest.mark.fit
def test_steps():
    seen, steps = [], ("train_step", "test_step", "predict_step")

    class Seeing(keras.layers.Layer):
        def call(self, x):
            seen.append(names_on_stack(*steps))
            return x

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), Seeing()])
    model.compile("sgd", loss=mean_error)
    x, y = np.ones((2, 2)), np.ones((2, 1))
    calls = (lambda: model.fit(x, y, verbose=0), lambda: model.evaluate(x, y, verbose=0))
    for name, run in zip(steps, (*calls, lambda: model.predict(x, verbose=0)), strict=True):
        seen.clear()
        run()
        assert {name: model} in seen


@private(
    "fit",
    "evaluate",
    "_value",
    "backend.jax.trainer",
    used="to give a model on JAX its variables back after an exception, from the local `state`",
    look="keras/src/backend/jax/trainer.py",
)
@pytest.mark.skipif(BACKEND != "jax", reason="the other backends leave the variables in place")
def test_taken_variables():
    seen = []

    def look():
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name not in ("fit", "evaluate"):
            frame = frame.f_back
        if frame is None or "state" not in frame.f_locals:
            return  # still being built
        taken = [model.trainable_variables, model.non_trainable_variables]
        taken += [model.optimizer.variables] if frame.f_code.co_name == "fit" else []
        taken += [model.metrics_variables]
        shapes = [[value.shape for value in values] for values in frame.f_locals["state"]]
        assert shapes == [[variable.shape for variable in variables] for variables in taken]
        assert all(variable._value is None for variables in taken for variable in variables)
        assert frame.f_locals["self"] is model
        assert frame.f_globals["__name__"] == "keras.src.backend.jax.trainer"
        seen.append(frame.f_code.co_name)

    class Looking(keras.layers.Layer):
        def call(self, x):
            look()
            return x

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1), Looking()])
    model.compile("adam", loss=mean_error)
    x, y = np.ones((2, 2)), np.ones((2, 1))
    model.fit(x, y, verbose=0)
    model.evaluate(x, y, verbose=0)
    assert set(seen) == {"fit", "evaluate"}


@private(
    "compute_metrics",
    "compute_loss",
    "_compute_loss",
    used="to tell a loss given as a metric from the loss, and to find the model of a loss",
    look="keras/src/trainers/trainer.py",
)
@pytest.mark.fit
def test_computing():
    names = ("compute_metrics", "compute_loss", "_compute_loss")
    loss, metric = (Watch(lambda: names_on_stack(*names)) for _ in range(2))
    model = model_with(loss=loss, metrics=[metric])
    trained(model)
    last = loss.seen[-1]
    assert "compute_metrics" not in last
    assert isinstance(last["_compute_loss"], keras.Model)
    assert "compute_loss" in last
    assert "compute_metrics" in metric.seen[-1]
    assert "compute_loss" not in metric.seen[-1]


@private(
    "_compile_metrics",
    "_user_metrics",
    "_user_weighted_metrics",
    used="to refuse two things of one name in the logs, and weighted metrics weighted by a batch "
    "entry",
    look="keras/src/trainers/trainer.py and compile_utils.py, CompileMetrics",
)
def test_metrics_of_compile():
    model = model_with(metrics=["mae"], weighted_metrics=["mse"])
    assert model._compile_metrics._user_metrics == ["mae"]
    assert model._compile_metrics._user_weighted_metrics == ["mse"]


@private(
    "losses.loss.reduce_weighted_values",
    used="to reduce the losses of samples on eager PyTorch",
    look="keras/src/losses/loss.py",
)
def test_reduce_weighted_values():
    values, mask = ops.convert_to_tensor([1.0, 3.0]), ops.convert_to_tensor([True, False])
    reduce = find("losses.loss.reduce_weighted_values")
    for reduction, expected in (("sum", 4), ("sum_over_batch_size", 2)):
        assert float(reduce(values, mask=None, reduction=reduction, dtype="float32")) == expected
    masked = reduce(values, mask=mask, reduction="sum_over_batch_size", dtype="float32")
    assert float(masked) == pytest.approx(1)


@private(
    "losses.loss.unscale_loss_for_distribution",
    used="to log tracked losses as they are under tf.distribute",
    look="keras/src/losses/loss.py",
)
def test_unscale_loss():
    loss = ops.convert_to_tensor(3.0)
    assert float(find("losses.loss.unscale_loss_for_distribution")(loss)) == 3  # one replica


@private(
    "losses.losses.LossFunctionWrapper",
    used="to evaluate a function as `compile` does: ranks, masks, weights, reductions",
    look="keras/src/losses/losses.py",
)
def test_loss_function_wrapper():
    wrapper = find("losses.losses.LossFunctionWrapper")
    policy = keras.dtype_policies.get("float32")
    loss = wrapper(mean_error, reduction="sum", name="error", dtype=policy)
    assert float(loss(np.ones((2, 1)), np.zeros((2, 1)), np.array([1.0, 2.0]))) == 3
    assert loss.fn is mean_error
    # Ranks that differ by a last dimension of 1 do not broadcast.
    assert float(loss(np.array([1.0, 2.0]), np.zeros((2, 1)))) == 5


@private(
    "models.functional.Functional",
    used="to tell a model made of inputs and outputs from one with a `call`",
    look="keras/src/models/functional.py",
)
def test_functional():
    functional = find("models.functional.Functional")
    x = keras.Input((2,))
    assert type(keras.Model(x, keras.layers.Dense(1)(x))) is functional
    assert not isinstance(keras.Sequential(), functional)


@private(
    "utils.naming.get_object_name",
    used="to name a loss in the logs as Keras names its function",
    look="keras/src/utils/naming.py",
)
def test_get_object_name():
    assert find("utils.naming.get_object_name")(mean_error) == "mean_error"
    assert find("utils.naming.get_object_name")(keras.metrics.Mean(name="a")) == "a"


@private(
    "_convert_input_args",
    used="so that a layer that calls layers of others leaves its inputs as they are",
    look="keras/src/layers/layer.py, Layer.__call__",
)
def test_convert_input_args():
    class Seeing(keras.layers.Layer):
        def call(self, x):
            self.seen = x
            return ops.convert_to_tensor(x)

    array, layer = np.ones((1, 2), "float32"), Seeing()
    assert layer._convert_input_args
    layer._convert_input_args, layer._allow_non_tensor_positional_args = False, True
    layer(array)
    assert layer.seen is array


@private(
    "_allow_non_tensor_positional_args",
    used="so that LossArgs takes its arguments by position, with `None` and dicts among them",
    look="keras/src/layers/layer.py, Layer.__call__",
)
def test_allow_non_tensor_positional_args():
    class Taking(keras.layers.Layer):
        def call(self, x, other):
            return x

    layer = Taking()
    with pytest.raises(ValueError, match="positional"):
        layer(ops.ones((1, 2)), "text")
    layer._allow_non_tensor_positional_args = True
    assert tuple(layer(ops.ones((1, 2)), "text").shape) == (1, 2)


@private(
    "_clear_losses",
    used="to keep the losses that layers add, when a derivative calls them once more",
    look="keras/src/layers/layer.py",
)
def test_clear_losses():
    cleared = []

    class Seeing(keras.layers.Layer):
        def call(self, x):
            return x

        def _clear_losses(self):
            cleared.append(self)
            super()._clear_losses()

    layer = Seeing()
    keras.Sequential([layer])(ops.ones((1, 2)))
    assert cleared.count(layer) >= 1


@private(
    "_flatten_layers",
    used="to find all layers of a model, at any depth",
    look="keras/src/layers/layer.py",
)
def test_flatten_layers():
    inner = keras.Sequential([keras.layers.Dense(1)])
    model = keras.Sequential([inner])
    found = list(model._flatten_layers())
    assert {id(model), id(inner), id(inner.layers[0])} <= set(map(id, found))


@private(
    "_keras_history",
    "_inbound_nodes",
    used="to follow the graph of a Functional model",
    look="keras/src/ops/node.py and operation.py",
)
def test_graph():
    x, layer = keras.Input((2,)), keras.layers.Dense(1)
    y = layer(x)
    operation, index, _ = vars(y)["_keras_history"]
    assert operation is layer
    node = operation._inbound_nodes[index]
    assert node.operation is layer
    assert node.input_tensors[0] is x
    assert node.outputs[0] is y
    assert node.arguments.args == (x,)
    source, index, _ = vars(x)["_keras_history"]
    assert not source._inbound_nodes[index].input_tensors


@private(
    "_trainable_variables",
    "_non_trainable_variables",
    used="to tell a layer's own weights from those of its layers",
    look="keras/src/layers/layer.py",
)
def test_own_variables():
    layer = keras.layers.BatchNormalization()
    layer.build((None, 2))
    assert [v.name for v in layer._trainable_variables] == ["gamma", "beta"]
    assert [v.name for v in layer._non_trainable_variables] == ["moving_mean", "moving_variance"]
    model = keras.Sequential([layer])
    assert not model._trainable_variables


@private(
    "_autocast",
    used="to save a variable with all its options",
    look="keras/src/backend/common/variables.py",
)
def test_autocast_of_a_variable():
    assert keras.Variable(1.0, autocast=False)._autocast is False
    assert keras.Variable(1.0)._autocast is True


@private(
    "original_scope",
    used="to see variables in a scope as they are around it",
    look="keras/src/backend/common/stateless_scope.py",
)
def test_original_scope():
    variable = keras.Variable(1.0)
    with keras.StatelessScope() as outer:
        variable.assign(2.0)
        with keras.StatelessScope() as inner:
            assert inner.original_scope is outer
            assert inner.get_current_value(variable) is None
        assert float(outer.get_current_value(variable)) == 2


def test_failure_says_what_to_do():
    @private("a name", used="for this test", look="a file")
    def gone():
        raise AttributeError("no such name")

    known.discard("a name")
    with pytest.raises(AssertionError) as error:
        gone()
    for part in ("a name: gone", "no such name", "for this test", "Look in a file", "_keras.py"):
        assert part in str(error.value)


def used_names(source):
    """The names of Keras that a module uses and that have no public form."""
    tree = ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    formatted = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    asking = {"_frames", "_frame_of_model", "get_global_attribute"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("keras.src"):
            path = f"{node.module}.".removeprefix("keras.src.")
            yield from (f"{path}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("keras.src") for alias in node.names)
        elif isinstance(node, ast.Attribute) and node.attr not in {"_getframe", "__init__"}:
            if node.attr.startswith("_"):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            taken = {*own, "__init__", "__name__"}
            if node.value.startswith("keras.src."):
                yield node.value.removeprefix("keras.src.")
            if node.value.startswith("_") and node.value not in taken and id(node) not in formatted:
                yield node.value
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in asking:
            yield from (a.value for a in node.args if isinstance(a, ast.Constant))


def test_every_name_has_a_test():
    used = set(used_names((SOURCE / "_keras.py").read_text()))
    assert used - known == set(), "a name of Keras without a test in this file"
    assert len(used) > 25
    # The first has no sign of being private. The second is only overridden.
    assert known - used == {"original_scope", "_clear_losses"}


def test_new_names_are_found():
    found = set(
        used_names(
            "from keras.src.a import b\nx._private\ngetattr(x, '_text')\n_frames('method')\n"
            "x == 'keras.src.c'"
        )
    )
    assert found == {"a.b", "_private", "_text", "method", "c"}
