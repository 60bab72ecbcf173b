"""Initialization of a student from its teacher's weights (section 4.2): which weights fit, and what replaces experts.

Everything but experts and routers is copied by name: attention, norms, embeddings, dense feed-forwards. Where the
teacher has experts, the paper's student is initialized at random. Beyond the paper, it may use the mean of the experts,
the one with the most tokens, or several side by side in one wider feed-forward (`concat`, arXiv 2605.28207). The
experts of a sparse student can be initialized likewise: each from the mean, or from the most used experts with their
rows of the router.

# Deviates: the caption of Table 6 says that the baseline without distillation starts from expert weights; its row says
non-expert, which is what a dense model can use.

Legend: E experts of the teacher, F hidden units, D model.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F

from switchcli.model.config import ModelSpec
from switchcli.model.init import keyed_generator, truncated_normal
from switchcli.model.moe.layer import SwitchLayer, observing, sparse_layers, sublayer_name
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
    widened: tuple[str, ...] = ()
    """With `concat`: parameters of a wider dense feed-forward that begins with the teacher's. Its other hidden units
    have initial weights, and add nothing to the output yet."""
    shared: Mapping[str, str] = MappingProxyType({})
    """With `concat`: the teacher's parameter beside the experts of `from_experts` (`shared_d_ff`)."""


class ExpertUse(NamedTuple):
    """How a teacher uses its experts on held-out text, by sparse layer."""

    load: Mapping[str, torch.Tensor]
    """Number of tokens that chose each expert, [E]."""
    gate: Mapping[str, torch.Tensor]
    """Mean factor of each expert's outputs over its tokens, [E]; 0 without tokens. Needed only for `concat`."""


@contextmanager
def gate_sums(model: SwitchTransformer) -> Iterator[dict[str, torch.Tensor]]:
    """Sum gates over the forward passes within the context: float64 [2, E], by sparse layer.

    Row 0 is the sum of the factors of an expert's outputs, over the tokens in its slots; row 1 is their number.
    """
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, layer: SwitchLayer, x_BSD: torch.Tensor, real_BS: torch.Tensor) -> None:
        x_GND, routing = layer.route(x_BSD, real_BS)
        filled_GEC = routing.token_GEC < x_GND.shape[1]  # an empty slot has token N
        both = torch.stack([routing.weight_GEC.double().sum((0, 2)), filled_GEC.double().sum((0, 2))])
        sums[name] = both + sums.get(name, 0.0)

    with observing(model, add):
        yield sums


def num_joined(student: ModelSpec, teacher: ModelSpec) -> tuple[int, int]:
    """Return how many experts of the teacher fit side by side into a feed-forward of the student, and what remains.

    Both are counted beside the teacher's dense path, if it has one; what remains are hidden units.
    """
    return divmod(student.d_ff - teacher.shared_d_ff, teacher.expert_width)


def differing_dimensions(student: ModelSpec, teacher: ModelSpec) -> list[tuple[str, object, object]]:
    """Return the key, the student's value and the teacher's value of each dimension in which they differ."""
    values = [(name, getattr(student, name), getattr(teacher, name)) for name in DIMENSIONS]
    return [(name, ours, theirs) for name, ours, theirs in values if ours != theirs]


def plan_init(student: SwitchTransformer, teacher: SwitchTransformer, settings: FromTeacherInit) -> StudentInit:
    """Return the source of each parameter, from names and shapes only; the models may be on `meta`."""
    teacher_shapes = {name: weight.shape for name, weight in teacher.named_parameters()}
    parts = (part for layer in sparse_layers(student).values() for part in (layer.router, layer.experts))
    routed = {id(weight) for part in parts for weight in part.parameters()}
    joins = settings.experts == "concat"
    copied, from_experts, random_init, widened = [], {}, [], []
    shared: dict[str, str] = {}
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
        elif joins and ".experts." in source and source in teacher_shapes:
            from_experts[name] = source
            beside = f"{source.replace('.experts.', '.shared.')}.weight"
            shared |= {name: beside} if beside in teacher_shapes else {}
        elif joins and name in teacher_shapes and ".layer.w" in name and student.spec.d_ff > teacher.spec.d_ff:
            widened.append(name)
        elif settings.experts in ("mean", "most_used") and fits_expert:
            from_experts[name] = source
        else:
            random_init.append(name)
    if settings.experts == "most_used":
        # Stacked experts that the student takes over bring their rows of the router.
        stacks = [name for name in from_experts if ".experts." in name]
        routers = {f"{name.rpartition('.experts.')[0]}.router.weight" for name in stacks}
        random_init = [name for name in random_init if name not in routers]
        biases = {f"{router.removesuffix('.weight')}.bias" for router in routers}
        biases &= named_weights(student).keys() & named_weights(teacher).keys()
        from_experts |= {name: name for name in sorted(routers | biases)}
    return StudentInit(tuple(copied), from_experts, tuple(random_init), tuple(widened), shared)


def init_weights(
    spec: ModelSpec,
    experts: range,
    plan: StudentInit,
    weight_of: Callable[[str], torch.Tensor],
    settings: FromTeacherInit,
    use: ExpertUse,
    seed: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and value of every weight that is not initialized at random.

    Args:
        spec: the student's.
        experts: the numbers of the student's experts that this process stores.
        plan: the source of each parameter.
        weight_of: returns a parameter of the teacher by name, with all experts stacked.
        settings: how experts are used.
        use: of the teacher's experts; needed only for `most_used` and `concat`.
        seed: that of the initial weights of a wider dense feed-forward.
    """
    for name in plan.copied:
        yield name, weight_of(name)
    for name in plan.widened:
        weight = weight_of(name)
        if name.endswith(".wo.weight"):
            yield name, F.pad(weight, (0, spec.d_ff - weight.shape[1]))
        else:
            wide_FD = torch.empty(spec.d_ff, spec.d_model)
            truncated_normal(wide_FD, spec.init_scale, keyed_generator(seed, name))[: len(weight)] = weight
            yield name, wide_FD
    for name, source in plan.from_experts.items():
        weight, layer = weight_of(source), sublayer_name(source)
        is_stacked = name == source  # the student has experts too; otherwise one dense feed-forward
        if settings.experts == "mean":
            mean = weight.mean(0)
            yield name, mean.expand(len(experts), *mean.shape) if is_stacked else mean
            continue
        if settings.experts == "concat":
            beside = [weight_of(plan.shared[name])] if name in plan.shared else []
            hidden_dim = 1 if name.endswith(".wo.weight") else 0  # wi [F, D], wo [D, F]
            num_used = (spec.d_ff - sum(part.shape[hidden_dim] for part in beside)) // weight.shape[1 + hidden_dim]
            used = _most_used(use.load[layer], num_used)
            selected = weight[used.to(weight.device)]
            if hidden_dim == 1:
                selected = selected * use.gate[layer][used].to(selected)[:, None, None]
            yield name, torch.cat([*beside, *selected], hidden_dim)
            continue
        used = _most_used(use.load[layer], spec.num_experts if is_stacked else 1)
        selected = weight[used.to(weight.device)]
        if not is_stacked:
            selected = selected[0]
        elif ".experts." in name:
            selected = selected[experts.start : experts.stop]  # a router is complete in every process
        yield name, selected


def _most_used(load_E: torch.Tensor, count: int) -> torch.Tensor:
    """Return the numbers of the experts with the largest load, in ascending order."""
    return load_E.argsort(descending=True, stable=True)[:count].sort().values
