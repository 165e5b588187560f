"""On Keras's NumPy backend there are no derivatives, and `grad` says so."""

import keras
import pytest

from helpers import BACKEND, message_of
from lossargs import DerivativeError, grad


@pytest.mark.skipif(BACKEND != "numpy", reason="other backends differentiate")
def test_error_of_the_numpy_backend():
    x = keras.Input((1,))
    with pytest.raises(DerivativeError) as caught:
        grad(x**2, x)
    assert message_of(caught.value) == (
        "Keras's backend 'numpy' cannot differentiate. Choose another one before importing Keras: "
        'import os; os.environ["KERAS_BACKEND"] = "jax".'
    )
