"""The models of the benchmark and one training step of each: this project's, and transformers' of the same sizes."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from contestants import Refused
from torch import nn

from switchcli.data.batch import Batch
from switchcli.distributed.context import DistributedContext
from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer
from switchcli.training.loop import accumulate_gradients
from switchcli.training.loss import Objective, cross_entropy
from switchcli.training.microbatches import Microbatch, RealTokens
from switchcli.training.optimizer_specs import Adafactor

NO_CAPACITY_LIMIT = 10**9


def without_values(spec: ModelSpec, device: torch.device, dtype: torch.dtype = torch.float32) -> SwitchTransformer:
    """Return a model in training mode whose weights have no values yet."""
    with torch.device("meta"):
        model = SwitchTransformer(spec).to(dtype)
    return model.to_empty(device=device).train()


def microbatch_of(batch: Batch) -> Microbatch:
    return Microbatch(0, batch, RealTokens.of(batch))


class OurStep:
    """A training step of this project: forward, backward, the gradient's norm, Adafactor."""

    def __init__(
        self, model: SwitchTransformer, context: DistributedContext, objective: Objective = cross_entropy
    ) -> None:
        self.optimizer = Adafactor().build(dict(model.named_parameters()))
        self._model, self._context, self._objective = context.wrap(model), context, objective

    def __call__(self, microbatch: Microbatch) -> torch.Tensor:
        """Train on one microbatch of each rank, and return the gradient's norm."""
        of_all_ranks = RealTokens(*(count * self._context.world for count in microbatch.real))
        accumulate_gradients(self._model, self._objective, [microbatch], of_all_ranks, self._context, "0")
        norm = self._context.gradient_norm(self.optimizer.parameters, self.optimizer.layouts).total
        self.optimizer.step(1e-3)
        self.optimizer.zero_grad()
        return norm


def their_model(
    spec: ModelSpec, implementations: Mapping[str, str] | None = None, capacity: int = NO_CAPACITY_LIMIT
) -> Any:
    """Return transformers' T5 or SwitchTransformers of the same sizes, on the current default device.

    Args:
        spec: the model.
        implementations: `attn_implementation` and `experts_implementation`, by transformers' names.
        capacity: the most tokens that an expert takes of a sequence.

    Raises:
        Refused: the model takes the name of an implementation and does not read it.
    """
    import transformers

    chosen = dict(implementations or {})
    keys: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "d_model": spec.d_model,
        "d_ff": spec.d_ff,
        "d_kv": spec.head_width,
        "num_heads": spec.num_heads,
        "num_layers": spec.num_layers,
        "num_decoder_layers": spec.decoder_layers,  # or SwitchTransformers take 12
        "dropout_rate": spec.dropout,
        "decoder_start_token_id": 0,
        "tie_word_embeddings": spec.tie_embeddings,
    }
    if spec.num_experts == 1:
        gated = "gated-gelu" if spec.activation == "geglu" else "relu"
        config = transformers.T5Config(**keys, feed_forward_proj=gated)
        return transformers.T5ForConditionalGeneration._from_config(config, **chosen)
    config = transformers.SwitchTransformersConfig(
        **keys,
        num_experts=spec.num_experts,
        num_sparse_encoder_layers=len(spec.sparse_layers("encoder")),
        num_sparse_decoder_layers=len(spec.sparse_layers("decoder")),
        expert_capacity=capacity,
        router_jitter_noise=0.01,
    )
    model = transformers.SwitchTransformersForConditionalGeneration._from_config(config, **chosen)
    if chosen.get("experts_implementation", "eager") != "eager" and not model._can_set_experts_implementation():
        raise Refused("accepted, but the model does not read it: its experts are the loop of `eager`")
    return model


def their_step(model: Any, optimizer: torch.optim.Optimizer, is_bfloat16: bool) -> Callable[[Batch], None]:
    """Return a training step of transformers' model in the plainest loop, the gradient's norm included."""
    parameters = list(model.parameters())
    device = parameters[0].device
    is_sparse = model.config.model_type == "switch_transformers"
    routed = {"output_router_logits": True} if is_sparse else {}  # the balance loss is part of the loss

    def step(batch: Batch) -> None:
        inputs_BS, targets_BT = (ids.to(device, non_blocking=True) for ids in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16):
            loss = model(input_ids=inputs_BS, labels=targets_BT, **routed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_layer(d_model: int, d_ff: int, experts: int, capacity: int) -> nn.Module:
    """Return transformers' Switch layer without dropout and jitter; an expert takes `capacity` tokens of a sequence."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

    config = SwitchTransformersConfig(
        d_model=d_model,
        d_ff=d_ff,
        num_experts=experts,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        expert_capacity=capacity,
    )
    return SwitchTransformersSparseMLP(config)
