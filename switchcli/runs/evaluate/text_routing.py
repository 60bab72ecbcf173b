"""Route texts: which experts each token of a text goes to, in each sparse layer of the encoder."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from switchcli.analysis.routing_counts import ExpertChoices, StackTokens, observe
from switchcli.data.batch import Batch
from switchcli.errors import CheckpointError, DataError
from switchcli.model.moe.router import Policy, RouterSpec
from switchcli.runs.evaluate.text_generation import InputEncoder
from switchcli.runs.inputs.loading import LoadedModel
from switchcli.spec import EOS, PAD
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import one_line


@dataclass(frozen=True)
class LayerRouting:
    """The routing decisions of one sparse layer: one entry for each token, in order."""

    experts: tuple[tuple[int, ...], ...]
    """The numbers of the experts that each token is sent to, the most probable first. A Switch router chooses one."""
    probabilities: tuple[tuple[float, ...], ...]
    """The router's probability of each of these experts."""
    dropped: tuple[bool, ...]
    """Whether each token found no free slot at any of its experts, so that no expert computes it."""


@dataclass(frozen=True)
class TextRouting:
    """The routing of one text. `print` shows it as a table with a row for each token."""

    text: str
    """The text as it was given."""
    tokens: tuple[str, ...]
    """The pieces of the text, and `</s>` at its end."""
    layers: Mapping[str, LayerRouting]
    """The routing of each sparse layer of the encoder, by the layer's module name, in the order of the layers."""

    def __str__(self) -> str:
        """Return a table of the experts that each token is sent to; `x` marks a dropped token."""
        columns = [["token", *map(one_line, self.tokens)]]
        for name, layer in self.layers.items():
            experts = [",".join(map(str, numbers)) or "-" for numbers in layer.experts]
            cells = [cell + " x" * dropped for cell, dropped in zip(experts, layer.dropped, strict=True)]
            stack, _, block, sublayer = name.split(".")  # such as encoder.blocks.1.feed_forward
            columns.append([f"{stack} {block}{' attention' if sublayer == 'self_attention' else ''}", *cells])
        widths = [max(map(len, column)) for column in columns]
        rows = zip(*columns, strict=True)
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def route_texts(model: LoadedModel, texts: Iterable[str], policy: Policy, console: Console) -> list[TextRouting]:
    """Return the routing of each text, which is routed by itself and not together with the others.

    Raises:
        CheckpointError: the encoder of the model has no sparse layer.
        DataError: a text is blank or not UTF-8.
    """
    if not model.handle.spec.sparse_layers("encoder"):
        raise CheckpointError(
            f"{model.handle.path}: its encoder has no sparse layer, so no token is routed: load another one"
        )
    encode = InputEncoder(model, console)
    routings = [_route(model, text, policy, encode) for text in texts]
    encode.sum_up()
    return routings


def _route(model: LoadedModel, text: str, policy: Policy, encode: InputEncoder) -> TextRouting:
    """Return the routing of one text."""
    inputs_1S = encode([text])
    if not text.strip():
        raise DataError(f"text {encode.num_texts} is blank: no token of it could be routed")
    # Routers may count capacity over several sequences: the others of the group are padding, which takes no slot.
    num_rows = model.handle.spec.group_sequences
    inputs_BS = torch.nn.functional.pad(inputs_1S, (0, 0, 0, num_rows - 1), value=PAD)
    targets_B1 = inputs_BS.new_full((num_rows, 1), EOS)  # the forward pass needs some; the encoder ignores them
    layers: dict[str, LayerRouting] = {}

    def on_layer(name: str, tokens: StackTokens, choices: ExpertChoices) -> None:
        if name.startswith("encoder"):
            layers[name] = _layer_routing(choices)

    policy = _of_one_row(policy, model.handle.spec.router_of("encoder"))
    observe(model.model, Batch(inputs_BS, targets_B1), None, policy, on_layer)
    return TextRouting(text, tuple(model.handle.tokenizer.pieces(inputs_1S[0].tolist())), layers)


def _of_one_row(policy: Policy, router: RouterSpec) -> Policy:
    """Return the policy by which one row of a group has the slots that it would have as a group by itself.

    Eq. 3 counts the rows of padding too. Experts that choose their tokens count the real ones.
    """
    factor = router.eval_capacity_factor if policy == "paper" else policy
    return policy if factor == "dropless" or router.experts_choose else factor / router.group_sequences


def _layer_routing(choices: ExpertChoices) -> LayerRouting:
    experts: list[tuple[int, ...]] = []
    probabilities: list[tuple[float, ...]] = []
    rows = zip(choices.probability_AE.tolist(), choices.chosen_AE.tolist(), strict=True)
    for probability_E, chosen_E in rows:
        chosen = [expert for expert, is_chosen in enumerate(chosen_E) if is_chosen]
        chosen.sort(key=lambda expert: -probability_E[expert])  # stable: of equal ones the lower number comes first
        experts.append(tuple(chosen))
        probabilities.append(tuple(probability_E[expert] for expert in chosen))
    return LayerRouting(tuple(experts), tuple(probabilities), tuple((~choices.in_slot_AE.any(1)).tolist()))
