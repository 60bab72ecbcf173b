"""Initialization of a student from its teacher's weights (section 4.2): which weights fit, and what replaces experts.

Everything but experts and routers is copied by name: attention, norms, embeddings, dense feed-forwards. Where the
teacher has experts, the paper's student is initialized at random. Beyond the paper, it may use the mean of the experts,
or the one with the most tokens. The experts of a sparse student can be initialized likewise: each from the mean, or
from the most used experts with their rows of the router.

# Deviates: the caption of Table 6 says that the baseline without distillation starts from expert weights; its row says
non-expert, which is what a dense model can use.

Legend: E experts of the teacher.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from switchcli.model.config import ModelSpec
from switchcli.model.moe.layer import SwitchLayer, sublayer_name
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.transformer import SwitchTransformer, named_weights

DIMENSIONS = (
    "vocab_size", "d_model", "d_ff", "head_width", "num_heads", "num_layers", "decoder_layers", "activation",
    "tie_embeddings", "relative_attention_num_buckets",
)  # fmt: skip
"""The settings in which two models must agree for their weights to be interchangeable."""


class StudentInit(NamedTuple):
    """The source of each parameter of a student, by name."""

    copied: tuple[str, ...]
    """Parameters that are copies of the teacher's parameter of the same name."""
    from_experts: Mapping[str, str]
    """The teacher's parameter that others are made from: stacked experts [E, ...], or a router [E, D]."""
    random_init: tuple[str, ...]
    """Parameters that are initialized at random."""


def differing_dimensions(student: ModelSpec, teacher: ModelSpec) -> list[tuple[str, object, object]]:
    """Return the key, the student's value and the teacher's value of each dimension in which they differ."""
    values = [(name, getattr(student, name), getattr(teacher, name)) for name in DIMENSIONS]
    return [(name, ours, theirs) for name, ours, theirs in values if ours != theirs]


def plan_init(student: SwitchTransformer, teacher: SwitchTransformer, settings: FromTeacherInit) -> StudentInit:
    """Return the source of each parameter, from names and shapes only; the models may be on `meta`."""
    teacher_shapes = {name: weight.shape for name, weight in teacher.named_parameters()}
    sparse_layers = [module for module in student.modules() if isinstance(module, SwitchLayer)]
    routed = {
        id(weight) for layer in sparse_layers for part in (layer.router, layer.experts) for weight in part.parameters()
    }
    copied, from_experts, random_init = [], {}, []
    for name, weight in student.named_parameters():
        source = name
        if name not in teacher_shapes:
            # A dense feed-forward where the teacher has experts: layer.wi.weight -> layer.experts.wi.
            source = re.sub(r"(\.layer)\.(wi|wi_gate|wo)\.weight$", r"\1.experts.\2", name)
        is_routed = id(weight) in routed
        # The first dim of stacked experts counts them; the others are the shape of one expert.
        expert_shape = weight.shape[1:] if is_routed else weight.shape
        fits_expert = ".experts." in source and teacher_shapes.get(source, ())[1:] == expert_shape
        if not is_routed and teacher_shapes.get(name) == weight.shape:
            copied.append(name)
        elif settings.experts != "random_init" and fits_expert:
            from_experts[name] = source
        else:
            random_init.append(name)
    if settings.experts == "most_used":
        # Stacked experts that the student takes over bring their rows of the router.
        stacks = [name for name in from_experts if ".experts." in name]
        routers = {f"{name.rpartition('.experts.')[0]}.router.weight" for name in stacks}
        random_init = [name for name in random_init if name not in routers]
        in_both = named_weights(student).keys() & named_weights(teacher).keys()
        biases = {name for name in in_both if name.endswith(".router.bias")}
        from_experts |= {name: name for name in sorted(routers | biases)}
    return StudentInit(tuple(copied), from_experts, tuple(random_init))


def init_weights(
    spec: ModelSpec,
    experts: range,
    plan: StudentInit,
    weight_of: Callable[[str], torch.Tensor],
    settings: FromTeacherInit,
    load: Mapping[str, torch.Tensor],
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of every weight that is not initialized at random.

    Args:
        spec: the student's.
        experts: the numbers of the student's experts that this process stores.
        plan: the source of each parameter.
        weight_of: returns a parameter of the teacher by name, with all experts stacked.
        settings: how experts are used.
        load: number of tokens that chose each expert, [E], by sparse layer; needed only for `most_used`.
    """
    for name in plan.copied:
        yield name, weight_of(name)
    for name, source in plan.from_experts.items():
        weight = weight_of(source)
        is_stacked = name == source  # the student has experts too; otherwise one dense feed-forward
        if settings.experts == "mean":
            mean = weight.mean(0)
            yield name, mean.expand(len(experts), *mean.shape) if is_stacked else mean
            continue
        num_used = spec.num_experts if is_stacked else 1
        # The most used experts, in ascending order of their numbers.
        used = load[sublayer_name(source)].argsort(descending=True, stable=True)[:num_used].sort().values
        selected = weight[used.to(weight.device)]
        if not is_stacked:
            selected = selected[0]
        elif ".experts." in name:
            selected = selected[experts.start : experts.stop]  # a router is complete in every process
        yield name, selected
