"""Express our model as a config.json of transformers, and say what differs.

A model that would compute something else there for any input is refused: another router, other sparse layers. A
difference that concerns only training, or only which tokens are dropped when an expert overflows, is a warning.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from switchcli.convert.config import Config, StackLengths, SwitchConfig, T5Config, sparse_blocks, sparse_step
from switchcli.convert.weight_files import EMBEDDINGS, transformers_names
from switchcli.errors import CheckpointError
from switchcli.model.config import STACKS, ModelSpec, Stack
from switchcli.model.moe.router import Mode, SwitchRouter
from switchcli.spec import PAD

_MODES: tuple[Mode, Mode] = ("training", "paper")


def transformers_config(
    spec: ModelSpec, lengths: StackLengths, path: Path, router_dtype: torch.dtype = torch.float32
) -> tuple[Config, list[str]]:
    """Return the configuration of our model, and one line for each thing that transformers does differently.

    `lengths` are those of the longest sequences in tokens. `path` names the checkpoint in messages.

    Raises:
        CheckpointError: transformers has no such model.
    """
    common: dict[str, Any] = {
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
    if not spec.sparse_stacks:
        return T5Config(**common, feed_forward_proj="gated-gelu" if spec.activation == "geglu" else "relu"), []
    if router_dtype != torch.float32:
        raise CheckpointError(f"{path}: its routers are in bfloat16, where transformers' would select other experts")
    if reason := _unsupported(spec):
        raise CheckpointError(f"{path}: {reason}: transformers has no such model; switchcli's own layout keeps it")
    # `_unsupported` has refused all other routers.
    routers = {stack: cast("SwitchRouter", spec.router_of(stack)) for stack in spec.sparse_stacks}
    # transformers has one capacity for both stacks: the larger of their capacities in evaluation.
    capacity = max(
        max(router.capacity(getattr(lengths, stack), spec.num_experts, "paper"), router.min_capacity)
        for stack, router in routers.items()
    )
    sparse: dict[str, Any] = {}
    for stack in STACKS:
        num_sparse = _num_sparse_layers(spec.sparse_layers(stack), spec.num_blocks(stack))
        assert num_sparse is not None
        sparse[f"num_sparse_{stack}_layers"] = num_sparse
        sparse[f"{stack}_sparse_step"] = sparse_step(spec.num_blocks(stack), num_sparse)
    first = routers[spec.sparse_stacks[0]]
    config = SwitchConfig(
        **common,
        **sparse,
        num_experts=spec.num_experts,
        expert_capacity=capacity,
        router_jitter_noise=first.jitter,
        router_z_loss_coef=first.z_loss_coef,
        router_aux_loss_coef=first.balance_coef,
    )
    return config, [*_drop_differences(spec, routers, lengths, capacity), *_training_differences(spec, routers)]


def rename_tensors(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return our tensors, split into experts, under their names in transformers."""
    their_name = transformers_names(config.model_type, config.gated)
    renamed = {their_name(name): tensor for name, tensor in tensors.items()}
    if isinstance(config, SwitchConfig) and not config.tie_word_embeddings:
        # Each stack then has a matrix of its own. They are copies: safetensors refuses two names of the same memory.
        renamed |= {name: tensors["embedding"].clone() for name in EMBEDDINGS[1:]}
    return renamed


def _num_sparse_layers(layers: tuple[int, ...], num_blocks: int) -> int | None:
    """Return the num_sparse_*_layers for which transformers makes exactly `layers` sparse, or None.

    `num_blocks + 1` is a candidate too: it makes none sparse. The candidate nearest to the number of layers is chosen.
    """
    candidates = sorted(range(num_blocks + 2), key=lambda number: abs(number - len(layers)))
    matching = (number for number in candidates if sparse_blocks(num_blocks, sparse_step(num_blocks, number)) == layers)
    return next(matching, None)


