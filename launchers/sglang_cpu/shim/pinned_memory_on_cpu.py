"""Makes page-locked memory ordinary memory where there is no accelerator that could use it.

SGLang's code for low-rank adapters asks for it on every device: "pin_memory=True requires a CUDA
or other accelerator backend". This module, imported at the start of every interpreter of the
environment, waits for that code: a server without adapters is left as it is.
"""

import functools
import importlib.abc
import sys

_NEEDS_IT = "sglang.srt.lora.backend.torch_backend"
_FACTORIES = ("arange", "empty", "full", "ones", "tensor", "zeros")


def _unpinned(factory):
    @functools.wraps(factory)
    def make(*args, pin_memory=False, **kwargs):
        return factory(*args, **kwargs)

    return make


class UnpinMemory(importlib.abc.MetaPathFinder):
    """Finds no module, but is asked before the first import of the one that pins memory."""

    def find_spec(self, name, path=None, target=None):
        """Change torch before that module is imported; leave the finding to others."""
        if name == _NEEDS_IT:
            import torch

            if not torch.accelerator.is_available():
                for factory in _FACTORIES:
                    setattr(torch, factory, _unpinned(getattr(torch, factory)))
                torch.Tensor.pin_memory = lambda tensor, device=None: tensor
            sys.meta_path.remove(self)
        return None


sys.meta_path.insert(0, UnpinMemory())
