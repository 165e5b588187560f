"""A pytest plugin: Keras's own tests of its losses, on the functions through `with_args`.

Every class of `keras.src.losses.losses` is replaced by a function that takes the same arguments.
Tests that look at the config of a Keras class are left out.
"""

import inspect

import pytest
from keras.src.losses import losses as module

from lossargs import with_args

OPTIONS = ("name", "reduction", "dtype")


def replaced(cls, function):
    def make(*args, **kwargs):
        arguments = inspect.signature(cls).bind(*args, **kwargs)
        arguments.apply_defaults()
        options = {k: v for k, v in arguments.arguments.items() if k in OPTIONS}
        extra = {k: v for k, v in arguments.arguments.items() if k not in OPTIONS}
        return with_args(function).options(**options)(**extra)

    return make


def pytest_configure():
    functions = {
        name.replace("_", ""): value
        for name, value in vars(module).items()
        if inspect.isfunction(value)
    }
    for name, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ == module.__name__ and cls is not module.LossFunctionWrapper:
            setattr(module, name, replaced(cls, functions[name.lower()]))


def pytest_collection_modifyitems(items):
    for item in items:
        if "config" in item.name:
            item.add_marker(pytest.mark.skip(reason="looks at Keras's own config format"))
