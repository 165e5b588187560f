"""All that lossargs needs from Keras and that has no public form.

If a Keras release moves one of these names, this is the file to mend, and the only one.
"""

import dataclasses
import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras

# What a layer gives for symbolic tensors, found out by calling it.
from keras.src.backend import compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute

# A mask travels on the tensor that it is for.
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope

# Before the first step Keras builds the loss with stand-ins, which did not come from the model.
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Attributes of tensors, also of the tracers of JAX, which take none.
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr

# The scope in which variables are read in the precision of a layer, or, with `None`, in their own.
from keras.src.backend.common.variables import AutocastScope

# What Keras makes of a plain function given to `compile(loss=...)`: rank squeezing, masks, weights
# and reductions. The replicas of `tf.distribute` get losses scaled by their number, logs are not.
from keras.src.losses.loss import (
    reduce_weighted_values,
    squeeze_or_expand_to_same_rank,
    unscale_loss_for_distribution,
)

# What `keras.Model(inputs, outputs)` makes.
from keras.src.models.functional import Functional

# How Keras names a function in the logs.
from keras.src.utils.naming import get_object_name


def variables_can_be_assigned() -> bool:
    """Return whether a variable assigned here keeps its value, and no tracer."""
    return keras.backend.backend() != "jax" or bool(in_stateless_scope())


def _read_before_update(value: Any) -> Any:
    """Return the value of a variable, such that its gradient depends on it.

    TensorFlow's graph optimizer lets the update of a variable overtake a read whose value the
    gradient does not need. A dependency of the gradient on the value keeps the order.
    """

    def gradient(*upstream: Any) -> Any:
        (slope,) = upstream
        is_finite: Any = keras.ops.cast(keras.ops.isfinite(value), slope.dtype)
        return slope + 0 * is_finite

    return value, gradient


class ReadScope(keras.StatelessScope):
    """A scope that notes which variables are read or assigned, and changes little else.

    Args:
        values: Pairs of variables and values that they have in this scope.
        copies: Whether values that are read stay as they are when the optimizer assigns their
            variables. State stays in any case, which the loss assigns.
        dropped: The `id`s of variables that are as before after the scope.
    """

    def __init__(
        self,
        values: Iterable[tuple[keras.Variable, Any]] = (),
        *,
        copies: bool = False,
        dropped: Collection[int] = (),
    ) -> None:
        super().__init__(list(values))
        self.variables: dict[int, keras.Variable] = {}  # by `id`
        self.assigned: dict[int, keras.Variable] = {}
        self._backend = keras.backend.backend()
        self._copies = copies
        self._assigning = False
        self._dropped = dropped

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of the surrounding scope; called by a variable that is read."""
        self.variables[id(variable)] = variable
        value, around = super().get_current_value(variable), self.original_scope
        if value is None and around:
            value = around.get_current_value(variable)
        if value is None and variable._value is not None:
            if self._backend == "tensorflow" and variable.trainable:
                read: Any = keras.ops.custom_gradient(_read_before_update)
                value = read(keras.ops.convert_to_tensor(variable._value))
            elif self._copies_of(variable):
                value = keras.ops.copy(variable._value)
        return value

    def _copies_of(self, variable: keras.Variable) -> bool:
        # PyTorch assigns in place, also to what was saved for the backward pass.
        is_state = self._backend == "torch" and not variable.trainable
        return not self._assigning and (is_state or (self._copies and self._backend != "jax"))

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Pass an update on; called by a variable that is assigned."""
        variable, value = update
        self.variables[id(variable)] = self.assigned[id(variable)] = variable
        if id(variable) in self._dropped:
            super().add_update(update)
            return
        self._assigning = True  # PyTorch assigns to the value that it reads
        if self.original_scope:
            self.original_scope.add_update(update)
        else:
            variable._direct_assign(value)
        self._assigning = False


def alias(tensor: Any) -> Any:
    """Return another tensor object of the same values, with the same mask."""
    is_torch = keras.backend.backend() == "torch"
    other = tensor.view_as(tensor) if is_torch else keras.ops.copy(tensor)
    mask = get_keras_mask(tensor)
    if mask is not None:
        set_keras_mask(other, mask)
    return other


def values_in_scope(variables: Iterable[keras.Variable]) -> list[tuple[keras.Variable, Any]]:
    """Return the variables that have other values in this scope than of their own, with these."""
    scope = get_stateless_scope()
    pairs = [(variable, scope and scope.get_current_value(variable)) for variable in variables]
    return [(variable, value) for variable, value in pairs if value is not None]


