"""Names of tensors on disk: a stacked expert weight [E, ...] is stored as E tensors, by each expert's global number.

    encoder.blocks.1.feed_forward.layer.experts.wi      [E, F, D]   in the model
    encoder.blocks.1.feed_forward.layer.experts.{e}.wi  [F, D]      on disk, for each expert e
    ...experts.wi/row  <->  ...experts.{e}.wi/row       optimizer state, `<parameter>/<slot>`, in the same way

So a checkpoint does not know how many ranks wrote it. A slot that is not stacked (a step count, say) keeps the name of
the stacked parameter. This file knows names and views; it reads and writes nothing.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

_STACKED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<tail>[^/]+(?P<slot>/.*)?)")
_NUMBERED = re.compile(r"(?P<head>(?:[^/]+?\.)?experts)\.(?P<expert>0|[1-9][0-9]*)\.(?P<tail>.+)")


def split(named: Mapping[str, Tensor], experts: range) -> dict[str, Tensor]:
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


def join(logical: Mapping[str, Tensor], experts: range) -> dict[str, Tensor]:
    """The inverse of `split`: these experts stacked again (a copy), the rest as it is."""
    named: dict[str, Tensor] = {}
    stacks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in logical.items():
        match = _NUMBERED.fullmatch(name)
        if match is None:
            named[name] = tensor
        else:
            stack = stacks.setdefault(f"{match['head']}.{match['tail']}", {})
            stack[int(match["expert"])] = tensor
    for name, stack in stacks.items():
        assert sorted(stack) == list(experts), f"{name} has experts {sorted(stack)}, not {experts}"
        named[name] = torch.stack([stack[expert] for expert in experts])
    return named


def whole(logical: Mapping[str, Tensor], name: str, num_experts: int) -> Tensor:
    """The tensor of a name in the model: stacked, where it is an expert's."""
    match = _STACKED.fullmatch(name)
    if match is None:
        return logical[name]
    return torch.stack([logical[f"{match['head']}.{expert}.{match['tail']}"] for expert in range(num_experts)])


def expert_numbers(names: Iterable[str]) -> list[int]:
    """The global numbers of the experts that logical names speak of, ascending."""
    return sorted({int(match["expert"]) for name in names if (match := _NUMBERED.fullmatch(name))})
