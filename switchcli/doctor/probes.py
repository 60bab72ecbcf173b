"""The probes: each tests one property of a model, and reports a measurement, a verdict and what to do.

Differences of logits are the largest absolute ones, in standard deviations of the logits. Thresholds are constants with
their reasons.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Literal, NamedTuple

import torch
import torch.nn.functional as F

from switchcli.doctor import texts
from switchcli.doctor.subject import ForwardTrace, ProbeText, Subject
from switchcli.metric_names import LOAD_ENTROPY, MAX_LOAD
from switchcli.model.moe.evenness import MORE_BALANCE, load_spread, variation
from switchcli.spec import PAD

Verdict = Literal["pass", "warn", "fail", "skip"]

EQUAL_LOGITS: Final = 1e-3
"""Difference below which logits are equal: rounding in float32 gives 1e-5, one token without its expert 1e-1."""
NO_GRADIENT: Final = 1e-6
"""Fraction of the gradient's norm below which a router has no gradient: gate / gate gives 1e-8, a raw gate 1e-3."""
EVEN_START: Final = 0.9
"""Entropy over log(E) above which an initial router is undecided. Logits with the paper's standard deviation sqrt(0.1)
give at least 0.96; those with standard deviation 1, the worse initialization of Table 3, at most 0.85."""
SATURATED_START: Final = 0.5
"""Entropy over log(E) below which an initial router has chosen before it has learned anything."""
CERTAIN: Final = 0.999
"""Mean top probability above which a trained router learns no more: its gradient falls with 1 - p."""
UNBALANCED: Final = 2.0
"""Load-balancing loss that is a warning: twice that of uniform routing. With two experts, for which 2 is collapse, the
limit is 1.5."""
COLLAPSED: Final = 0.8
"""Fraction of the way of the load-balancing loss from uniform routing (1) to one expert for all tokens (E)."""
HOT: Final = 4.0
"""Load of an expert that is too high, as a multiple of an even share; the paper's capacity factors end at 2."""
NO_ENTROPY: Final = 0.01
"""Entropy over log(E) up to which a router is certain of nearly every token. A top probability of 0.999, as in
`CERTAIN`, leaves 0.005 with 8 experts."""
NEARLY_ALL: Final = 0.9
"""Fraction of a layer's tokens that counts as all of them, as in the warning of training."""
DROPPED_WARNING: Final = 0.2
"""Fraction of dropped random tokens that is a warning, in training or evaluation. The paper drops less than 0.01 of
real tokens once a router is trained."""
DROPPED_FAILURE: Final = 0.5
"""Fraction of dropped random tokens that is a failure for initial weights."""


CHECK_ON_TEXT: Final = (
    "random ids are not text, on which a trained router may do well: `switchcli eval` measures balance and drops there"
)
"""The advice where a trained router does badly on the random ids of a probe."""


class Finding(NamedTuple):
    """The result of a probe, as in the JSON output: its field names are the keys."""

    verdict: Verdict
    measured: str
    value: float | None = None
    """The measurement as a number, if it is one."""
    advice: str = ""
    """What to do; empty for a pass."""
    probe: str = ""
    """The name of the probe, which `run_probes` fills in."""


def judged(verdict: Verdict, measured: str, value: float, advice: str) -> Finding:
    """Return a finding with `advice` for any verdict but a pass."""
    return Finding(verdict, measured, value, "" if verdict == "pass" else advice)


def weights(subject: Subject) -> Finding:
    """Find NaN and infinity in the weights."""
    bad = [name for name, weight in subject.parameters.items() if not weight.isfinite().all()]
    total = len(subject.parameters)
    if not bad:
        return Finding("pass", f"all {total} tensors finite", 0)
    measured = f"NaN or infinity in {len(bad)} of {total} tensors: {bad[0]}"
    return Finding("fail", measured, len(bad), "take an older checkpoint")


def router_gradient(subject: Subject) -> Finding:
    """Measure the cross-entropy's gradient at each router, which only the gate can carry."""
    with _gradients(subject, texts.short(subject)):
        total = _norm([weight.grad for weight in subject.parameters.values()]) or 1.0
        fractions = [_norm([weight.grad for weight in router.parameters()]) / total for router in subject.routers]
    smallest, layer = min(zip(fractions, subject.layers, strict=True))
    measured = f"{smallest:.1e} of the gradient's norm, at least ({layer})"
    advice = (
        "the router learns nothing from the loss: weight an expert's output by its raw probability, not renormalized"
    )
    return judged("pass" if smallest > NO_GRADIENT else "fail", measured, smallest, advice)