class Sandbox(keras.StatelessScope):
    """A scope whose updates are dropped, and that reads variables as the scope around it."""

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of a variable that is read."""
        value = super().get_current_value(variable)
        around = self.original_scope
        return around.get_current_value(variable) if value is None and around else value


class LayerOfOthers(keras.Layer):
    """A layer that calls other layers of its model again."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._convert_input_args = False  # each layer that it calls does that

    def _clear_losses(self) -> None:
        """Keep the losses, which Keras drops before a call: they belong to other calls."""


def allow_any_arguments(layer: keras.Layer) -> None:
    """Let a layer be called with what is no tensor, a list of them say, without Keras's refusal."""
    layer._allow_non_tensor_positional_args = True


def is_autocast(variable: keras.Variable) -> bool:
    """Whether a variable is read in the precision of the layer that reads it."""
    return bool(variable._autocast)


def in_sharing_scope() -> bool:
    """Whether objects are written to a config by which one object, met twice, loads as one."""
    return get_global_attribute("shared_objects/id_to_config_map") is not None


def in_legacy_saving() -> bool:
    """Return whether a model is saved in the legacy HDF5 format."""
    return bool(get_global_attribute("use_legacy_config"))


def flat_layers(model: keras.Layer) -> list[keras.Layer]:
    """The model itself and all its layers, at any depth."""
    return list(model._flatten_layers())


# A loss and a layer never see the model they are in, but the model stands on the call stack.


def _method_calls(cls: type, *names: str) -> Iterator[tuple[FrameType, Any]]:
    """Yield the running calls of methods of these names, innermost first, with their objects.

    The qualified name tells a method of the class, or an override, from a function of a user that
    has the same name.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name in names and code.co_argcount:
            owner = frame.f_locals.get(code.co_varnames[0])
            if isinstance(owner, cls):
                for base in type(owner).__mro__:
                    method = vars(base).get(code.co_name)
                    is_method = method is not None and not isinstance(method, staticmethod)
                    is_here = frame.f_globals.get("__name__") == base.__module__
                    name = f"{base.__qualname__}.{code.co_name}"
                    if is_method and is_here and code.co_qualname == name:
                        yield frame, owner
                        break
        frame = frame.f_back


@functools.cache
def _code_of(method: str) -> CodeType | None:
    """Return the code of a method of Keras, `Model.fit` say, below the decorators."""
    cls, _, name = method.partition(".")
    found: Any = getattr(getattr(keras, cls), name, None)
    return getattr(inspect.unwrap(found), "__code__", None)


@dataclasses.dataclass(frozen=True)
class Step:
    """The step of `fit`, `evaluate`, `predict` or `train_on_batch` that is running."""

    reference: (
        Callable[[], Any] | None
    )  # weak, to the model; `None` where PyTorch compiles the step
    training: bool
    has_loss: bool
    keeps_state: bool  # of variables that are assigned in the loss

    @property
    def model(self) -> Any:
        """The model, or `None`."""
        return self.reference and self.reference()


def running_step() -> Step | None:
    """Return the step that a model runs, or `None` in a user's own loop."""
    if is_compiled_by_torch():
        # A look at the stack would break the graph. Keras evaluates without gradients.
        return Step(None, sys.modules["torch"].is_grad_enabled(), has_loss=True, keeps_state=True)
    keeps_state = keras.backend.backend() != "jax"
    names = ("train_step", "test_step", "predict_step", "compute_loss_and_updates")
    for frame, model in _method_calls(keras.Model, *names):
        name = frame.f_code.co_name
        if name != "compute_loss_and_updates":
            return Step(
                weakref.ref(model), name == "train_step", name != "predict_step", keeps_state
            )
        # On JAX only Keras's own step evaluates the loss with the state of the model.
        if frame.f_code is _code_of("Model.compute_loss_and_updates"):
            keeps_state = True
    return None


def model_being_built() -> Any:
    """Return the model that Keras builds symbolically before its first step, or `None`."""
    for _, model in _method_calls(keras.Model, "_symbolic_build"):
        return model
    return None


def called_for_training(layer: keras.Layer) -> bool:
    """Return the `training` argument of the innermost call around a layer that was given one.

    Keras itself passes the argument on from layers that were called before.
    """
    for frame, owner in _method_calls(keras.Layer, "__call__", "stateless_call"):
        if owner is layer:
            continue
        if frame.f_code is _code_of("Layer.__call__"):
            given = getattr(frame.f_locals.get("call_spec"), "user_arguments_dict", {})
        elif frame.f_code is _code_of("Layer.stateless_call"):
            given = frame.f_locals["kwargs"]
        else:
            continue
        if given.get("training") is not None:
            return bool(given["training"])
    return False


