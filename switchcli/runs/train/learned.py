"""The summary at the end of a run on text: guesses at hidden tokens, and the tokens that each expert takes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from switchcli.analysis.guesses import GuessedToken, Guesses, measure_guesses, text_of, visible_tokens
from switchcli.analysis.routing_counts import LayerCounts, count_routing
from switchcli.analysis.specialization import mutual_information, top_tokens
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.metric_names import layer_title
from switchcli.model.moe.router import Policy
from switchcli.model.transformer import SwitchTransformer
from switchcli.terminal.console import Console
from switchcli.terminal.table import Table
from switchcli.terminal.units import percent
from switchcli.training.validation import HeldOutText, rank_batches

MAX_ROWS = 256
"""Rows of the first held-out text that are looked at. They take a few seconds even on a CPU."""
_CONTEXT_CHARACTERS = 24
_TOKENS_SHOWN = 7
_EXPERTS_SHOWN = 16


class ExpertTokens(NamedTuple):
    """The tokens that an expert takes more often than others do. Written to JSON."""

    share: float
    """The expert's fraction of all choices of the layer."""
    tokens: list[str]
    """Highest lift first: the token's share at this expert over its share at all experts."""


class LayerExperts(NamedTuple):
    """The experts of the sparse layer in which the token says most about the expert. Written to JSON."""

    layer: str
    information: float
    """The mutual information of token and expert, in nats."""
    experts: tuple[ExpertTokens, ...]

    def to_json(self) -> dict[str, Any]:
        return {**self._asdict(), "experts": [expert._asdict() for expert in self.experts]}


class Learned(NamedTuple):
    """The guesses of a model on the first rows of a text, and the tokens of its experts."""

    rows: int
    guesses: Guesses | None
    experts: LayerExperts | None
    """None for a dense model."""

    def to_json(self) -> dict[str, Any]:
        """Return the keys of result.json."""
        return {
            "rows": self.rows,
            "guesses": self.guesses and self.guesses.to_json(),
            "experts": self.experts and self.experts.to_json(),
        }


def measure(
    model: SwitchTransformer,
    text: HeldOutText,
    rows_each: int,
    policy: Policy,
    tokenizer: Tokenizer,
    context: DistributedContext,
) -> Learned:
    """Return the summary of a model on the first rows of a text. Collective: all ranks take the same rows."""
    few_rows = text._replace(num_rows=min(text.num_rows, MAX_ROWS))
    batches = rank_batches(few_rows, rows_each, 0, 1)
    with context.eager():
        guesses = measure_guesses(model, batches, text.is_packed, policy, tokenizer, context)
        experts = None
        if model.spec.sparse_layer_names():
            counts = count_routing(model, batches, text.is_packed, context, policy)
            experts = _most_specialized(counts, tokenizer, model.spec.vocab_size)
    return Learned(few_rows.num_rows, guesses, experts)


def _most_specialized(layers: Mapping[str, LayerCounts], tokenizer: Tokenizer, vocab_size: int) -> LayerExperts:
    """Return the tokens of each expert of the layer in which the token says most about the expert."""
    information = {name: mutual_information(counts.tokens.cpu()) for name, counts in layers.items()}
    name = max(information, key=information.__getitem__)
    counts = layers[name].cpu()
    is_visible_V = visible_tokens(tokenizer, vocab_size)
    num_choices = max(1, int(counts.chosen_E.sum()))
    experts = []
    for chosen, top in zip(counts.chosen_E.tolist(), top_tokens(counts.tokens), strict=True):
        ids = [int(token["id"]) for token in top.by_lift if is_visible_V[int(token["id"])]]
        pieces = [text_of(piece) for piece in tokenizer.pieces(ids)]
        experts.append(ExpertTokens(chosen / num_choices, [*dict.fromkeys(pieces)]))
    return LayerExperts(name, information[name], tuple(experts))


def show(learned: Learned, console: Console) -> None:
    """Print examples of guesses, their accuracy, and the tokens of the experts."""
    if learned.guesses is not None:
        _show_guesses(learned.guesses, learned.rows, console)
    if learned.experts is not None:
        _show_experts(learned.experts, console)


def _show_guesses(guesses: Guesses, rows: int, console: Console) -> None:
    title = "held-out text: the token in brackets is hidden, and these are the model's guesses"
    examples = []
    for example in guesses.examples:
        marked = [
            f"[{guess}]" if guess == example.hidden else guess for guess in example.guesses
        ]  # the right one in brackets
        examples.append((_in_context(example), "  ".join(marked)))
    console.show(Table(("text", "guesses, the most probable first"), examples, title, align="left"))
    accuracies = [
        ("first guess", percent(guesses.first), percent(guesses.most_frequent)),
        ("one of five guesses", percent(guesses.first_five), percent(guesses.five_most_frequent)),
    ]
    note = f"{guesses.tokens:,} hidden tokens of {rows:,} held-out rows; blanks do not count"
    columns = ("", "the model", "always the most frequent")
    console.show(Table(columns, accuracies, "hidden tokens guessed right", note))


def _in_context(example: GuessedToken) -> str:
    """Return the hidden token in brackets, between the ends of the text around it."""
    before, after = (" ".join(text.split()) for text in (example.before, example.after))
    left_blank = " " if example.before[-1:].isspace() else ""
    right_blank = " " if example.after[:1].isspace() else ""
    left = before[-_CONTEXT_CHARACTERS:].lstrip() + left_blank
    return f"{left}[{example.hidden}]{right_blank}{after[:_CONTEXT_CHARACTERS].rstrip()}"


def _show_experts(layer: LayerExperts, console: Console) -> None:
    rows = [
        (str(number), f"{expert.share:.0%}", "  ".join(expert.tokens[:_TOKENS_SHOWN]) or "-")
        for number, expert in enumerate(layer.experts[:_EXPERTS_SHOWN])
    ]
    if len(layer.experts) > _EXPERTS_SHOWN:
        rows.append(("...", "", f"and {len(layer.experts) - _EXPERTS_SHOWN} more in result.json"))
    title = f"tokens each expert specializes in: {layer_title(layer.layer)}"
    note = "shown: the layer whose routing depends most on the token"
    console.show(Table(("expert", "of all tokens", "tokens"), rows, title, note, align="left"))
