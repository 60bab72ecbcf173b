"""The probes: each asks a model one question, and says what it found, whether that is sound, and what to do.

Legend: G groups, N tokens a group, E experts.

Differences of logits are the largest, in standard deviations of the logits. Thresholds stand above with their reasons.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F

from switchcli.doctor import texts
from switchcli.doctor.subject import ForwardTrace, ProbeText, Subject
from switchcli.spec import PAD

Verdict = Literal["pass", "warn", "fail", "skip"]

SAME: Final = 1e-3
"""Logits that differ by less are equal: float32 gives 1e-5, one token with or without its expert 1e-1."""
NO_GRADIENT: Final = 1e-6
"""A router's share of the gradient's norm below which there is none: gate / gate leaves 1e-8, a raw gate 1e-3."""
EVEN_START: Final = 0.9
"""Entropy as a share of log(E) above which an initial router is undecided. Logits of the paper's standard deviation
sqrt(0.1) give 0.96 and more; those of 1, Table 3's worse arm, up to 0.85."""
SATURATED_START: Final = 0.5
"""Below this share an initial router has chosen before it has learnt anything."""
CERTAIN: Final = 0.999
"""A mean top probability above which a trained router learns no more: its gradient falls with 1 - p."""
UNBALANCED: Final = 2.0
"""Twice the balance loss of uniform routing, or half way to collapse where there are but two experts."""
COLLAPSED: Final = 0.8
"""So much of the way from uniform (1) to one expert for all (E)."""
HOT: Final = 4.0
"""An expert with so many even shares of the tokens; the paper's capacity factors end at 2."""
ALL: Final = 0.9
"""A share of a layer's tokens that is as good as all: the alarm of training has the same."""
MANY_DROPPED: Final = 0.2
"""Of drawn tokens, in training or evaluation; the paper sees less than 0.01 of real ones once a router is trained."""
MOST_DROPPED: Final = 0.5


class ProbeResult(NamedTuple):
    """What a probe found; `value` is the figure as a number where it is one."""

    verdict: Verdict
    figure: str
    value: float | None = None
    advice: str = ""


class Finding(NamedTuple):
    """An answer under the name of its probe."""

    probe: str
    verdict: Verdict
    figure: str
    value: float | None
    advice: str


def weights(subject: Subject) -> ProbeResult:
    """NaN or infinity among the weights."""
    bad = [name for name, weight in subject.parameters.items() if not weight.isfinite().all()]
    of = len(subject.parameters)
    if not bad:
        return ProbeResult("pass", f"all {of} tensors finite", 0)
    return ProbeResult(
        "fail", f"NaN or infinity in {len(bad)} of {of} tensors: {bad[0]}", len(bad), "take an older checkpoint"
    )


def router_gradient(subject: Subject) -> ProbeResult:
    """The cross-entropy's gradient at each router, which can come by the gate alone."""
    with _gradients(subject, texts.short(subject)):
        whole = _norm([weight.grad for weight in subject.parameters.values()]) or 1.0
        shares = [_norm([weight.grad for weight in router.parameters()]) / whole for router in subject.routers]
    least, layer = min(zip(shares, subject.layers, strict=True))
    figure = f"{least:.1e} of the gradient's norm, at least ({layer})"
    if least > NO_GRADIENT:
        return ProbeResult("pass", figure, least)
    advice = (
        "the router learns nothing from the loss: weigh an expert's output by its raw probability, not renormalised"
    )
    return ProbeResult("fail", figure, least, advice)


def router_precision(subject: Subject) -> ProbeResult:
    """The precision in which logits of the router come, where all else is bfloat16 (paper, section 2.4)."""
    text = texts.short(subject)
    found = {
        "autocast": subject.forward(text, autocast=True),
        "weights loaded in bfloat16": subject.in_bfloat16().forward(text),
    }
    dtypes = {way: {call.logits_GNE.dtype for call in seen.calls} for way, seen in found.items()}
    wrong = [way for way, seen in dtypes.items() if seen != {torch.float32}]
    if not wrong:
        return ProbeResult("pass", "float32 under autocast and with weights in bfloat16", 0)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes[wrong[0]]))
    return ProbeResult(
        "fail", f"{names} under {' and '.join(wrong)}", len(wrong), "run the router in float32 with autocast disabled"
    )


