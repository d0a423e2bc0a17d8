"""Many processes: `torchrun` starts them, each does its share, the main one (rank 0) prints and writes.

A command works in one process and in many with the same code: in one process every function here is the obvious
no-op. Processes meet through `torch.distributed` (gloo on CPUs, NCCL on GPUs) and through the cache's folder, which
all of them must see. `torchrun` watches them: an error in one ends all.

Gradients are averaged here with one reduction of a flat tensor and not by `DistributedDataParallel`, because what is
trained is not called through one `forward`: a backbone through `teacher_forced`, PPO through TorchRL's loss, cloning
with heads that get no gradient and with terms whose number differs between processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:  # torch is imported when processes meet: showing progress must not need it
    from collections.abc import Iterator

    from omegaconf import DictConfig
    from torch import Tensor, nn

T = TypeVar("T")
TIMEOUT = timedelta(days=1)  # torchrun ends all processes when one fails; a slow one is waited for


class _Place(NamedTuple):
    """Which process this is."""

    rank: int = 0
    size: int = 1


_place = _Place()


# -- starting ---------------------------------------------------------------------------------------------------------


def launched(command: Callable[[DictConfig], T]) -> Callable[[DictConfig], T]:
    """A command that also runs under `torchrun`; there `device=cuda` becomes the device of the process's local rank."""

    @wraps(command)
    def run(config: DictConfig) -> T:
        if "TORCHELASTIC_RUN_ID" not in os.environ or _place.size > 1:
            return command(config)
        with processes(config.device) as device:
            config.device = device
            return command(config)

    return run


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Meet the other processes that `torchrun` started.

    Args:
        device: "cpu", or "cuda" for the device of this process's local rank.

    Yields:
        The device of this process.

    Raises:
        ValueError: if there are fewer GPUs than processes, or one GPU is asked for by number.
    """
    import torch
    from torch import distributed

    global _place
    cuda = device.startswith("cuda")
    if cuda:
        device = _own_gpu(device)
        torch.cuda.set_device(device)
    # objects (paths, flags, rows) go through gloo; tensors of GPUs through NCCL
    distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=TIMEOUT)
    before, _place = _place, _Place(distributed.get_rank(), distributed.get_world_size())
    yield device  # after an error there is nobody to say goodbye to: torchrun ends the others
    distributed.barrier()
    _place = before
    distributed.destroy_process_group()


def _own_gpu(device: str) -> str:
    import torch

    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if device != "cuda":
        raise ValueError(f"device={device!r} is one GPU for all processes; use device=cuda, which gives each its own")
    if local >= found:
        raise ValueError(f"process {local} of this machine has no GPU, there are {found}; lower --nproc-per-node")
    return f"cuda:{local}"


# -- who does what ----------------------------------------------------------------------------------------------------


def rank() -> int:
    """Number of this process, from 0."""
    return _place.rank


def size() -> int:
    """How many processes work together."""
    return _place.size


def is_main() -> bool:
    """Whether this process prints and writes: rank 0."""
    return _place.rank == 0


def on_main(make: Callable[[], T]) -> T:
    """Call a function in the main process alone and give all processes what it returned.

    The others wait. Inside, the main process is on its own: what it calls must not wait for them.
    """
    if _place.size == 1:
        return make()
    from torch import distributed

    made: list[Any] = [None]
    if is_main():
        made = [alone(make)]
    distributed.broadcast_object_list(made)
    return made[0]


def alone(make: Callable[[], T]) -> T:
    """Call a function that takes this process for the only one."""
    global _place
    before, _place = _place, _Place()
    try:
        return make()
    finally:
        _place = before


def print_main(text: str) -> None:
    """Print a line at once; of many processes the main one does."""
    if is_main():
        print(text, flush=True)


@cache
def print_once(text: str) -> None:
    """`print_main`, but a line that was printed before is not printed again."""
    print_main(text)


def barrier() -> None:
    """Wait for all processes."""
    if _place.size > 1:
        from torch import distributed

        distributed.barrier()


def share_of(items: Sequence[T]) -> list[T]:
    """The items of this process: dealt forth and back (0 1 1 0 0 1 ...), so that a trend in their cost evens out."""
    mine = []
    for number, item in enumerate(items):
        turn, place = divmod(number, _place.size)
        if (place if turn % 2 == 0 else _place.size - 1 - place) == _place.rank:
            mine.append(item)
    return mine


def gather(value: T) -> list[T]:
    """What every process has, by rank."""
    if _place.size == 1:
        return [value]
    from torch import distributed

    found: list[Any] = [None] * _place.size
    distributed.all_gather_object(found, value)
    return found


# -- training ---------------------------------------------------------------------------------------------------------


def rows_of(batch: Tensor) -> Tensor:
    """This process's rows of a batch that all drew alike; ValueError if there are fewer rows than processes."""
    if len(batch) < _place.size:
        raise ValueError(f"batch_size={len(batch)} must be at least the number of processes, {_place.size}")
    return batch.tensor_split(_place.size)[_place.rank]


def backward(loss: Tensor, parameters: Iterable[nn.Parameter], weight: float | None = None) -> float:
    """Gradients of the weighted mean of all processes' losses, the same in every process.

    Args:
        loss: scalar, of this process's rows.
        parameters: those that are trained; their gradients must be empty.
        weight: share of this process in the mean; None is an equal share. Sharded parameters allow no other.

    Returns:
        The mean loss.
    """
    if _place.size == 1:
        loss.backward()
        return loss.item()
    import torch
    from torch import distributed
    from torch.distributed.tensor import DTensor

    trained = list(parameters)
    if any(isinstance(parameter, DTensor) for parameter in trained):  # FSDP2 averages gradients as it scatters them
        loss.backward()
        total = loss.detach() / _place.size
        distributed.all_reduce(total)
        return total.item()
    weighted = loss * (1 / _place.size if weight is None else weight)
    weighted.backward()
    # alike in all processes: they run the same network
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    flat = torch.cat([part.detach().flatten().float() for part in (*gradients, weighted)])
    distributed.all_reduce(flat)
    for gradient, part in zip(gradients, flat[:-1].split([part.numel() for part in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
    return flat[-1].item()


def mean_of(row: dict[str, float]) -> dict[str, float]:
    """Metrics averaged over all processes."""
    if _place.size == 1:
        return row
    found = gather(row)
    return {key: sum(other[key] for other in found) / len(found) for key in row}
