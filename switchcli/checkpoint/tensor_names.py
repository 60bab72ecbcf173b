"""Names of tensors on disk. A stacked expert weight [E, ...] is stored as E tensors, numbered by global expert.

    encoder.blocks.1.feed_forward.layer.experts.wi      [E, F, D]   in the model
    encoder.blocks.1.feed_forward.layer.experts.{e}.wi  [F, D]      on disk, for each expert e
    ...experts.wi/row  <->  ...experts.{e}.wi/row       optimizer state, `<parameter>/<slot>`, likewise

Each rank names its part of a sharded tensor like the full tensor. A checkpoint therefore does not depend on the number
of ranks that wrote it. An optimizer slot without an expert dimension, such as a step count, keeps the name of the
stacked parameter. This file works on names and views; it reads and writes nothing.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from switchcli.distributed.layout import Layout, LocalPart

_STACKED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<tail>[^/]+(?P<slot>/.*)?)")
_NUMBERED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<expert>0|[1-9][0-9]*)\.(?P<tail>.+)")


def split_experts(tensors: Mapping[str, Tensor], experts: range) -> dict[str, Tensor]:
    """Return this process's tensors under their logical names, stacks split into experts, as views.

    `experts` are the global numbers of the experts in every stack, as many as its first dimension. A parameter with
    `experts` in its name must be stacked; an optimizer slot is split if its first dimension has that length.
    """
    logical: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _STACKED.fullmatch(name)
        assert not _NUMBERED.fullmatch(name), f"{name} has an expert's number already"
        is_stack = match is not None and tensor.shape[:1] == (len(experts),)
        assert is_stack or match is None or match["slot"], (
            f"{name} {list(tensor.shape)} is not stacked over {len(experts)} experts"
        )
        if match is not None and is_stack:
            for expert, expert_tensor in zip(experts, tensor.unbind(0), strict=True):
                logical[f"{match['head']}.{expert}.{match['tail']}"] = expert_tensor
        else:
            logical[name] = tensor
    return logical


def logical_parts(tensors: Mapping[str, Tensor], layouts: Mapping[str, Layout], experts: range) -> dict[str, LocalPart]:
    """Return the tensors of `split_experts`, each with its layout within the full logical tensor.

    `layouts` has the names of `tensors`; a tensor without a layout is not sharded.
    """
    parts: dict[str, LocalPart] = {}
    for name, tensor in tensors.items():
        layout = layouts.get(name, ())
        for logical_name, logical_tensor in split_experts({name: tensor}, experts).items():
            # 1 if the expert dim of a stack was removed: every later dim moves down by one. Otherwise 0.
            removed_dims = tensor.ndim - logical_tensor.ndim
            shifted = tuple(sharded._replace(dim=sharded.dim - removed_dims) for sharded in layout)
            parts[logical_name] = LocalPart(logical_tensor, shifted)
    return parts


def stack_experts(logical: Mapping[str, Tensor], name: str, num_experts: int) -> Tensor:
    """Return the tensor with this name in the model. The tensors of experts are stacked, in new memory."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return logical[name]
    return torch.stack([logical[f"{match['head']}.{expert}.{match['tail']}"] for expert in range(num_experts)])


def expert_numbers(names: Iterable[str]) -> list[int]:
    """Return the sorted global numbers of the experts that occur in logical names."""
    return sorted({int(match["expert"]) for name in names if (match := _NUMBERED.fullmatch(name))})