def router_precision(subject: Subject) -> Finding:
    """Find the dtype of the router's logits where everything else is bfloat16 (paper, section 2.4)."""
    text = texts.short(subject)
    traces = {
        "autocast": subject.forward(text, autocast=True),
        "weights loaded in bfloat16": subject.in_bfloat16().forward(text),
    }
    dtypes = {setting: {call.logits_GNE.dtype for call in trace.calls} for setting, trace in traces.items()}
    wrong = [setting for setting, dtypes_of_calls in dtypes.items() if dtypes_of_calls != {torch.float32}]
    if not wrong:
        return Finding("pass", "float32 under autocast and with weights in bfloat16", 0)
    names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes[wrong[0]]))
    measured = f"{names} under {' and '.join(wrong)}"
    return Finding("fail", measured, len(wrong), "run the router in float32 with autocast disabled")


def router_confidence(subject: Subject) -> Finding:
    """Measure how decided the routers are: an initial one should not be, a trained one may."""
    trace = subject.forward(texts.broad(subject))
    std = max(float(call.logits_GNE.float().std()) for call in trace.calls)
    top = max(float(stats.confidence / stats.tokens) for stats in trace.router_stats)
    entropy = min(float(stats.entropy / stats.tokens) for stats in trace.router_stats) / math.log(subject.num_experts)
    measured = (
        f"logits' std {std:.2g}, mean top probability {top:.3f}, entropy {entropy:.2f} of log E, in the surest layer"
    )
    if not subject.initialized:
        advice = "it is certain of every token and learns no more"
        return judged("warn" if top > CERTAIN else "pass", measured, top, advice)
    verdict: Verdict = "pass" if entropy >= EVEN_START else "warn" if entropy >= SATURATED_START else "fail"
    advice = "initialize it with std sqrt(0.1 / d_model), as the paper does: it has chosen before it has learned"
    return judged(verdict, measured, top, advice)


def router_balance(subject: Subject) -> Finding:
    """Measure E * sum f P of eq. 4 in each layer."""
    stats = subject.forward(texts.broad(subject)).router_stats
    losses = [float(layer_stats.load_balancing_loss) for layer_stats in stats]
    worst, layer = max(zip(losses, subject.layers, strict=True))
    E, measured = subject.num_experts, f"{worst:.2f} on random token ids, at most ({layer}); 1 is uniform"
    if (worst - 1) / (E - 1) >= COLLAPSED:
        return Finding("fail", measured, worst, f"the layer uses only one expert: {MORE_BALANCE}")
    advice = f"some experts do most of the work: {MORE_BALANCE}" if subject.initialized else CHECK_ON_TEXT
    return judged("warn" if worst >= min(UNBALANCED, (1 + E) / 2) else "pass", measured, worst, advice)


def experts_in_use(subject: Subject) -> Finding:
    """Find experts that no token chooses, and experts that many do.

    Initial routers are uneven by chance, the more so the more experts there are, so they get looser limits.
    """
    stats, E = subject.forward(texts.broad(subject)).router_stats, subject.num_experts
    total = E * len(stats)
    dead = sum(int((layer_stats.load_E == 0).sum()) for layer_stats in stats)
    # The largest load as a multiple of an even share, which is 1 / E of the load.
    highest = max(float(layer_stats.load_E.max() / layer_stats.load_E.sum()) * E for layer_stats in stats)
    measured = (
        f"{dead} of {total} experts without one of the random token ids, the highest load {highest:.1f} times an even "
        "share"
    )
    max_dead, max_load = (total / 2, NEARLY_ALL * E) if subject.initialized else (1, min(HOT, NEARLY_ALL * E))
    advice = f"{CHECK_ON_TEXT}; if they are so there, {MORE_BALANCE}"
    return judged("pass" if dead < max_dead and highest < max_load else "warn", measured, dead, advice)


def routing_of_text(subject: Subject) -> Finding:
    """Measure how even loads and probabilities are on text. Training and `eval` measure them on the model's own."""
    if subject.real_text is None:
        return Finding("skip", "no text in a vocabulary of the model")
    stats, E = subject.forward(subject.real_text).router_stats, subject.num_experts
    spread = load_spread(torch.stack([layer_stats.load_E for layer_stats in stats]))
    highest, worst = float(spread[MAX_LOAD].max()), int(spread[MAX_LOAD].argmax())
    # a, b and r of the load-balancing loss, in the layer with the highest load.
    a, b, r = (float(total_L[worst] / stats[worst].tokens) for total_L in variation(stats).values())
    load_entropy = float(spread[LOAD_ENTROPY].min()) / math.log(E)
    entropy = min(float(layer_stats.entropy / layer_stats.tokens) for layer_stats in stats) / math.log(E)
    measured = (
        f"highest load {highest:.1f} times an even share ({subject.layers[worst]}; a {a:.2f}, b {b:.2f}, r {r:.2f}), "
        f"entropy of loads {load_entropy:.2f} and of probabilities {entropy:.2f} of log E, at least"
    )
    is_sound = highest < min(HOT, NEARLY_ALL * E) and entropy > NO_ENTROPY
    advice = f"it is Python's documentation: if `switchcli eval` says so of your text, {MORE_BALANCE}"
    return judged("pass" if is_sound else "warn", measured, highest, advice)


