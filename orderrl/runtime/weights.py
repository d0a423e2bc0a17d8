"""Reading published weights: safetensors, weights-only pickles, hub names, shards, and the nesting that files use."""

import argparse
import hashlib
import pathlib
import pickle
import pickletools
import re
import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orderrl.runtime import distributed
from orderrl.runtime.checkpoint import require_fit
from orderrl.runtime.jsonfile import read_json
from orderrl.runtime.terminal import one_line, shorten

HUB = "hf://"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What published files wrap a state dict in; averaged weights come first, they are what the papers evaluate.
AVERAGED = (
    *("model_ema", "ema_model", "model_ema_state_dict", "ema_model_state_dict", "ema_state_dict", "state_dict_ema"),
    *("params_ema", "ema_params", "ema", "averaged_model"),
)
NESTINGS = (*AVERAGED, "model", "model_state_dict", "module", "state_dict", "params")
# Classes in which training scripts keep their arguments: to make one and to fill it runs no code of the file.
SCRIPT_ARGUMENTS: list[Any] = [argparse.Namespace, types.SimpleNamespace, pathlib.PosixPath]
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")


def local_path(path: str | Path) -> Path:
    """A file on this machine; hub names are downloaded, or found in the hub's cache.

    Args:
        path: a file, or `hf://OWNER/NAME[@REVISION]/FILE`.

    Raises:
        ValueError: if the hub name is malformed, or its file cannot be downloaded or found.
        FileNotFoundError: if there is no such file.
    """
    text = str(path)
    if not text.startswith(HUB):
        if not Path(path).is_file():
            what = "is a folder" if Path(path).is_dir() else "does not exist"
            raise FileNotFoundError(f"{path}: {what}; give a .safetensors or .pt file, or {HUB}OWNER/NAME/FILE")
        return Path(path)
    parsed = re.fullmatch(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.+))?", text)
    if parsed is None:
        raise ValueError(f"{text} is no hub name; write {HUB}OWNER/NAME[@REVISION]/FILE")
    from huggingface_hub import hf_hub_download, list_repo_files

    repository, revision, file = parsed.groups()
    try:
        if file is not None:
            return Path(hf_hub_download(repository, file, revision=revision))
        files = list_repo_files(repository, revision=revision)
    except Exception as error:  # the hub's own, and whatever its transport raises without a network
        raise ValueError(f"{text} cannot be downloaded or found in the hub's cache: {one_line(error, 300)}") from error
    weights = [name for name in files if name.endswith((".safetensors", *PICKLES))]
    raise ValueError(f"{text} names no file; choose one of {', '.join(weights)}")


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, of several nested ones the first of `NESTINGS`; tensors are mapped, not copied.

    Args:
        path: .safetensors, .pt, .pth, .bin or .ckpt, or a hub name.

    Raises:
        ValueError: if the file is damaged, wants to run code, or holds no state dict; one line that says which.
        FileNotFoundError: if there is no such file.
    """
    state: dict[str, Tensor] = {}
    for part in read_shards(path):
        state |= part
    return state


def read_shards(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """The state dict of a file, or of the shards that a `*.safetensors.index.json` names, one after the other.

    Arguments and errors as for `read_state`.
    """
    if str(path).endswith(".index.json"):
        index = local_path(path)
        try:
            shards = sorted(set(map(str, read_json(index)["weight_map"].values())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: is no index of shards ({error})") from error
        for shard in shards:
            yield from read_shards(f"{str(path).rpartition('/')[0]}/{shard}" if "/" in str(path) else shard)
        return
    file = local_path(path)
    if file.suffix in PICKLES:
        yield clean_names(unwrap(_read_pickle(file), file))
    elif file.suffix == ".safetensors":
        yield clean_names(_read_safetensors(file))
    else:
        raise ValueError(f"{file}: must end in .safetensors, {', '.join(PICKLES)} or .safetensors.index.json")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated, damaged or not a safetensors file ({error}); copy it again") from error


def _read_pickle(path: Path, mmap: bool = True) -> object:
    """A pickle of tensors, plain containers and a training script's arguments, nothing else."""
    try:
        with torch.serialization.safe_globals(SCRIPT_ARGUMENTS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:GLOBAL|global) ([\w.]+)", str(error))
        what = f" ({wanted.group(1)})" if wanted else ""
        raise ValueError(
            f"{path}: holds more than tensors{what}, and reading that could run code; save its state dict alone, with "
            f"torch.save(checkpoint[{_nesting_of(path)!r}], ...) or safetensors, where the file is trusted"
        ) from error
    except (RuntimeError, EOFError, ValueError, TypeError, AttributeError) as error:
        if mmap and "mmap" in str(error):  # the format before torch 1.6, which cannot be mapped
            return _read_pickle(path, mmap=False)
        raise ValueError(f"{path}: is truncated, damaged or no PyTorch file ({error}); copy it again") from error


