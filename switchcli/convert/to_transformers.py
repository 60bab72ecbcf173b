"""Our model in transformers' words: the config.json that computes the same, what cannot be said, what is lost.

Refused is what computes something else for any input: another router, other sparse layers. Warned of is what only
trains otherwise, or drops other tokens where a queue overflows.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from switchcli.convert.config import Config, StackLengths, SwitchConfig, T5Config, sparse_blocks, sparse_step
from switchcli.convert.weight_names import EMBEDDINGS, transformers_names
from switchcli.errors import CheckpointError
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.moe.router import Mode, RouterSpec, SwitchRouter
from switchcli.spec import PAD

_MODES: tuple[Mode, Mode] = ("training", "paper")


def transformers_config(
    spec: ModelSpec, lengths: StackLengths, where: Path, router_dtype: torch.dtype = torch.float32
) -> tuple[Config, list[str]]:
    """The configuration of our model, and what transformers will do otherwise, a line each.

    Raises:
        CheckpointError: transformers has no such model.
    """
    shape: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "d_model": spec.d_model,
        "d_kv": spec.head_width,
        "d_ff": spec.d_ff,
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "num_decoder_layers": spec.decoder_layers,
        "relative_attention_num_buckets": spec.relative_attention_num_buckets,
        "relative_attention_max_distance": spec.relative_attention_max_distance,
        "dropout_rate": spec.dropout,
        "layer_norm_epsilon": spec.layer_norm_epsilon,
        "tie_word_embeddings": spec.tie_embeddings,
        "decoder_start_token_id": PAD,
    }
    stacks = [stack for stack in STACKS if spec.sparse_layers(stack)]
    if not stacks:
        gated = spec.activation == "geglu"
        return T5Config(**shape, feed_forward_proj="gated-gelu" if gated else "relu"), []
    if router_dtype != torch.float32:
        raise CheckpointError(f"{where}: its routers are in bfloat16, where transformers' would choose other experts")
    if reason := _impossible(spec, stacks):
        raise CheckpointError(f"{where}: {reason}: transformers has no such model; switchcli's own layout keeps it")
    routers = {stack: _switch(spec.router_of(stack)) for stack in stacks}
    first = routers[stacks[0]]
    length = {stack: getattr(lengths, stack) for stack in stacks}
    capacity = max(
        max(router.capacity(length[stack], spec.num_experts, "paper"), router.min_capacity)
        for stack, router in routers.items()
    )
    steps: dict[str, Any] = {}
    for stack in STACKS:
        number = _number(spec.sparse_layers(stack), spec.num_blocks(stack))
        assert number is not None
        steps |= {
            f"num_sparse_{stack}_layers": number,
            f"{stack}_sparse_step": sparse_step(spec.num_blocks(stack), number),
        }
    config = SwitchConfig(
        **shape,
        **steps,
        num_experts=spec.num_experts,
        expert_capacity=capacity,
        router_jitter_noise=first.jitter,
        router_z_loss_coef=first.z_loss_coef,
        router_aux_loss_coef=first.balance_loss_coef,
    )
    return config, [*_other_drops(spec, routers, length, capacity), *_other_training(spec, routers)]


def rename_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors, each expert's its own, under transformers' names."""
    their_name = transformers_names(config.model_type, config.gated)
    theirs = {their_name(name): tensor for name, tensor in tensors.items()}
    if isinstance(config, SwitchConfig) and not config.tie_word_embeddings:
        # Its stacks look up matrices of their own then. Copies, for safetensors refuses two names of one memory.
        theirs |= {name: tensors["embedding"].clone() for name in EMBEDDINGS[1:]}
    return theirs


def _number(layers: tuple[int, ...], blocks: int) -> int | None:
    """The num_sparse_*_layers that gives these blocks; None when none does. More than there are blocks gives none."""
    numbers = sorted(range(blocks + 2), key=lambda number: abs(number - len(layers)))
    return next((number for number in numbers if sparse_blocks(blocks, sparse_step(blocks, number)) == layers), None)


