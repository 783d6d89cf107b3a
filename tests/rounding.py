"""Another CPU: products round otherwise for other shapes of their input, as the libraries of some machines do.

pytest -p tests.rounding tests/tasks tests/training ...

A test that fails so demands bits that are promised on no machine but its author's. Equal inputs of equal shapes give
equal bits here too, so what is promised (resume, a frozen base, a reload) holds.
"""

from functools import wraps

import torch
from torch.nn import functional


def _rounding(function):
    @wraps(function)
    def other(first, *args, **options):
        out = function(first, *args, **options)
        if not out.is_floating_point() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return out
        # Up to 3 units in the last place of float32.
        return out * (1 + (sum(first.shape[:-1]) % 7 - 3) * 2**-23)

    return other


for _name in ("linear", "conv2d", "scaled_dot_product_attention"):
    setattr(functional, _name, _rounding(getattr(functional, _name)))
