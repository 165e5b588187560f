"""The step that a model runs, and the state of variables in it."""

import dataclasses
import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import keras
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope
from keras.src.models.functional import Functional
from keras.src.utils.naming import get_object_name

from lossargs._keras.scopes import is_compiled_by_torch

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
    keeps_state: bool  # whether variables keep the values that the loss assigns

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
    if is_compiled_by_torch() and not in_symbolic_scope():
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
    """Return the `training` argument of the innermost call around a layer that sets it.

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


def give_variables_back() -> None:
    """Restore the variables that Keras removes from a JAX model while it runs an epoch.

    Keras restores them at the end of the epoch. An exception in the first step would lose them.
    """
    if keras.backend.backend() != "jax":
        return
    for frame, model in _method_calls(keras.Model, "fit", "evaluate"):
        method = frame.f_code.co_name
        if frame.f_code is _code_of(f"Model.{method}"):  # and not an override
            removed = [model.trainable_variables, model.non_trainable_variables]
            removed += [model.optimizer.variables] if method == "fit" else []
            variables = itertools.chain(*removed, model.metrics_variables)
            values = itertools.chain(*frame.f_locals.get("state", ()))
            for variable, value in zip(variables, values, strict=False):
                if variable._value is None:
                    variable._value = value
            model._jax_state_synced = True  # Keras would assign older values
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
