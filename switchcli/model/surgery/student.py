"""A student that starts from its teacher's weights (section 4.2): which of them fit, and what takes the experts' place.

All that is no expert and no router is copied by name: attention, norms, embeddings, the dense feed-forwards. Where the
teacher has experts the paper's student starts afresh; beyond it, it may take the mean of the experts, or the one with
the most tokens. A sparse student takes in the same way for each of its experts: a mean, or the most used ones with
their rows of the router.

# Deviates: the caption of Table 6 says that the baseline without distillation starts from expert weights; its row says
non-expert, which is what a dense model can take.

Legend: E experts, D model, F hidden.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch

from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer
from switchcli.model.transformer import SwitchTransformer
from switchcli.spec import Spec

DIMENSIONS = (
    "vocab_size", "d_model", "d_ff", "head_width", "num_heads", "num_layers", "decoder_layers", "activation",
    "tie_embeddings", "relative_attention_num_buckets",
)  # fmt: skip
"""What two models have in common when the weights of the one mean the same in the other."""


class FromTeacherInit(Spec):
    """Start from the teacher's weights."""

    kind: Literal["teacher"] = "teacher"
    experts: Literal["random_init", "mean", "most_used"] = "random_init"
    """What a feed-forward takes where the teacher has experts: `fresh` is the paper's; `most_used` is the expert to
    which most tokens of held-out text go."""
    on_shape_mismatch: Literal["error", "random_init"] = "error"
    """Of a student with other dimensions than its teacher's: `fresh` copies the tensors that fit and starts the others
    afresh."""


class StudentInit(NamedTuple):
    """What each parameter of a student starts from, by name."""

    copied: tuple[str, ...]
    """The teacher's of the same name."""
    from_experts: Mapping[str, str]
    """The stacked experts of the teacher, [E, ...], that it is made of."""
    random_init: tuple[str, ...]


def differing_dimensions(student: ModelSpec, teacher: ModelSpec) -> list[tuple[str, object, object]]:
    """Key, student's value and teacher's value of each dimension in which they differ."""
    values = ((name, getattr(student, name), getattr(teacher, name)) for name in DIMENSIONS)
    return [one for one in values if one[1] != one[2]]


def plan_init(student: SwitchTransformer, teacher: SwitchTransformer, settings: FromTeacherInit) -> StudentInit:
    """What the student can take, by names and shapes alone: models on `meta` will do."""
    there = {name: weight.shape for name, weight in teacher.named_parameters()}
    layers = [part for part in student.modules() if isinstance(part, SwitchLayer)]
    routed = {id(weight) for part in layers for weight in part.parameters()}
    copied, from_experts, fresh = [], {}, []
    for name, weight in student.named_parameters():
        source = re.sub(r"(\.layer)\.(wi|wi_gate|wo)\.weight$", r"\1.experts.\2", name) if name not in there else name
        one_expert = weight.shape[1:] if id(weight) in routed else weight.shape
        if id(weight) not in routed and there.get(name) == weight.shape:
            copied.append(name)
        elif settings.experts != "random_init" and ".experts." in source and there.get(source, ())[1:] == one_expert:
            from_experts[name] = source
        else:
            fresh.append(name)
    if settings.experts == "most_used":  # a router goes with the experts that it knows
        with_router = {
            f"{name.rpartition('.experts.')[0]}.router.weight" for name in from_experts if ".experts." in name
        }
        fresh = [name for name in fresh if name not in with_router]
        from_experts |= {name: name for name in sorted(with_router)}
    return StudentInit(tuple(copied), from_experts, tuple(fresh))


def init_weights(
    spec: ModelSpec,
    experts: range,
    plan: StudentInit,
    weight_of: Callable[[str], torch.Tensor],
    settings: FromTeacherInit,
    load: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a student `spec` that is not fresh, by its name; of each stack these experts.

    Args:
        weight_of: the teacher's parameters by name; experts stacked.
        load: tokens that went to each expert, [E], by the name of the sparse layer; needed for `most_used` alone.
    """
    for name in plan.copied:
        yield name, weight_of(name)
    for name, source in plan.from_experts.items():
        stacked = weight_of(source)
        stacks = spec.num_experts if name == source else None  # None: one dense feed-forward
        if settings.experts == "mean":
            mean = stacked.mean(0)
            yield name, mean.expand(len(experts), *mean.shape) if stacks else mean
            continue
        layer = re.split(r"(?:\.switch)?\.(?:experts|router)\.", source)[0]
        most = load[layer].argsort(descending=True, stable=True)[: stacks or 1].sort().values
        kept = stacked[most.to(stacked.device)]
        if stacks and ".experts." in name:
            kept = kept[experts.start : experts.stop]
        yield name, kept if stacks else kept[0]