def dropped_tokens(subject: Subject) -> Finding:
    """Measure the fraction of tokens that find no slot, in training and in evaluation."""
    text, fractions = texts.broad(subject), []
    for trace in (subject.forward(text, "training"), subject.forward(text, "paper")):
        dropped = sum(float(stats.dropped) for stats in trace.router_stats)
        fractions.append(dropped / sum(float(stats.tokens) for stats in trace.router_stats))
    measured = f"{fractions[0]:.1%} of random token ids in training, {fractions[1]:.1%} in evaluation"
    worst = max(fractions)
    if not subject.initialized:  # the tokens are random: of text like its training text the model may drop few
        return judged("pass" if worst < DROPPED_WARNING else "warn", measured, worst, CHECK_ON_TEXT)
    verdict: Verdict = "pass" if worst < DROPPED_WARNING else "warn" if worst < DROPPED_FAILURE else "fail"
    return judged(verdict, measured, worst, "raise the capacity, or balance the routers")


def padding(subject: Subject) -> Finding:
    """Compare padding on the left, on the right, and none. Outputs must be equal, also when capacity is exceeded."""
    plain = texts.crowded_source(subject)
    left = plain._replace(inputs_BS=F.pad(plain.inputs_BS, (texts.SHORT, 0), value=PAD))
    right = plain._replace(inputs_BS=F.pad(plain.inputs_BS, (0, texts.SHORT), value=PAD))
    # With a capacity, only the sides are compared: a capacity that depends on the length grows with padding.
    limited = [subject.forward(text, "paper") for text in (left, right)]
    dropless = [subject.forward(text, "dropless").logits_BTV for text in (plain, left, right)]
    worst = max(
        _difference(limited[0].logits_BTV, limited[1].logits_BTV),
        *(_difference(dropless[0], padded) for padded in dropless[1:]),
    )
    dropped = [_max_dropped(trace, subject, "encoder") for trace in limited]
    measured = f"logits change by {worst:.1e}; {dropped[0]} inputs dropped padded left, {dropped[1]} right"
    advice = "padding takes the slots of tokens: mask it before capacity, or pad on the right only"
    return judged("pass" if worst <= EQUAL_LOGITS else "fail", measured, worst, advice)


def batch_neighbors(subject: Subject) -> Finding:
    """Compare a sequence alone with the same in a batch of others whose tokens choose the same expert."""
    text = texts.crowded_rows(subject)
    dropless, paper = (
        _difference(subject.forward(texts.alone(text), mode).logits_BTV[-1], subject.forward(text, mode).logits_BTV[-1])
        for mode in ("dropless", "paper")
    )
    measured = f"logits change by {dropless:.1e}" + _with_paper_capacity(subject, paper)
    verdict: Verdict = "fail"
    advice = "a sequence's output depends on the others in its batch: route without capacity"
    if subject.experts_choose:
        verdict, advice = "warn", "experts choose within a group: evaluate with group_sequences: 1"
    return judged("pass" if dropless <= EQUAL_LOGITS else verdict, measured, dropless, advice)


def cached_decoding(subject: Subject) -> Finding:
    """Compare decoding token by token with teacher forcing, on targets that exceed the capacity of one expert."""
    text = texts.crowded_target(subject)
    dropless, paper = (
        _difference(subject.forward(text, mode).logits_BTV, subject.decode(text, mode))
        for mode in ("dropless", "paper")
    )
    dropped = _max_dropped(subject.forward(text, "paper"), subject, "decoder")
    measured = (
        f"logits differ by {dropless:.1e}"
        + _with_paper_capacity(subject, paper)
        + f"; {dropped} targets dropped with teacher forcing"
    )
    advice = "a single step never exceeds capacity: evaluate with a slot for every token, as in decoding"
    return judged("pass" if dropless <= EQUAL_LOGITS else "fail", measured, dropless, advice)