def _switch(router: RouterSpec) -> SwitchRouter:
    """The router as the one that transformers has; `_impossible` has refused the others."""
    assert router.is_in_transformers
    return cast("SwitchRouter", router)


def _impossible(spec: ModelSpec, stacks: list[Stack]) -> str | None:
    """Why transformers has no such sparse model."""
    for stack in stacks:
        if not (router := spec.router_of(stack)).is_in_transformers:
            return f"the {stack}'s router is of kind {router.kind}, where transformers has switch alone"
    if spec.sparse != "feed_forward":
        return f"sparse ({spec.sparse}) routes attention, where transformers routes feed-forwards alone"
    if spec.activation != "relu":
        return f"activation ({spec.activation}) of {spec.num_experts} experts, where transformers' experts have relu"
    for stack in STACKS:
        layers, blocks = spec.sparse_layers(stack), spec.num_blocks(stack)
        if _number(layers, blocks) is None:
            layouts = dict.fromkeys(sparse_blocks(blocks, sparse_step(blocks, number)) for number in range(blocks + 2))
            choices = " or ".join(str(list(layout)) for layout in layouts)
            return f"the sparse blocks of the {stack} are {list(layers)}, where transformers can have {choices}"
    return None


def _other_drops(
    spec: ModelSpec, routers: Mapping[Stack, SwitchRouter], length: Mapping[Stack, int], capacity: int
) -> Iterator[str]:
    """How tokens are dropped here and not there."""
    experts = spec.num_experts
    for stack, router in routers.items():
        if router.overflow != "position":
            yield f"overflow ({router.overflow}) of the {stack}'s router: transformers' is position"
        if router.group_sequences > 1:
            yield (
                f"the {stack}'s router.group_sequences ({router.group_sequences}) share a capacity here; transformers "
                "counts it in each sequence"
            )
            continue
        training, evaluation = (router.capacity(length[stack], experts, mode) for mode in _MODES)
        if any(
            router.capacity(tokens, experts, mode) != min(tokens, capacity)
            for tokens in range(1, length[stack] + 1)
            for mode in _MODES
        ):
            yield (
                f"an expert of the {stack} has {training} slots in training and {evaluation} in evaluation for "
                f"{length[stack]} tokens, fewer for fewer; transformers has expert_capacity ({capacity}) for any number"
            )


def _other_training(spec: ModelSpec, routers: Mapping[Stack, SwitchRouter]) -> Iterator[str]:
    """What transformers would train otherwise."""
    first = next(iter(routers.values()))
    if spec.balance_reduction != "pooled":
        yield f"balance_reduction ({spec.balance_reduction}): transformers pools the layers of a stack (training alone)"
    differ = any(router != first for router in routers.values())
    distinct = (
        {f"the {stack}'s router": router for stack, router in routers.items()} if differ else {"the router": first}
    )
    for which, router in distinct.items():
        unsaid = [name for name in ("input_dropout", "sample_temperature") if getattr(router, name) not in (0.0, None)]
        if unsaid:
            yield f"{' and '.join(unsaid)} of {which}: transformers has no such noise (training alone)"
        if (router.jitter, router.balance_loss_coef, router.z_loss_coef) != (
            first.jitter,
            first.balance_loss_coef,
            first.z_loss_coef,
        ):
            yield "jitter or coefficients of the decoder's router alone: transformers has one set (training alone)"
    full = [stack for stack in routers if len(spec.sparse_layers(stack)) == spec.num_blocks(stack)]
    if lost := [stack for stack in full if routers[stack].balance_loss_coef or routers[stack].z_loss_coef]:
        yield (
            f"every block of the {' and the '.join(lost)} is sparse: transformers then leaves the balance and z-loss "
            "of its routers out (training alone)"
        )
    if spec.experts_dropout != spec.dropout:
        yield f"expert_dropout ({spec.experts_dropout}): transformers takes dropout ({spec.dropout}) (training alone)"
