"""Matrix products without gradients on CPUs.

PyTorch's float32 products on CPUs come from a library that packs the weights anew at every call, and on some processors
leaves half of their vector units idle. oneDNN, which PyTorch brings along, can keep weights in the layout that its
kernels read: on an AMD EPYC with AVX-512 that is 2 times as fast for many rows and 4 times for one to sixteen. What
Inductor's freezing does when it compiles is done here eagerly. On an Intel Xeon with AMX packed products of one row are
slower than plain ones, so for few rows a short measurement decides, once in a process.
"""

import platform
import time
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EVERY = slice(None)
AVAILABLE = (  # with the operators that Inductor uses; tried on x86 alone
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
# The kernels for bfloat16 need instructions (AVX-512) that not every processor has.
DTYPES = (torch.float32, *([torch.bfloat16] if AVAILABLE and torch.ops.mkldnn._is_mkldnn_bf16_supported() else []))
ROWS = 256  # that the layout is chosen for; it serves one row as well as thousands
LARGE = 2**18  # weights; smaller matrices stay in the CPU's caches, and a call of oneDNN costs more than a few rows
WORTH = 2**20  # multiplications from which small matrices gain
FEW_ROWS = (1, 4, 16)  # for up to so many rows of large matrices it is measured whether packing gains
SLOWER = 1.1  # packed products have to be this much slower to be left, so that noise decides nothing


def pack_weights(module: nn.Module, packed: bool) -> None:
    """Let all products of a module use packed weights where they gain, or never."""
    for part in module.modules():
        if isinstance(part, Linear):
            part.packed = packed and AVAILABLE


class _Packed(NamedTuple):
    """A weight in oneDNN's layout, and the weight that it was made of, kept so that no other can take its place."""

    weight: Tensor
    source: Tensor
    version: int


def _gains(rows: int, weight: Tensor) -> bool:
    """Whether the packed product of so many rows is the faster one."""
    if weight.numel() < LARGE:
        return rows * weight.numel() >= WORTH
    few = next((most for most in FEW_ROWS if rows <= most), None)
    return few is None or few in few_rows_that_gain(weight.dtype, torch.get_num_threads())


@cache
def few_rows_that_gain(dtype: torch.dtype, threads: int) -> tuple[int, ...]:
    """Of `FEW_ROWS` those where packed products are not slower here, by the best of several in turn: some 0.1 s."""
    with torch.no_grad(), torch.device("cpu"):  # no random numbers: they would be missing where they are asked for
        weights = [torch.full((2048, 1024), 0.01, dtype=dtype) for _ in range(3)]  # more than a core's cache holds
        packs = [torch.ops.mkldnn._reorder_linear_weight(weight, ROWS) for weight in weights]
        gaining = []
        for rows in FEW_ROWS:
            x, plain, packed = torch.ones(rows, 1024, dtype=dtype), [], []
            for _ in range(3):
                start = time.perf_counter()
                for weight in weights:
                    F.linear(x, weight)
                middle = time.perf_counter()
                for pack in packs:
                    torch.ops.mkldnn._linear_pointwise(x, pack, None, "none", [], "")
                plain.append(middle - start)
                packed.append(time.perf_counter() - middle)
            if min(packed) <= SLOWER * min(plain):
                gaining.append(rows)
    return tuple(gaining)


class Linear(nn.Linear):
    """`nn.Linear` that keeps its weights packed for oneDNN where they are only read, and on a CPU.

    Wherever gradients are asked for, on other devices and under a compiler it is `nn.Linear`. The packed copy takes as
    much memory as the weights; it is made at the first use and again when the weights have changed.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.packed = AVAILABLE  # off, it is `nn.Linear` everywhere
        self._packs: dict[tuple[int | None, int | None], _Packed] = {}

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_packs": {}}  # copies pack anew

    def forward(self, x: Tensor, outputs: slice = EVERY, onto: Tensor | None = None) -> Tensor:
        """x (..., in_features) -> (..., out_features), or only a slice of the outputs.

        What the product is added to, `onto`, is overwritten where that saves a launch.
        """
        if onto is not None:
            return self._added(x, onto)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if outputs != EVERY:
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        if not self._gains(x, weight):
            return F.linear(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._pack(weight, outputs), bias, "none", [], "")

    def _added(self, x: Tensor, onto: Tensor) -> Tensor:
        """The product and what it is added to, of one shape."""
        free = not torch.compiler.is_compiling() and not torch.is_grad_enabled() and onto.is_contiguous()
        if x.device.type == "cpu" or not free or self.bias is not None or x.dtype != onto.dtype:
            return onto + self(x)
        rows = onto.view(-1, self.out_features)
        torch.addmm(rows, x.reshape(-1, self.in_features), self.weight.t(), out=rows)
        return onto

    def _gains(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the packed product can be used, and is the faster one."""
        return (
            self.packed
            and not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.dtype == weight.dtype
            and x.dtype in DTYPES
            and not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad))
            and not self.weight.is_inference()  # whose changes are not counted
            and x.numel() > 0
            and _gains(x.numel() // x.shape[-1], weight)
        )

    def _pack(self, weight: Tensor, outputs: slice) -> Tensor:
        """The packed weight, found or made."""
        key = outputs.start, outputs.stop
        known, version = self._packs.get(key), self.weight._version
        if known is None or known.source.data_ptr() != weight.data_ptr() or known.version != version:
            source = weight.detach()
            packed = torch.ops.mkldnn._reorder_linear_weight(source.contiguous(), ROWS)
            known = self._packs[key] = _Packed(packed, source, version)
        return known.weight
