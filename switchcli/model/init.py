"""The initial weights of the model, all in one function.

Sources: paper section 2.4 and Table 3 for feed-forwards, experts and router; T5 for attention and embeddings.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from switchcli.model.config import ModelSpec
from switchcli.model.transformer import SwitchTransformer, named_weights


@torch.no_grad()
def initialize(model: SwitchTransformer, seed: int) -> None:
    """Fill every weight of a model that holds all its experts, in place, with `initial_weights`."""
    weights = named_weights(model)
    for name, weight in initial_weights(model.spec, seed, range(model.spec.num_experts)):
        weights[name].copy_(weight)


def initial_weights(spec: ModelSpec, seed: int, experts: range) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the name and initial value of every weight, in float32; stacks of experts hold only these `experts`.

    | weight                          | distribution                | standard deviation     |
    |---------------------------------|-----------------------------|------------------------|
    | embedding                       | normal                      | 1                      |
    | separate softmax matrix         | truncated normal            | sqrt(s / d_model)      |
    | attention q                     | normal                      | (d_model * d_kv)**-0.5 |
    | attention k, v                  | normal                      | d_model**-0.5          |
    | attention o                     | normal                      | (heads * d_kv)**-0.5   |
    | position bias                   | normal                      | d_model**-0.5          |
    | feed-forward and experts wi     | truncated normal            | sqrt(s / d_model)      |
    | feed-forward and experts wo     | truncated normal            | sqrt(s / d_ff)         |
    | router                          | truncated normal            | sqrt(s / d_model)      |
    | norm scale                      | 1                           | 0                      |
    | bias of a router's choices      | 0                           | 0                      |

    s is `init_scale` (0.1 in the paper); the truncation is at two standard deviations. Each tensor, and each expert's
    slice, is drawn from a generator of its own, keyed by the seed, the name and the expert's global number. The same
    seed thus gives the same model for any distribution of the experts over ranks.
    """
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in named_weights(SwitchTransformer(spec)).items()}
    normal_std = {
        "embedding": 1.0,
        "q.weight": (spec.d_model * spec.head_width) ** -0.5,
        "k.weight": spec.d_model**-0.5,
        "v.weight": spec.d_model**-0.5,
        "o.weight": (spec.num_heads * spec.head_width) ** -0.5,
        "position_bias.weight": spec.d_model**-0.5,
    }
    for name, shape in shapes.items():
        suffix = ".".join(name.split(".")[-2:])  # module and parameter: "q.weight"
        if suffix.endswith("norm.weight"):
            yield name, torch.ones(shape)
        elif suffix == "router.bias":
            yield name, torch.zeros(shape)
        elif ".experts." in name:
            stacked = torch.empty(len(experts), *shape[1:])  # shape[0] counts all experts of the layer
            for expert, weight in zip(experts, stacked, strict=True):
                truncated_normal(weight, spec.init_scale, keyed_generator(seed, f"{name}.{expert}"))
            yield name, stacked
        elif suffix in normal_std:
            yield name, torch.empty(shape).normal_(0.0, normal_std[suffix], generator=keyed_generator(seed, name))
        else:
            yield name, truncated_normal(torch.empty(shape), spec.init_scale, keyed_generator(seed, name))


def truncated_normal(weight: torch.Tensor, scale: float, generator: torch.Generator) -> torch.Tensor:
    """Fill a CPU weight [outputs, inputs] with N(0, sigma**2) within 2 sigma, where sigma = sqrt(scale / inputs)."""
    sigma = (scale / weight.shape[1]) ** 0.5
    return nn.init.trunc_normal_(weight, std=sigma, a=-2 * sigma, b=2 * sigma, generator=generator)


def keyed_generator(seed: int, name: str) -> torch.Generator:
    """Return a generator whose seed is a hash of `seed` and `name`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)  # 63 bits, a non-negative int64