def is_compiled_by_torch() -> bool:
    """Return whether `torch.compile` traces this code."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that `torch.compile` calls as it is."""
    return sys.modules["torch"].compiler.disable(function)  # type: ignore[no-any-return]


def give_variables_back() -> None:
    """Return the variables that Keras takes from a model on JAX while it runs an epoch.

    Keras returns them at the end of the epoch. An exception in the first step would lose them.
    """
    if keras.backend.backend() != "jax":
        return
    for frame, model in _method_calls(keras.Model, "fit", "evaluate"):
        if frame.f_code is not _code_of(f"Model.{frame.f_code.co_name}"):
            continue  # an override, which calls that of Keras
        trained = [model.optimizer.variables] if frame.f_code.co_name == "fit" else []
        taken = [
            model.trainable_variables,
            model.non_trainable_variables,
            *trained,
            model.metrics_variables,
        ]
        for variables, values in zip(taken, frame.f_locals.get("state", ()), strict=False):
            for variable, value in zip(variables, values, strict=False):
                if variable._value is None:
                    variable._value = value
        model._jax_state_synced = True  # Keras has older values
        return


class _InEpochs:
    """Makes a variable readable and assignable in the callbacks of an epoch on JAX.

    While `fit` runs an epoch, the values are in `fit`, and Keras overwrites those of the variables
    at the end. `jax_state_sync` moves them to the variables.
    """

    _value: Any
    _models: weakref.WeakSet[Any]

    def _sync(self) -> None:
        models, self._models = self._models, weakref.WeakSet()  # it assigns this variable as well
        try:
            for model in list(models):
                if self._value is None:
                    model.jax_state_sync()
        finally:
            self._models = models

    @property
    def value(self) -> Any:
        """The current value."""
        if self._value is None and not in_stateless_scope():
            self._sync()
        return super().value  # type: ignore[misc]

    def _direct_assign(self, value: Any) -> None:
        self._sync()
        super()._direct_assign(value)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy it as a plain variable, which is in no model."""
        state = {name: value for name, value in vars(self).items() if name != "_models"}
        return object.__new__, (type(self).__bases__[1],), state


@functools.cache
def _class_in_epochs(cls: Any) -> Any:
    return type(cls.__name__, (_InEpochs, cls), {})


def follow_in_epochs(variable: keras.Variable, model: keras.Model) -> None:
    """Let a variable of a model be read and assigned at any time, also while JAX runs an epoch."""
    if keras.backend.backend() != "jax":
        return
    if not isinstance(variable, _InEpochs):
        cls: Any = type(variable)
        variable._models = weakref.WeakSet()
        variable.__class__ = _class_in_epochs(cls)
    variable._models.add(model)


def torch_processes() -> int:
    """How many processes of `torch.distributed` train together; Keras's `fit` knows of none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())


def metric_names(model: keras.Model) -> set[str]:
    """The names in the logs of the losses and of the metrics given to `compile`."""
    compiled = getattr(model, "_compile_metrics", None)
    given = [
        getattr(compiled, "_user_metrics", None),
        getattr(compiled, "_user_weighted_metrics", None),
    ]
    metrics = [metric for metric in keras.tree.flatten(given) if metric is not None]
    outputs = getattr(model, "output_names", None) or []
    losses = [f"{name}_loss" for name in outputs] if len(outputs) > 1 else []
    return {"loss", *losses, *(m if isinstance(m, str) else get_object_name(m) for m in metrics)}


def in_metrics() -> bool:
    """Return whether the caller is evaluated as a metric."""
    for frame, _ in _method_calls(keras.Model, "compute_metrics", "compute_loss"):
        return frame.f_code.co_name == "compute_metrics"
    return False


def weighted_metrics_in_use() -> Any:
    """Return the `weighted_metrics` of the model that is computing its loss, or `None`."""
    for _, model in _method_calls(keras.Model, "_compute_loss"):
        return getattr(getattr(model, "_compile_metrics", None), "_user_weighted_metrics", None)
    return None


# The graph of a Functional model.


def keeps_constructor(model: Any, base: type) -> bool:
    """Whether a model of this class can be made as one of the base class is."""
    own = inspect.getfullargspec(type(model).__init__)
    known = inspect.getfullargspec(vars(base)["__init__"])
    return own.args == known.args or bool(own.varargs and own.varkw)


