"""All private names of Keras that lossargs uses: the one file to fix when Keras moves them."""

import dataclasses
import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras
from keras.src.backend import compute_output_spec
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Attributes of tensors, also of JAX tracers, which have no attributes of their own.
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr
from keras.src.backend.common.variables import AutocastScope

# `compile` does this to a plain function: rank squeezing, masks, weights and reductions.
from keras.src.losses.loss import (
    scale_loss_for_distribution,
    squeeze_or_expand_to_same_rank,
    unscale_loss_for_distribution,
)
from keras.src.models.functional import Functional
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
    """A scope that notes which variables are read or assigned, and changes nothing else."""

    def __init__(self, *, copies: bool = False) -> None:
        super().__init__()
        self.variables: dict[int, keras.Variable] = {}  # by `id`
        self._backend = keras.backend.backend()
        self._copies = copies  # values that are read stay as they are

    def get_current_value(self, variable: keras.Variable) -> Any:
        """Return the value of the surrounding scope; called by a variable that is read."""
        self.variables[id(variable)] = variable
        around = self.original_scope
        value = around.get_current_value(variable) if around else None
        if value is None and variable._value is not None:
            if self._backend == "tensorflow" and variable.trainable:
                read: Any = keras.ops.custom_gradient(_read_before_update)
                value = read(keras.ops.convert_to_tensor(variable._value))
            elif self._copies and self._backend != "jax":
                value = keras.ops.copy(variable._value)  # PyTorch assigns in place
        return value

    def add_update(self, update: tuple[keras.Variable, Any]) -> None:
        """Pass an update on; called by a variable that is assigned."""
        variable, value = update
        self.variables[id(variable)] = variable
        copies, self._copies = self._copies, False  # PyTorch assigns to the value that it reads
        if self.original_scope:
            self.original_scope.add_update(update)
        else:
            variable._direct_assign(value)
        self._copies = copies


def alias(tensor: Any) -> Any:
    """Return another tensor object of the same values, with the same mask."""
    is_torch = keras.backend.backend() == "torch"
    other = tensor.view_as(tensor) if is_torch else keras.ops.copy(tensor)
    mask = get_keras_mask(tensor)
    if mask is not None:
        set_keras_mask(other, mask)
    return other


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
    """Let a layer be called with positional arguments that are not tensors, e.g. lists."""
    layer._allow_non_tensor_positional_args = True


def is_autocast(variable: keras.Variable) -> bool:
    """Return whether a variable is read in the precision of the layer that reads it."""
    return bool(variable._autocast)


def in_sharing_scope() -> bool:
    """Return whether Keras writes a config in which a shared object stays one object."""
    return get_global_attribute("shared_objects/id_to_config_map") is not None


def in_legacy_saving() -> bool:
    """Return whether a model is saved in the legacy HDF5 format."""
    return bool(get_global_attribute("use_legacy_config"))


def flat_layers(model: keras.Layer) -> list[keras.Layer]:
    """Return a model and all its layers, at any depth."""
    return list(model._flatten_layers())


# Keras does not tell a loss or a layer which model calls it. The call stack does.


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
    """A step that a model runs, or the symbolic build before the first one."""

    method: str  # of the model, e.g. "train_step"
    reference: Callable[[], Any] | None  # weak, to the model; `None` under `torch.compile`
    keeps_state: bool  # of variables that are assigned in the loss

    @property
    def model(self) -> Any:
        """The model, or `None`."""
        return self.reference and self.reference()

    @property
    def training(self) -> bool:
        """Whether the step trains the model."""
        return self.method == "train_step"


def running_step() -> Step | None:
    """Return the step that a model runs, or `None` in a user's own loop."""
    if is_compiled_by_torch():
        # A look at the stack would break the graph. Keras evaluates without gradients.
        method = "train_step" if sys.modules["torch"].is_grad_enabled() else "test_step"
        return Step(method, None, keeps_state=True)
    keeps_state = keras.backend.backend() != "jax"
    steps = ("train_step", "test_step", "predict_step", "compute_metrics", "_symbolic_build")
    for frame, model in _method_calls(keras.Model, "compute_loss_and_updates", *steps):
        if frame.f_code.co_name in steps:
            return Step(frame.f_code.co_name, weakref.ref(model), keeps_state)
        # On JAX only Keras's own step evaluates the loss with the state of the model.
        keeps_state |= frame.f_code is _code_of("Model.compute_loss_and_updates")
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


def give_variables_back() -> None:
    """Return the variables that Keras takes from a model on JAX while it runs an epoch.

    Keras returns them at the end of the epoch. An exception in the first step would lose them.
    """
    if keras.backend.backend() != "jax":
        return
    for frame, model in _method_calls(keras.Model, "fit", "evaluate"):
        method = frame.f_code.co_name
        if frame.f_code is _code_of(f"Model.{method}"):  # and not an override
            taken = [model.trainable_variables, model.non_trainable_variables]
            taken += [model.optimizer.variables] if method == "fit" else []
            variables = itertools.chain(*taken, model.metrics_variables)
            values = itertools.chain(*frame.f_locals.get("state", ()))
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
    """Return the number of processes of `torch.distributed` that train together."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1
    return int(distributed.get_world_size())


def metric_names(model: keras.Model) -> set[str]:
    """Return the names in the logs of the losses and of the metrics given to `compile`."""
    compiled = getattr(model, "_compile_metrics", None)
    kinds = ("_user_metrics", "_user_weighted_metrics")
    metrics = keras.tree.flatten([getattr(compiled, kind, None) for kind in kinds])
    losses = [f"{name}_loss" for name, _ in named_outputs(model)]
    names = [m if isinstance(m, str) else get_object_name(m) for m in metrics if m is not None]
    return {"loss", *losses, *names}


def named_outputs(model: Any) -> list[tuple[str, Any]]:
    """Return the symbolic outputs of a model with their names in the logs, if there are several."""
    outputs = model.output if isinstance(model, Functional) else []
    if isinstance(outputs, dict):
        pairs = list(outputs.items())
    else:
        flat = keras.tree.flatten(outputs)
        pairs = list(zip(model.output_names, flat, strict=True)) if flat else []
    return pairs if len(pairs) > 1 else []


def weighted_metrics_of(model: Any) -> Any:
    """Return the `weighted_metrics` that a model was compiled with, or `None`."""
    return getattr(getattr(model, "_compile_metrics", None), "_user_weighted_metrics", None)


# The graph of a Functional model.


def keeps_constructor(model: Any, base: type) -> bool:
    """Return whether a model of this class is constructed as one of the base class is."""
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
    """Return the layer or operation that made a symbolic tensor, and its input tensors."""
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
    """Return the weights of a layer, without those of its sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]