def router_confidence(subject: Subject) -> ProbeResult:
    """How decided the routers are: a fresh one should not be, a trained one may."""
    seen = subject.forward(texts.broad(subject))
    std = max(float(call.logits_GNE.float().std()) for call in seen.calls)
    top = max(float(report.confidence / report.tokens) for report in seen.router_stats)
    entropy = min(float(report.entropy / report.tokens) for report in seen.router_stats) / math.log(subject.num_experts)
    figure = (
        f"logits' std {std:.2g}, mean top probability {top:.3f}, entropy {entropy:.2f} of log E, in the surest layer"
    )
    if not subject.initialised:
        verdict: Verdict = "warn" if top > CERTAIN else "pass"
        return ProbeResult(
            verdict, figure, top, "it is certain of every token and learns no more" if top > CERTAIN else ""
        )
    if entropy >= EVEN_START:
        return ProbeResult("pass", figure, top)
    advice = "initialise it with std sqrt(0.1 / d_model), as the paper does: it has chosen before it has learnt"
    return ProbeResult("fail" if entropy < SATURATED_START else "warn", figure, top, advice)


def router_balance(subject: Subject) -> ProbeResult:
    """E * sum f P of eq. 4, layer by layer."""
    reports = subject.forward(texts.broad(subject)).router_stats
    worst, layer = max(
        (float(report.load_balancing_loss), name) for report, name in zip(reports, subject.layers, strict=True)
    )
    E, figure = subject.num_experts, f"{worst:.2f}, at most ({layer}); 1 is uniform"
    if (worst - 1) / (E - 1) >= COLLAPSED:
        return ProbeResult(
            "fail", figure, worst, "one expert has become the layer: train with a higher balance_loss_coef"
        )
    if worst >= min(UNBALANCED, (1 + E) / 2):
        return ProbeResult("warn", figure, worst, "some experts do most of the work: raise balance_loss_coef")
    return ProbeResult("pass", figure, worst)


def experts_in_use(subject: Subject) -> ProbeResult:
    """Experts that no token chooses, and those that many do; initial ones are uneven by chance, the more the more."""
    text = texts.broad(subject)
    reports, E = subject.forward(text).router_stats, subject.num_experts
    dead = sum(int((report.load_E == 0).sum()) for report in reports)
    hottest = max(float(report.load_E.max() / report.load_E.sum()) * E for report in reports)
    figure = f"{dead} of {E * len(reports)} experts without a token, the hottest with {hottest:.1f} even shares"
    many_dead, hot = (E * len(reports) / 2, ALL * E) if subject.initialised else (1, min(HOT, ALL * E))
    if dead < many_dead and hottest < hot:
        return ProbeResult("pass", figure, dead)
    advice = "look again on real text (`pretrain` logs each layer's load); raise balance_loss_coef"
    return ProbeResult("warn", figure, dead, advice)


def dropped_tokens(subject: Subject) -> ProbeResult:
    """The share of tokens that find no slot, in training and in evaluation."""
    text, rates = texts.broad(subject), []
    for seen in (subject.forward(text, "training"), subject.forward(text, "paper")):
        dropped = sum(float(report.dropped) for report in seen.router_stats)
        rates.append(dropped / sum(float(report.tokens) for report in seen.router_stats))
    figure = f"{rates[0]:.1%} in training, {rates[1]:.1%} in evaluation"
    worst = max(rates)
    if worst < MANY_DROPPED:
        return ProbeResult("pass", figure, worst)
    if not subject.initialised:  # the tokens are drawn: of text that the model knows it may drop few
        return ProbeResult(
            "warn", figure, worst, "look again on real text (`pretrain` logs each layer's dropped share)"
        )
    return ProbeResult(
        "fail" if worst >= MOST_DROPPED else "warn", figure, worst, "raise the capacity, or balance the routers"
    )


