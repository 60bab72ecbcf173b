"""The rows of the tables against others: transformers in all its ways, and two packages with a Switch layer.

transformers accepts names of implementations that a model does not read. Such a row says so, and is not timed: it would
be the row `eager` again.
"""

import sys
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from contestants import Refused, Row
from machine import Job, sizes_of
from torch import nn

INSTALL = "pip install --no-deps switch-transformers st-moe-pytorch colt5-attention local-attention hyper-connections "
INSTALL += "einops beartype"
"""With their dependencies they would change torch's neighbors: zetascale, of switch-transformers, wants
transformers < 5."""

ATTENTION = ("eager", "sdpa", "flex_attention")
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm", "deepgemm", "sonicmoe")
"""All names that transformers has for the experts of any model. A test compares them with the installed version."""

THEIRS: Job = {"who": "transformers"}
AS_IT_COMES = Row("transformers, as it comes", {**THEIRS, "allocator": "default"})
OURS_COMPILED = Row("switchcli, compiled", {"who": "switchcli", "compile": True})


def with_attention(name: str, **changes: Any) -> Row:
    compiled = ", compiled" if changes.get("compile") else ""
    return Row(f"transformers, {name} attention{compiled}", {**THEIRS, "attention": name, **changes})


DENSE_STEP = (
    OURS_COMPILED,
    AS_IT_COMES,
    *(with_attention(name) for name in ATTENTION),
    *(with_attention(name, compile=True) for name in ("eager", "sdpa")),
)
SPARSE_EXPERTS = tuple(
    Row(f"transformers, {name} experts", {**THEIRS, "attention": "eager", "experts_implementation": name})
    for name in EXPERTS_IMPLEMENTATIONS
)
SPARSE_ATTENTION = tuple(with_attention(name) for name in ATTENTION[1:])
SPARSE_STEP = (
    OURS_COMPILED,
    AS_IT_COMES,
    *SPARSE_EXPERTS,
    *SPARSE_ATTENTION,
    with_attention("eager", compile=True),
)
DROPLESS: Job = {"capacity_factor": "dropless"}
LAYER = (
    Row("dense feed-forward", {"who": "dense"}),
    Row("padded batches", {"who": "padded"}),
    Row("one-hot products", {"who": "one-hot"}),
    Row("transformers", THEIRS),
    Row("transformers, compiled", {**THEIRS, "compile": True}),
    Row("switch-transformers", {"who": "switch-transformers"}, DROPLESS),
    Row("st-moe-pytorch", {"who": "st-moe-pytorch"}),
)
STATIC: Job = {**THEIRS, "cache": "static"}
DENSE_GENERATE = (
    AS_IT_COMES,
    *(with_attention(name) for name in ATTENTION),
    Row("transformers, sdpa attention, static cache", {**STATIC, "attention": "sdpa"}),
    Row("transformers, sdpa attention, static cache, compiled", {**STATIC, "attention": "sdpa", "compile": True}),
)
SPARSE_GENERATE = (
    AS_IT_COMES,
    *SPARSE_EXPERTS,
    *SPARSE_ATTENTION,
    Row("transformers, static cache", {**STATIC, "attention": "eager"}),
    Row("transformers, static cache, compiled", {**STATIC, "attention": "eager", "compile": True}),
)
ROWS = (*DENSE_STEP, *SPARSE_STEP, *LAYER, *DENSE_GENERATE, *SPARSE_GENERATE)


def chosen(rows: tuple[Row, ...], patterns: list[str]) -> list[Row]:
    """The rows that the patterns select, or all rows without a pattern.

    The whole name of a row selects that row alone. Any other pattern selects the rows that have it in their names.
    """
    names = {row.name for row in ROWS}

    def selects(pattern: str, name: str) -> bool:
        return pattern == name if pattern in names else pattern in name

    return [row for row in rows if not patterns or any(selects(pattern, row.name) for pattern in patterns)]


def implementations(job: Job) -> dict[str, str]:
    """Return the implementations that a job names, by the arguments of transformers' models."""
    names = {"attention": "attn_implementation", "experts_implementation": "experts_implementation"}
    return {argument: job[key] for key, argument in names.items() if key in job}


class Expert(nn.Module):
    """The paper's expert: two products without biases, and a ReLU."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.wi = nn.Linear(d_model, d_ff, bias=False)
        self.wo = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.wo(self.wi(x).relu())


def switch_transformers_layer(job: Job) -> nn.Module:
    """SwitchMoE of the package switch-transformers, with the paper's experts; its input is [tokens, d_model].

    It computes every expert on every token and multiplies by a gate that is 0 for all experts but one. It drops no
    token. The gate of a token is divided by the sum of its expert's gates over all tokens. The package takes its
    experts from zetascale, which cannot be installed next to transformers 5: here the name is given to our expert.
    """
    sizes = sizes_of(job)
    zeta, zeta_nn = ModuleType("zeta"), ModuleType("zeta.nn")
    zeta_nn.__dict__["FeedForward"] = lambda d_model, d_out, mult: Expert(d_model, sizes.d_ff)
    zeta_nn.__dict__["MultiQueryAttention"] = nn.Module
    try:
        with patch.dict(sys.modules, {"zeta": zeta, "zeta.nn": zeta_nn}):
            from switch_transformers import SwitchMoE
    except ImportError as error:
        raise Refused(f"not installed ({error}): {INSTALL}") from error
    return SwitchMoE(sizes.d_model, sizes.d_ff, sizes.d_model, job["experts"], capacity_factor=1.25)


def st_moe_layer(job: Job) -> nn.Module:
    """MoE of the package st-moe-pytorch with the paper's experts; a sequence is a group.

    It refuses one expert per token: two are chosen, and the second is taken with probability gate / threshold. With
    this threshold it never is. The gate of the first is divided by the sum of both. Tokens are sent by one-hot products
    into [experts, capacity], and capacity that nobody takes is computed too.
    """
    sizes = sizes_of(job)
    try:
        from st_moe_pytorch import MoE
    except ImportError as error:
        raise Refused(f"not installed ({error}): {INSTALL}") from error
    experts = nn.ModuleList(Expert(sizes.d_model, sizes.d_ff) for _ in range(job["experts"]))
    never = 1e30
    return MoE(sizes.d_model, job["experts"], threshold_train=never, capacity_factor_train=1.25, experts=experts)
