"""The initial weights of the whole model, in one function.

Paper section 2.4 and Table 3 for feed-forwards, experts and router; T5 for attention and embeddings.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer


@torch.no_grad()
def initialize(model: SwitchTransformer, seed: int) -> None:
    """Fill every weight of a whole model, in place, with `initial_weights`."""
    named = dict(model.named_parameters())
    for name, drawn in initial_weights(model.spec, seed, range(model.spec.num_experts)):
        named[name].copy_(drawn)


def initial_weights(spec: ModelSpec, seed: int, experts: range) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a model by its name, one after another, float32; of each stack these experts.

    | weight                          | distribution                | standard deviation     |
    |---------------------------------|-----------------------------|------------------------|
    | embedding                       | normal                      | 1                      |
    | softmax matrix of its own       | truncated normal            | sqrt(s / d_model)      |
    | attention q                     | normal                      | (d_model * d_kv)**-0.5 |
    | attention k, v                  | normal                      | d_model**-0.5          |
    | attention o                     | normal                      | (heads * d_kv)**-0.5   |
    | position bias                   | normal                      | d_model**-0.5          |
    | feed-forward and experts wi     | truncated normal            | sqrt(s / d_model)      |
    | feed-forward and experts wo     | truncated normal            | sqrt(s / d_ff)         |
    | router                          | truncated normal            | sqrt(s / d_model)      |
    | norm scale                      | 1                           | 0                      |

    s is `init_scale` (0.1 in the paper); the truncation is at two standard deviations. Each tensor, and each expert's
    slice, is drawn from a generator of its own, keyed by the seed, the name and the expert's number: the same seed
    gives the same model however its experts are spread.
    """
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in SwitchTransformer(spec).named_parameters()}
    normal = {
        "embedding": 1.0,
        "q.weight": (spec.d_model * spec.head_width) ** -0.5,
        "k.weight": spec.d_model**-0.5,
        "v.weight": spec.d_model**-0.5,
        "o.weight": (spec.num_heads * spec.head_width) ** -0.5,
        "position_bias.weight": spec.d_model**-0.5,
    }
    for name, shape in shapes.items():
        suffix = ".".join(name.split(".")[-2:])
        if suffix.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif ".experts." in name:
            drawn = torch.empty(len(experts), *shape[1:])
            for expert, weight in zip(experts, drawn, strict=True):
                truncated_normal(weight, spec.init_scale, keyed_generator(seed, f"{name}.{expert}"))
            yield name, drawn
        elif suffix in normal:
            yield name, torch.empty(shape).normal_(0.0, normal[suffix], generator=keyed_generator(seed, name))
        else:
            yield name, truncated_normal(torch.empty(shape), spec.init_scale, keyed_generator(seed, name))


def truncated_normal(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Fill a weight [outputs, inputs] on the CPU; sigma = sqrt(scale / inputs), redrawn beyond 2 sigma."""
    sigma = (scale / weight.shape[1]) ** 0.5
    return nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def keyed_generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