def padding(subject: Subject) -> ProbeResult:
    """Padding on the left, on the right, and none: the answers must be the same, also when queues are full."""
    plain = texts.crowded_source(subject)
    pads = min(texts.LONGEST, max(texts.SHORT, subject.slots or 0))
    left = plain._replace(inputs_BS=F.pad(plain.inputs_BS, (pads, 0), value=PAD))
    right = plain._replace(inputs_BS=F.pad(plain.inputs_BS, (0, pads), value=PAD))
    # A capacity that follows the length grows with padding: there only the sides can be compared while it counts.
    full = [subject.forward(text, "paper") for text in (left, right)]
    free = [subject.forward(text, "dropless").logits_BTV for text in (plain, left, right)]
    worst = max(
        _difference(full[0].logits_BTV, full[1].logits_BTV), *(_difference(free[0], other) for other in free[1:])
    )
    lost = [_dropped(seen, subject, "encoder") for seen in full]
    figure = f"logits change by {worst:.1e}; {lost[0]} inputs dropped padded left, {lost[1]} right"
    if worst <= SAME:
        return ProbeResult("pass", figure, worst)
    return ProbeResult(
        "fail", figure, worst, "padding takes the slots of tokens: mask it before capacity, or pad on the right only"
    )


def batch_neighbours(subject: Subject) -> ProbeResult:
    """A sequence alone, and in a batch with others that want the same expert."""
    text = texts.crowded_rows(subject)
    free, paper = (
        _difference(subject.forward(texts.alone(text), mode).logits_BTV[-1], subject.forward(text, mode).logits_BTV[-1])
        for mode in ("dropless", "paper")
    )
    figure = f"logits change by {free:.1e}" + _by_the_paper(subject, paper)
    if free <= SAME:
        return ProbeResult("pass", figure, free)
    if subject.balance_coef is None:
        return ProbeResult("warn", figure, free, "experts choose within a group: evaluate with group_sequences: 1")
    return ProbeResult(
        "fail", figure, free, "what a sequence gets depends on the others in its batch: route without capacity"
    )


def cached_decoding(subject: Subject) -> ProbeResult:
    """Token by token from the cache against all at once, on targets that crowd at one expert."""
    text = texts.crowded_target(subject)
    free, paper = (
        _difference(subject.forward(text, mode).logits_BTV, subject.decode(text, mode))
        for mode in ("dropless", "paper")
    )
    lost = _dropped(subject.forward(text, "paper"), subject, "decoder")
    figure = (
        f"logits differ by {free:.1e}" + _by_the_paper(subject, paper) + f"; {lost} targets dropped when all at once"
    )
    if free <= SAME:
        return ProbeResult("pass", figure, free)
    return ProbeResult(
        "fail",
        figure,
        free,
        "a step alone never fills a queue: evaluate with a capacity for every token, as in decoding",
    )


def clean_inputs(subject: Subject) -> ProbeResult:
    """Whether a router leaves its input as it is in training: noise is for its own copy (Appendix C)."""
    calls = subject.forward(texts.short(subject), "training").calls
    worst = max(
        float(((call.left_GND - call.given_GND).abs() / call.given_GND.abs().clamp(min=1e-6)).max()) for call in calls
    )
    if worst == 0:
        return ProbeResult("pass", "the router leaves its input as it is", 0)
    figure = f"the router changes its input in place, by up to {worst:.1%}"
    return ProbeResult("fail", figure, worst, "the experts see the noise too: perturb a copy, or train with jitter 0")


