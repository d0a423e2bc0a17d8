"""A block drawn as one captured CUDA graph: thousands of small kernels become one launch.

A block of RandAR-XL takes twenty thousand kernels, whose launches take longer than their work. What is drawn with the
same shapes is recorded once and replayed, over copies of its inputs at fixed addresses. Everything that a graph writes
for others lies outside its memory pool, so that graphs may share one and be replayed in any order.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orderrl.backbones.cache import PrefixCache
from orderrl.backbones.memory import free_memory
from orderrl.backbones.sampling import Sampling

MOST_GRAPHS = 64  # that are kept, those used last
SEEN_BEFORE = 2  # how often shapes are drawn eagerly before they are worth a graph


@dataclass
class _Inputs:
    """What a recorded drawing reads and writes, at fixed addresses."""

    prefix: PrefixCache  # all sides one behind the other
    unseen: Tensor | None  # (states, slots) bool, where the lengths differ
    positions: Tensor  # (M, K, p*p) int64
    uniforms: Tensor  # (M, K, p*p)
    visible: Tensor  # (M,) int64
    room: Tensor  # of the chains' entries
    tokens: Tensor  # (M, K, p*p) int64

    def fill(self, sides: Sequence[PrefixCache], positions: Tensor, uniforms: Tensor, visible: Tensor) -> None:
        """Copy what is to be drawn."""
        longest, start = self.prefix.keys.shape[3], 0
        for side in sides:
            rows = slice(start, start + len(side.length))
            self.prefix.keys[:, rows].copy_(side.keys[:, :, :, :longest])
            self.prefix.values[:, rows].copy_(side.values[:, :, :, :longest])
            start = rows.stop
        if self.unseen is not None:
            unseen = torch.arange(longest) >= torch.cat([side.length for side in sides])[:, None]
            self.unseen.copy_(unseen.to(self.unseen.device, non_blocking=True))
        self.positions.copy_(positions)
        self.uniforms.copy_(uniforms)
        self.visible.copy_(visible.to(self.visible.device, non_blocking=True))


class BlockGraphs:
    """The graphs of a backbone.

    Args:
        wanted: True records at the first drawing and passes errors on; None records shapes that come again, and after
            an error warns and draws eagerly; False never records.
    """

    def __init__(self, wanted: bool | None = None) -> None:
        self.wanted = wanted
        self._forget()

    def _forget(self) -> None:
        self._recorded: OrderedDict[Hashable, tuple[Any, _Inputs]] = OrderedDict()
        self._seen: Counter[Hashable] = Counter()
        self._weights: tuple[int, ...] = ()
        self._arena: tuple[Tensor, Tensor] | None = None  # of the prefixes of all graphs
        self._pool: Any = None
        self._stream: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {"wanted": self.wanted}  # a copy of a backbone records its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["wanted"])  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self._recorded)

    def draw(
        self,
        backbone: Any,
        sides: Sequence[PrefixCache],
        positions: Tensor,
        uniforms: Tensor,
        visible: Tensor,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens and the room of the chains' entries, as `_draw` of the backbone leaves them; None to draw eagerly."""
        if self.wanted is False or positions.device.type != "cuda" or torch.is_grad_enabled() or not len(positions):
            return None
        if torch.cuda.is_current_stream_capturing():  # in a graph of the caller's
            return None
        lengths = torch.cat([side.length for side in sides])
        shortest, longest = (int(end) for end in lengths.aminmax())
        key = (len(sides), *positions.shape, uniforms.dtype, longest, shortest < longest, sampling)
        with self._lock, torch.cuda.device(positions.device), torch.inference_mode(False), torch.no_grad():
            self._check_weights(backbone)
            if not self._usable(key):
                return None
            given = (sides, positions, uniforms, visible)
            try:
                graph, inputs = self._recorded.get(key) or self._record(key, backbone, longest, sampling, *given)
            except RuntimeError as error:
                if self.wanted:
                    raise
                self._forget()
                self.wanted = False
                warnings.warn(f"blocks are drawn without CUDA graphs from now on: {error}", stacklevel=2)
                return None
            self._recorded.move_to_end(key)
            inputs.fill(*given)
            graph.replay()
            return inputs.tokens.clone(), inputs.room.clone()

    def _check_weights(self, backbone: Any) -> None:
        """Forget all graphs if the weights that they read lie elsewhere now."""
        weights = tuple(parameter.data_ptr() for parameter in backbone.parameters())
        if weights != self._weights:
            self._forget_graphs()
            self._weights = weights

    def _forget_graphs(self) -> None:
        self._recorded.clear()
        self._arena = None

    def _usable(self, key: Hashable) -> bool:
        """Whether these shapes are, or are to be, a graph; all of them belong to the stream of the first."""
        if self._stream is None:
            self._stream = torch.cuda.current_stream()
        if self._stream != torch.cuda.current_stream():
            return False
        self._seen[key] += 1
        return bool(self.wanted) or key in self._recorded or self._seen[key] > SEEN_BEFORE

    def _record(
        self,
        key: Hashable,
        backbone: Any,
        longest: int,
        sampling: Sampling,
        sides: Sequence[PrefixCache],
        positions: Tensor,
        uniforms: Tensor,
        visible: Tensor,
    ) -> tuple[Any, _Inputs]:
        """Warm up on a side stream, then record."""
        inputs = self._inputs(backbone, longest, sides, positions, uniforms)
        inputs.fill(sides, positions, uniforms, visible)

        def run() -> None:
            inputs.tokens.copy_(
                backbone._draw(
                    [inputs.prefix], inputs.positions, inputs.uniforms, inputs.visible, sampling, [inputs.room]
                )
            )

        self._pool = torch.cuda.graph_pool_handle() if self._pool is None else self._pool
        graph = recorded(run, self._pool)
        self._recorded[key] = graph, inputs
        while len(self._recorded) > MOST_GRAPHS:
            self._recorded.popitem(last=False)
        return graph, inputs

    def _inputs(
        self,
        backbone: Any,
        longest: int,
        sides: Sequence[PrefixCache],
        positions: Tensor,
        uniforms: Tensor,
    ) -> _Inputs:
        """Room for inputs and outputs; prefixes of all graphs share theirs, which grows with the largest batch."""
        whole, states = sides[0].keys, sum(len(side.length) for side in sides)
        if self._arena is None or self._arena[0].shape[1] < states or self._arena[0].dtype != whole.dtype:
            self._forget_graphs()
            needed = 2 * whole.element_size() * whole[:, :1].numel() * states
            if needed > free_memory(whole.device) / 2:
                raise RuntimeError(f"copies of the prefixes take {needed / 1e9:.1f} GB, more than half of what is free")
            shape = (whole.shape[0], states, *whole.shape[2:])
            self._arena = whole.new_empty(shape), whole.new_empty(shape)
        keys, values = (part[:, :states, :, :longest] for part in self._arena)
        lengths = torch.cat([side.length for side in sides])
        unseen = None
        if bool((lengths != longest).any()):
            unseen = torch.ones(states, longest, dtype=torch.bool, device=keys.device)
        prefix = PrefixCache(keys, values, torch.full_like(lengths, longest), unseen)
        return _Inputs(
            prefix,
            unseen,
            torch.empty_like(positions),
            torch.empty_like(uniforms),
            torch.empty(len(positions), dtype=torch.int64, device=positions.device),
            backbone._room(prefix, positions.shape[1]),
            torch.empty_like(positions),
        )


def recorded(run: Callable[[], None], pool: Any = None) -> Any:
    """What a function does on the current CUDA device, as a graph: it waits for nothing and reads no CPU tensor."""
    aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):  # libraries set themselves up outside the graph
        run()
    here.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # other threads may go on using the device
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph
