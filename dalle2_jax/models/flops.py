"""The arithmetic of a function, counted in its program: products and convolutions, a multiply-add as two.

Everything else (norms, activations, the optimizer) is left out, as is customary for utilisation, and so are
recomputations: a training step counts as three forward passes, one forward and two for the gradients by
inputs and by weights. A convolution counts as a direct one, also where `nets.cpu` multiplies less,
and attention as its two products, also where it is one kernel.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from dalle2_jax.models import models
from dalle2_jax.models.frozen import Frozen
from dalle2_jax.models.nets import cpu, layers

TRAINING_PASSES = 3


def count(function: Callable, *arguments) -> int:
    """FLOPs of `function(*arguments)`; arguments are arrays or ShapeDtypeStructs, nothing is computed.

    A loop counts as often as it runs; of a choice the larger branch counts; `while_loop`s whose length is not
    known before they run count once.
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_step(stage, batch: dict, frozen: Frozen | None = None) -> int:
    """FLOPs of a training step of a stage on a batch of arrays or ShapeDtypeStructs, without the encoders of
    frozen stages.

    frozen: the frozen stages of one that uses some. Sharpness-aware minimisation takes the gradient twice.
    """
    params = jax.eval_shape(stage.init, jax.random.key(0), stage.batch_spec(1))
    used = {name: frozen.stages[name] for name in getattr(stage, "uses", ())} if frozen else {}
    shapes = {name: models.abstract_params(other) for name, other in used.items()}

    def loss(params, batch, shapes):
        keywords = frozen.loss_keywords(shapes) if used else {}
        train = getattr(stage, "other_loss_in_training", False)
        return stage.loss(params, jax.random.key(0), batch, train=train, **keywords).value

    forward = count(loss, params, batch, shapes)
    return TRAINING_PASSES * forward * (2 if getattr(stage, "sam_rho", 0) else 1)


def _of(jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        spread = math.prod(parameters["lhs_dilation"])  # of a transposed one: products with zeros
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // outputs // spread
    if parameters.get("name") == _name(cpu.winograd_3x3):
        kernel = equation.invars[1].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel[:-1])
    if parameters.get("name") == _name(layers.cudnn_attention):
        return 4 * math.prod(equation.outvars[0].aval.shape) * equation.invars[1].aval.shape[1]
    if parameters.get("name") == _name(cpu.groups_to_channels):
        return 0
    if name == "cond":
        return max(_of(branch.jaxpr) for branch in parameters["branches"])
    inner = sum(_of(jaxpr) for value in parameters.values() for jaxpr in _programs(value))
    return inner * parameters["length"] if name == "scan" else inner


def _name(jitted: Any) -> str:
    """The name of a jitted function in a program."""
    return jitted.__name__


def _programs(value):
    """The programs inside a parameter of an equation."""
    for item in value if isinstance(value, list | tuple) else (value,):
        if hasattr(item, "eqns"):
            yield item
        elif hasattr(item, "jaxpr"):
            yield item.jaxpr
