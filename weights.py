"""Weight files as dicts of tensors: reading, renaming, loading into a module, saving.

Nothing here runs code from a file: PyTorch files are read with weights_only=True.
"""
import os
from pathlib import Path

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def read(path: str | Path) -> Weights:
    """The tensors of a PyTorch file.  Dicts within dicts become dotted names: {"generator": {"a": x}} -> "generator.a".

    Raises ValueError naming the file if it is missing, truncated or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such weight file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                           # torch raises whatever its parser stumbles over
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: damaged, or not a PyTorch weight file ({reason})") from None
    return flatten(content)


def flatten(content: object, prefix: str = "") -> Weights:
    """The tensors in dicts within dicts, under dotted names; anything else is left out."""
    if isinstance(content, Tensor):
        return {prefix.rstrip("."): content}
    flat = {}
    for name, value in content.items() if isinstance(content, dict) else ():
        flat.update(flatten(value, f"{prefix}{name}."))
    return flat


def under(weights: Weights, prefix: str) -> Weights:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def rename(weights: Weights, names: list[tuple[str, str]]) -> Weights:
    """Published names to ours: each (published, ours) pair replaces a part of the name, in order."""
    renamed = {}
    for name, tensor in weights.items():
        for published, ours in names:
            name = name.replace(published, ours)
        renamed[name] = tensor
    return renamed


def load(module: nn.Module, weights: Weights, source: str | Path) -> None:
    """Put every tensor in its place, as float32.  Raises ValueError naming `source` and the first tensor that is
    missing, unknown or of another shape, before anything has changed."""
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in weights:
            raise ValueError(f"{source}: tensor {name} is missing; this file holds another model")
        if weights[name].shape != tensor.shape:
            raise ValueError(f"{source}: tensor {name} has shape {tuple(weights[name].shape)}, "
                             f"expected {tuple(tensor.shape)}; this file holds a model of another size")
    for name in weights:
        if name not in expected:
            raise ValueError(f"{source}: unknown tensor {name}; this file holds another model")
    module.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)


def save(content: object, path: str | Path) -> None:
    """Write to a new file, sync it, and rename it: a full disk or a kill leaves the file that was there whole."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except RuntimeError as error:                        # how torch reports a failed write
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from None
    finally:
        new.unlink(missing_ok=True)