@functools.cache
def _names_that_keras_sets(cls: Any) -> frozenset[str]:
    """Return the attributes of a compiled model of a class of Keras."""
    # With names and an initializer, so that those of the user's layers stay the same.
    x, dense = (
        keras.Input((1,), name="x"),
        keras.layers.Dense(1, name="y", kernel_initializer="zeros"),
    )
    inside: Any = [[x, dense]] if cls is keras.Sequential else [x, dense(x)]
    model = cls(*inside, name="model")
    model.compile("sgd", "mse")
    runs = ("history", "stop_evaluating", "stop_predicting", "_jax_state", "_eval_epoch_iterator")
    names = ("output_names", "_torch_params", "torch_params")  # set later, or kept
    return frozenset([*vars(model), *getattr(model, "_modules", ()), *runs, *names])


def new_like(model: Any, base: type, *args: Any) -> Any:
    """Return a model of the class of another one, made as one of `base` is made of `args`."""
    cls: Any = type(model)
    new: Any = cls.__new__(cls)
    vars(base)["__init__"](new, *args, name=model.name)
    return new


def copy_own_state(model: Any, new: Any, base: type) -> None:
    """Give a model the attributes and weights that another one has besides those of Keras."""
    for variable in own_variables(model):  # also those without an attribute
        new._track_variable(variable)
    given = {**vars(model), **getattr(model, "_modules", {})}
    for name in [name for name in given if name not in _names_that_keras_sets(base)]:
        setattr(new, name, given[name])
    for name in ("autocast", "dtype_policy", "supports_jit"):
        setattr(new, name, getattr(model, name))


def producer(tensor: keras.KerasTensor) -> tuple[Any, list[keras.KerasTensor]]:
    """The layer or operation that a symbolic tensor comes from, and what that was called with."""
    operation, node, _ = vars(tensor)["_keras_history"]
    return operation, operation._inbound_nodes[node].input_tensors


def ancestor_calls(tensors: Iterable[keras.KerasTensor], until: Iterable[Any] = ()) -> list[Any]:
    """Return the nodes of Keras's graph that tensors come from, in the order to call them again.

    The search stops at the tensors `until`.
    """
    known = {id(tensor) for tensor in until}
    calls = []
    pending = [(tensor, False) for tensor in tensors]
    while pending:
        tensor, after_its_inputs = pending.pop()
        operation, index, _ = vars(tensor)["_keras_history"]
        call = operation._inbound_nodes[index]
        if after_its_inputs:
            calls.append(call)
        elif id(tensor) not in known and id(call) not in known:
            known.add(id(call))
            pending += [(tensor, True), *((given, False) for given in call.input_tensors)]
    return calls


def ancestors(
    tensors: list[keras.KerasTensor],
) -> tuple[dict[int, keras.KerasTensor], list[keras.Layer]]:
    """Return the inputs, by `id`, and the layers that symbolic tensors are computed from."""
    calls = ancestor_calls(tensors)
    inputs = {id(call.outputs[0]): call.outputs[0] for call in calls if not call.input_tensors}
    operations = {id(call.operation): call.operation for call in calls}
    return inputs, [one for one in operations.values() if isinstance(one, keras.Layer)]


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The weights that a layer keeps itself, without those of its layers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def after_earlier_calls(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a Functional model, some layers of which may have been loaded before.

    The config counts the calls of a layer from the first one in this graph. A layer that another
    graph shares has calls already.
    """
    loaded = get_global_attribute("shared_objects/id_to_obj_map") or {}
    earlier = {
        layer["name"]: len(loaded[layer["shared_object_id"]]._inbound_nodes)
        for layer in config["layers"]
        if layer.get("shared_object_id") in loaded and layer["inbound_nodes"]
    }

    def moved(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: moved(one) for key, one in part.items()}
        if not isinstance(part, list):
            return part
        if len(part) == 3 and isinstance(part[0], str) and part[0] in earlier:
            name, call, place = part
            return [name, call + earlier[name], place]
        return [moved(one) for one in part]

    layers = [{**one, "inbound_nodes": moved(one["inbound_nodes"])} for one in config["layers"]]
    ends = {name: moved(config[name]) for name in ("input_layers", "output_layers")}
    return {**config, "layers": layers, **ends}


def forget_calls(layers: Iterable[keras.Layer], of: type) -> None:
    """Let layers forget which layers of a class were given their outputs.

    Keras notes that, and never reads it.
    """
    for layer in layers:
        kept = [node for node in layer._outbound_nodes if not isinstance(node.operation, of)]
        layer._outbound_nodes[:] = kept
