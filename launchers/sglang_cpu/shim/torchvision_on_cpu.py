"""Lets the torchvision wheel of PyPI be imported beside a torch without CUDA.

SGLang and transformers import torchvision whatever the model is. Its compiled library needs CUDA
and does not load, so the two operators that the library defines are missing when torchvision
registers shapes for them: "operator torchvision::nms does not exist". This module, imported at the
start of every interpreter of the environment, declares them when torchvision is about to be
imported. Calling one still fails.
"""

import importlib.abc
import sys

_SCHEMA = "{}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds no module, but is asked before the first import of torchvision."""

    def __init__(self):
        self._library = None

    def find_spec(self, name, path=None, target=None):
        """Declare the operators before torchvision is imported; leave the finding to others."""
        if name == "torchvision" and self._library is None:
            import torch

            if torch.version.cuda is None:
                # The declarations last as long as this object does.
                self._library = torch.library.Library("torchvision", "FRAGMENT")
                for operator in ("nms", "qnms"):
                    self._library.define(_SCHEMA.format(operator))
        return None


sys.meta_path.insert(0, DeclareOperators())