def clean_inputs(subject: Subject) -> Finding:
    """Find out whether a router changes its input in training: noise belongs on its own copy (Appendix C)."""
    calls = subject.forward(texts.short(subject), "training").calls
    changes = []
    for call in calls:
        change_GND = (call.input_after_GND - call.input_before_GND).abs()
        changes.append(float((change_GND / call.input_before_GND.abs().clamp(min=1e-6)).max()))
    worst = max(changes)
    if worst == 0:
        return Finding("pass", "the router leaves its input unchanged", 0)
    measured = f"the router changes its input in place, by up to {worst:.1%}"
    return Finding("fail", measured, worst, "the experts see the noise too: perturb a copy, or train with jitter 0")


def idle_gradients(subject: Subject) -> Finding:
    """Find weights without a gradient when most experts have no token."""
    with _gradients(subject, texts.one_token(subject)):
        missing = [name for name, weight in subject.parameters.items() if weight.requires_grad and weight.grad is None]
    measured = f"{len(missing)} of {len(subject.parameters)} tensors without one"
    if not missing:
        return Finding("pass", measured, 0)
    advice = f"DistributedDataParallel fails without them: set find_unused_parameters=True ({missing[0]}, ...)"
    return Finding("warn", measured, len(missing), advice)


def balance_loss(subject: Subject) -> Finding:
    """Find out whether the loss of training includes the load-balancing loss."""
    if subject.balance_coef is None:
        return Finding("pass", "none: routing is balanced by construction, or by biases")
    if subject.balance_coef == 0:
        return Finding("warn", "the settings give it a coefficient of 0", 0.0, "the paper's is 0.01")
    loss = subject.loss(texts.short(subject))
    # The loss of a layer is about 1 or more, so the coefficient is about the minimum of its term.
    if loss.auxiliary >= subject.balance_coef / 2:
        return Finding("pass", f"{loss.auxiliary:.4f} added to the cross-entropy", loss.auxiliary)
    return Finding("fail", "none", loss.auxiliary, "add it in the training loop")


class Probe(NamedTuple):
    """A probe and its name in the output."""

    name: str
    run: Callable[[Subject], Finding]
    needs_routers: bool = True
    """Whether it is skipped for a dense model."""


PROBES: Final = (
    Probe("finite weights", weights, needs_routers=False),
    Probe("router gradient", router_gradient),
    Probe("router precision", router_precision),
    Probe("router confidence", router_confidence),
    Probe("router balance", router_balance),
    Probe("experts in use", experts_in_use),
    Probe("routing of text", routing_of_text),
    Probe("dropped tokens", dropped_tokens),
    Probe("padding", padding, needs_routers=False),
    Probe("batch independence", batch_neighbors, needs_routers=False),
    Probe("cached decoding", cached_decoding, needs_routers=False),
    Probe("clean experts' input", clean_inputs),
    Probe("gradient of idle experts", idle_gradients, needs_routers=False),
    Probe("balance in the loss", balance_loss),
)


def run_probes(subject: Subject) -> Iterator[Finding]:
    """Yield the findings of all probes, in order; they are equal in every run."""
    weights_failed = False
    for probe in PROBES:
        if weights_failed:
            result = Finding("skip", "the weights are not finite")
        elif subject.dense and probe.needs_routers:
            result = Finding("skip", "a dense model has no router")
        else:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                result = probe.run(subject)
        weights_failed = weights_failed or (probe.run is weights and result.verdict == "fail")
        # JSON has no NaN and infinity.
        value = result.value if result.value is not None and math.isfinite(result.value) else None
        yield result._replace(value=value, probe=probe.name)


@contextmanager
def _gradients(subject: Subject, text: ProbeText) -> Iterator[None]:
    """Compute the gradient of the cross-entropy of `text` at every weight, and remove it at the end of the context."""
    subject.model.zero_grad()
    torch.autograd.backward(subject.loss(text).cross_entropy)
    try:
        yield
    finally:
        subject.model.zero_grad()


def _norm(gradients: list[torch.Tensor | None]) -> float:
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients if gradient is not None))


def _difference(logits: torch.Tensor, other: torch.Tensor) -> float:
    return float((logits - other).abs().max() / logits.std().clamp(min=1e-12))


def _max_dropped(trace: ForwardTrace, subject: Subject, stack: str) -> int:
    """Return the number of dropped tokens in the layer of the stack that drops most."""
    layers = zip(subject.layers, trace.router_stats, strict=True)
    return max((int(stats.dropped) for name, stats in layers if name.startswith(stack)), default=0)


def _with_paper_capacity(subject: Subject, difference: float) -> str:
    """Return the difference under the policy `paper` for display, if it is another one than `dropless`."""
    return f" ({difference:.1e} with the paper's capacity)" if subject.layers else ""
