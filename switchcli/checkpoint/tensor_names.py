"""Names of tensors on disk: a stacked expert weight [E, ...] is stored as E tensors, by each expert's global number.

    encoder.blocks.1.feed_forward.layer.experts.wi      [E, F, D]   in the model
    encoder.blocks.1.feed_forward.layer.experts.{e}.wi  [F, D]      on disk, for each expert e
    ...experts.wi/row  <->  ...experts.{e}.wi/row       optimizer state, `<parameter>/<slot>`, in the same way

Of a tensor that is cut, each rank that has a part has it under the name of the whole.
So a checkpoint does not know how many ranks wrote it. A slot that is not stacked (a step count, say) keeps the name of
the stacked parameter. This file knows names and views; it reads and writes nothing.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from switchcli.distributed.layout import Layout, LocalPart

_STACKED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<tail>[^/]+(?P<slot>/.*)?)")
_NUMBERED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<expert>0|[1-9][0-9]*)\.(?P<tail>.+)")


def split_experts(named: Mapping[str, Tensor], experts: range) -> dict[str, Tensor]:
    """Whole logical tensors of what one process holds, as views of the tensors given.

    `experts` are the global numbers of those in each stack here, as many as its first dimension. A parameter with
    `experts` in its name must be stacked; a slot is split when its first dimension is as long.
    """
    logical: dict[str, Tensor] = {}
    for name, tensor in named.items():
        match = _STACKED.fullmatch(name)
        assert not _NUMBERED.fullmatch(name), f"{name} has an expert's number already"
        stacked = match is not None and tensor.shape[:1] == (len(experts),)
        assert stacked or match is None or match["slot"], (
            f"{name} {list(tensor.shape)} is not stacked over {len(experts)} experts"
        )
        if match is not None and stacked:
            for expert, part in zip(experts, tensor.unbind(0), strict=True):
                logical[f"{match['head']}.{expert}.{match['tail']}"] = part
        else:
            logical[name] = tensor
    return logical


def logical_parts(named: Mapping[str, Tensor], cuts: Mapping[str, Layout], experts: range) -> dict[str, LocalPart]:
    """The same, each with the cuts by which it is a part of the logical tensor; `cuts` by the names of `named`."""
    found: dict[str, LocalPart] = {}
    for name, tensor in named.items():
        own = cuts.get(name, ())
        for logical, piece in split_experts({name: tensor}, experts).items():
            shift = tensor.ndim - piece.ndim  # a stack's first dim is gone
            found[logical] = LocalPart(piece, tuple(cut._replace(dim=cut.dim - shift) for cut in own))
    return found


def stack_experts(logical: Mapping[str, Tensor], name: str, num_experts: int) -> Tensor:
    """The tensor of a name in the model: stacked, where it is an expert's."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return logical[name]
    return torch.stack([logical[f"{match['head']}.{expert}.{match['tail']}"] for expert in range(num_experts)])


def expert_numbers(names: Iterable[str]) -> list[int]:
    """The global numbers of the experts that logical names speak of, ascending."""
    return sorted({int(match["expert"]) for name in names if (match := _NUMBERED.fullmatch(name))})