def _unsupported(spec: ModelSpec) -> str | None:
    """Return why transformers has no such sparse model, or None if it has."""
    for stack in spec.sparse_stacks:
        router = spec.router_of(stack)
        if key := router.key_unlike_transformers():
            return f"the {stack}'s router has {key}: {getattr(router, key)}, where transformers has only the paper's"
    if keys := spec.uncommon_experts():
        return f"{keys}, where transformers' experts are feed-forwards of d_ff ({spec.d_ff}) hidden units, alone"
    if spec.sparse != "feed_forward":
        return f"sparse ({spec.sparse}) routes attention, where transformers routes only feed-forwards"
    if spec.activation != "relu":
        return f"activation ({spec.activation}) of {spec.num_experts} experts, where transformers' experts have relu"
    for stack in STACKS:
        layers, num_blocks = spec.sparse_layers(stack), spec.num_blocks(stack)
        if _num_sparse_layers(layers, num_blocks) is None:
            steps = (sparse_step(num_blocks, number) for number in range(num_blocks + 2))
            possible = dict.fromkeys(sparse_blocks(num_blocks, step) for step in steps)
            choices = " or ".join(str(list(blocks)) for blocks in possible)
            return f"the sparse blocks of the {stack} are {list(layers)}, where transformers can have {choices}"
    return None


def _drop_differences(
    spec: ModelSpec, routers: Mapping[Stack, SwitchRouter], lengths: StackLengths, expert_capacity: int
) -> Iterator[str]:
    """Yield a line for each difference in the tokens that are dropped."""
    experts = spec.num_experts
    for stack, router in routers.items():
        max_length = getattr(lengths, stack)
        if router.overflow != "position":
            yield f"overflow ({router.overflow}) of the {stack}'s router: transformers' is position"
        if router.group_sequences > 1:
            yield (
                f"the {stack}'s router.group_sequences ({router.group_sequences}) share a capacity here; transformers "
                "counts it in each sequence"
            )
            continue
        training, evaluation = (router.capacity(max_length, experts, mode) for mode in _MODES)
        # Both drop the same tokens if the capacity here is expert_capacity, or the length where that is less.
        if any(
            router.capacity(length, experts, mode) != min(length, expert_capacity)
            for length in range(1, max_length + 1)
            for mode in _MODES
        ):
            yield (
                f"an expert of the {stack} has {training} slots in training and {evaluation} in evaluation for "
                f"{max_length} tokens, fewer for fewer; transformers has expert_capacity ({expert_capacity}) for any "
                "number"
            )


def _training_differences(spec: ModelSpec, routers: Mapping[Stack, SwitchRouter]) -> Iterator[str]:
    """Yield a line for each difference that concerns training alone."""
    first = next(iter(routers.values()))
    if spec.balance_reduction != "pooled":
        yield f"balance_reduction ({spec.balance_reduction}): transformers pools the layers of a stack (training alone)"
    labeled = {"the router": first}
    if any(router != first for router in routers.values()):
        labeled = {f"the {stack}'s router": router for stack, router in routers.items()}
    for label, router in labeled.items():
        noise = [name for name in ("input_dropout", "sample_temperature") if getattr(router, name) not in (0.0, None)]
        if noise:
            yield f"{' and '.join(noise)} of {label}: transformers has no such noise (training alone)"
        if (router.jitter, router.balance_coef, router.z_loss_coef) != (
            first.jitter,
            first.balance_coef,
            first.z_loss_coef,
        ):
            yield "jitter or coefficients of the decoder's router alone: transformers has one set (training alone)"
    fully_sparse = [stack for stack in routers if len(spec.sparse_layers(stack)) == spec.num_blocks(stack)]
    if without_loss := [stack for stack in fully_sparse if routers[stack].balance_coef or routers[stack].z_loss_coef]:
        yield (
            f"every block of the {' and the '.join(without_loss)} is sparse: transformers then leaves the balance and "
            "z-loss of its routers out (training alone)"
        )
    if spec.experts_dropout != spec.dropout:
        yield f"expert_dropout ({spec.experts_dropout}): transformers takes dropout ({spec.dropout}) (training alone)"