def idle_gradients(subject: Subject) -> ProbeResult:
    """Weights without a gradient when most experts have no token."""
    with _gradients(subject, texts.one_token(subject)):
        missing = [name for name, weight in subject.parameters.items() if weight.requires_grad and weight.grad is None]
    figure = f"{len(missing)} of {len(subject.parameters)} tensors without one"
    if not missing:
        return ProbeResult("pass", figure, 0)
    return ProbeResult(
        "warn",
        figure,
        len(missing),
        f"DistributedDataParallel stops there: find_unused_parameters=True ({missing[0]}, ...)",
    )


def balance_loss(subject: Subject) -> ProbeResult:
    """Whether the balance loss is in what training minimises."""
    if subject.balance_coef is None:
        return ProbeResult("pass", "none: routing is balanced by construction")
    if subject.balance_coef == 0:
        return ProbeResult("warn", "the settings give it a coefficient of 0", 0.0, "the paper's is 0.01")
    loss = subject.loss(texts.short(subject))
    # A layer's balance is about 1 and more, so that its term is about the coefficient and more.
    if loss.auxiliary >= subject.balance_coef / 2:
        return ProbeResult("pass", f"{loss.auxiliary:.4f} added to the cross-entropy", loss.auxiliary)
    if loss.auxiliary_asked < subject.balance_coef / 2:
        return ProbeResult("fail", "none, even when asked for", loss.auxiliary, "add it in the training loop")
    figure = f"none, unless the caller asks for it ({loss.auxiliary_asked:.4f} then)"
    advice = "pass output_router_logits=True to every forward in training: the configuration's flags do nothing"
    return ProbeResult("fail", figure, loss.auxiliary, advice)


class Probe(NamedTuple):
    name: str
    ask: Callable[[Subject], ProbeResult]
    of_routers: bool = True
    """Makes no sense of a dense model."""


PROBES: Final = (
    Probe("finite weights", weights, of_routers=False),
    Probe("router gradient", router_gradient),
    Probe("router precision", router_precision),
    Probe("router confidence", router_confidence),
    Probe("router balance", router_balance),
    Probe("experts in use", experts_in_use),
    Probe("dropped tokens", dropped_tokens),
    Probe("padding", padding, of_routers=False),
    Probe("batch neighbours", batch_neighbours, of_routers=False),
    Probe("cached decoding", cached_decoding, of_routers=False),
    Probe("clean experts' input", clean_inputs),
    Probe("gradient of idle experts", idle_gradients, of_routers=False),
    Probe("balance in the loss", balance_loss),
)


def run_probes(subject: Subject) -> Iterator[Finding]:
    """The findings of all probes, in order; the same each time."""
    broken = False
    for name, ask, of_routers in PROBES:
        if broken:
            answer = ProbeResult("skip", "the weights are not finite")
        elif subject.dense and of_routers:
            answer = ProbeResult("skip", "a dense model has no router")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                answer = ask(subject)
        broken = broken or (ask is weights and answer.verdict == "fail")
        value = answer.value if answer.value is not None and math.isfinite(answer.value) else None
        yield Finding(name, answer.verdict, answer.figure, value, answer.advice)


@contextmanager
def _gradients(subject: Subject, text: ProbeText) -> Iterator[None]:
    """Within, the weights hold the gradient of the cross-entropy of `text`; afterwards none."""
    subject.model.zero_grad()
    torch.autograd.backward(subject.loss(text).cross_entropy)
    try:
        yield
    finally:
        subject.model.zero_grad()


def _norm(gradients: list[torch.Tensor | None]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None))


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.std().clamp(min=1e-12))


def _dropped(seen: ForwardTrace, subject: Subject, stack: str) -> int:
    """Tokens without a slot in a layer of the stack, in the layer that drops most."""
    layers = zip(subject.layers, seen.router_stats, strict=True)
    return max((int(report.dropped) for name, report in layers if name.startswith(stack)), default=0)


def _by_the_paper(subject: Subject, difference: float) -> str:
    return f" ({difference:.1e} by the paper's capacity)" if subject.layers and subject.slots is None else ""
