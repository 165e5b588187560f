"""All that lossargs needs from Keras and that has no public form.

If a Keras release moves one of these names, this is the file to mend, and the only one.
"""

import sys
from types import FrameType
from typing import Any

# What Keras makes of a plain function given to `compile(loss=...)`: rank squeezing, masks, weights
# and reductions. Evaluating through it is what makes a bound loss equal to such a function.
from keras.src.losses.losses import LossFunctionWrapper as FunctionLoss

# How Keras names a function in the logs.
from keras.src.utils.naming import get_object_name

__all__ = ["FunctionLoss", "get_object_name", "weighted_metrics_in_use"]


def weighted_metrics_in_use() -> Any:
    """The `weighted_metrics` of the model that is computing its loss, or `None`.

    A loss never sees its model, but the model stands on the call stack.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "_compute_loss":
        frame = frame.f_back
    if frame is None:
        return None
    metrics = getattr(frame.f_locals["self"], "_compile_metrics", None)
    return getattr(metrics, "_user_weighted_metrics", None)
