"""Makes vLLM's wheel for CUDA build configs and models on a machine without a GPU; imported before the rest of vLLM.

No forward can be run: the wheel's kernels are for CUDA, and layers that look theirs up when they are made find None.
"""

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

import vllm.model_executor.layers.activation  # noqa: E402
import vllm.model_executor.layers.rotary_embedding  # noqa: E402, F401


class _NoKernels(type(torch.ops._C)):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)


torch.ops._C.__class__ = _NoKernels
