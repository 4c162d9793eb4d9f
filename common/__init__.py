"""What the scripts share."""

import contextlib
import importlib
import sys
from types import ModuleType


class _Later(ModuleType):
    def __getattr__(self, name):
        return getattr(importlib.import_module("torch"), name)


@contextlib.contextmanager
def torch_later():
    """Files that are imported in this block, and `import torch` at their heads, load it when they first use it.

    It takes seconds, for which --help and a wrong flag should not wait.  For files that use torch in functions alone.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = _Later("torch")
    try:
        yield
    finally:
        del sys.modules["torch"]