def _nesting_of(path: Path) -> str:
    """The state dict to take from a pickle that is not read: of the strings in it, the first that is in `NESTINGS`."""
    strings: set[object] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
            strings = {argument for _, argument, _ in pickletools.genops(archive.read(name))}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile):  # the format before torch 1.6, or damaged
        pass
    return next((name for name in NESTINGS if name in strings), "model")


def unwrap(contents: object, path: Path) -> dict[str, Tensor]:
    """The state dict inside what a file holds, else ValueError.

    If there is a choice, or it is averaged, a line says which was taken.
    """
    if not isinstance(contents, Mapping):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, not a state dict")
    nested = [name for name in NESTINGS if isinstance(contents.get(name), Mapping)]
    if nested:
        chosen, others = nested[0], ", ".join(nested[1:])
        if others or chosen in AVERAGED:
            taken = f"{chosen} (averaged weights)" if chosen in AVERAGED else chosen
            distributed.print_main(f"{path}: takes {taken}" + (f", not {others}" if others else ""))
        return unwrap(contents[chosen], path)
    tensors = {str(name): value for name, value in contents.items() if isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(contents):
        raise ValueError(f"{path}: is no state dict, it holds {shorten(sorted(map(str, contents)))}")
    return tensors


def clean_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of FSDP, torch.compile, activation checkpointing, and of DDP where all have it.

    The counter of `torch.optim.swa_utils.AveragedModel` is left out.
    """
    cleaned = {_WRAPPERS.sub("", name): value for name, value in state.items()}
    counter = cleaned.pop("n_averaged", None)
    unwrapped = cleaned
    while unwrapped and all(name.startswith("module.") for name in unwrapped):
        unwrapped = {name.removeprefix("module."): value for name, value in unwrapped.items()}
    if counter is not None and unwrapped is cleaned:  # no AveragedModel: a tensor of this name
        unwrapped["n_averaged"] = counter
    return unwrapped


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Fill a module from a file, in the module's own dtype, shard by shard.

    Args:
        module: on any device but meta; changed in place.
        path: as for `read_state`.

    Raises:
        ValueError: if keys are missing, unexpected or of another shape; all of them in one line. The module is then
            filled in part and of no use.
        FileNotFoundError: if there is no such file.
    """
    expected = module.state_dict()
    shapes: dict[str, torch.Size] = {}
    for shard in read_shards(path):
        for name, value in shard.items():
            shapes[name] = value.shape
            if name in expected and value.shape == expected[name].shape:
                expected[name].copy_(value)
    require_fit(module, shapes, path, "choose the model it was made for")
    return module


def missing_weights(what: str, key: str, published: str) -> ValueError:
    """The refusal of a published model without its weights: the setting to give, and where they are."""
    return ValueError(f"{what} needs weights: give {key}=FILE or {key}={HUB}OWNER/NAME/FILE; published as {published}")


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of a module's state dict: names and bytes."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
