"""The private names of Keras that lossargs uses: the one place to fix when Keras moves them."""

from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.backend.common.symbolic_scope import in_symbolic_scope

# Attributes of tensors, also of JAX tracers, which have no attributes of their own.
from keras.src.backend.common.tensor_attributes import get_tensor_attr, set_tensor_attr
from keras.src.backend.common.variables import AutocastScope

# `compile` applies these to the loss of a plain function.
from keras.src.losses.loss import (
    scale_loss_for_distribution,
    squeeze_or_expand_to_same_rank,
    unscale_loss_for_distribution,
)
from keras.src.models.functional import Functional
from keras.src.utils.naming import get_object_name

from lossargs._keras.graphs import (
    after_earlier_calls,
    ancestor_calls,
    ancestors,
    copy_own_state,
    forget_calls,
    has_producer,
    keeps_constructor,
    new_like,
    output_specs,
    own_variables,
    producer,
)
from lossargs._keras.scopes import (
    LayerOfOthers,
    ReadScope,
    Sandbox,
    alias,
    allow_any_arguments,
    define_copy_for_torch,
    flat_layers,
    in_legacy_saving,
    in_sharing_scope,
    is_autocast,
    is_compiled_by_torch,
    is_random_state,
    uncompiled,
    values_in_scope,
    variables_can_be_assigned,
)
from lossargs._keras.steps import (
    Step,
    called_for_training,
    follow_in_epochs,
    give_variables_back,
    metric_names,
    named_outputs,
    running_step,
    torch_processes,
    weighted_metrics_of,
)
