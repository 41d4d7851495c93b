"""Triton kernels, one file per family: functions with the name and signature of the op in csrc/library.cpp.

Importing registers them as torch.ops.p3b_ext_triton.*; they run on a GPU or, with TRITON_INTERPRET=1 set before triton
is imported, on the CPU under Triton's interpreter.
"""

from . import attention, merge, select

__all__ = ["attention", "merge", "select"]
