"""A whole training step against transformers' SwitchTransformers and T5 of the same shape, and its peak memory.

Dropout 0.1, jitter, the balance loss, the gradient's norm and the optimizer included. No token is dropped on either
side, so that the work is equal.
"""

import resource
import time
from itertools import pairwise

import torch
from machine import (
    BATCH,
    D_FF,
    D_MODEL,
    HEADS,
    SOURCE,
    TOKENS,
    VOCABULARY,
    Clock,
    Job,
    Result,
    batch,
    begin,
    plain,
    shape,
)

from switchcli.data.batch import Batch, BatchSource
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.signals import StopRequest
from switchcli.model.init import initialize
from switchcli.model.moe.router import SwitchRouter
from switchcli.model.transformer import SwitchTransformer
from switchcli.train.callbacks import Callback
from switchcli.train.config import TrainSpec
from switchcli.train.loop import fit
from switchcli.train.loss import FixedLoss, cross_entropy
from switchcli.train.microbatches import Microbatches
from switchcli.train.optimizers import Adafactor, AdamW
from switchcli.train.schedules import InverseSquareRoot
from switchcli.train.state import TrainState


def step(job: Job) -> Result:
    """Seconds of each of `rounds` steps after one uncounted, and the most memory that the process has had.

    Ours keeps freed memory on a CPU, as any run of it does; theirs has torch as it comes.
    """
    if job["who"] == "switchcli":
        context, clock = begin(job)
        seconds, device = our_steps(job, context, clock), context.device
    else:
        device = plain(job)
        seconds = their_steps(job, device, Clock(device))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds[1:], "peak": peak}


class OneBatch(BatchSource):
    """Source that returns an equal batch in every step."""

    def batch(self, step: int, first: int, count: int) -> Batch:
        return batch()


class Note(Callback):
    """Notes the time after every step, when the device is done."""

    def __init__(self, times: list[float], clock: Clock) -> None:
        super().__init__(1)
        self._times, self._clock = times, clock

    def __call__(self, state: TrainState) -> None:
        self._times.append(time.perf_counter() if self._clock(lambda: None) >= 0 else 0.0)


def our_steps(job: Job, context: DistributedContext, clock: Clock) -> list[float]:
    model = our_model(job, context.device)
    optimizer = {"adafactor": Adafactor(), "adamw": AdamW()}[job["optimizer"]].build(dict(model.named_parameters()))
    times = [time.perf_counter()]

    fit(
        TrainState(),
        context.wrap(model),
        FixedLoss(cross_entropy),
        Microbatches(OneBatch(), BATCH, None, 1, 0, 1),
        optimizer,
        InverseSquareRoot(learning_rate=1e-3),
        context,
        [Note(times, clock)],
        TrainSpec(steps=1 + job["rounds"], batch_tokens=TOKENS),
        StopRequest(),
    )
    return [after - before for before, after in pairwise(times)]


def our_model(job: Job, device: torch.device) -> SwitchTransformer:
    router = SwitchRouter(capacity_factor="dropless", group_sequences=1)
    with torch.device("meta"):
        model = SwitchTransformer(shape(job["experts"], num_layers=job["layers"], router=router))
    model = model.to_empty(device=device).train()
    initialize(model, 0)
    return model


def their_steps(job: Job, device: torch.device, clock: Clock) -> list[float]:
    """transformers' model and Adafactor (or torch's fused AdamW) in the plainest loop, the gradient's norm included."""
    import transformers

    keys = {
        "vocab_size": VOCABULARY,
        "d_model": D_MODEL,
        "d_ff": D_FF,
        "d_kv": D_MODEL // HEADS,
        "num_heads": HEADS,
        "num_layers": job["layers"],
        "num_decoder_layers": job["layers"],  # or SwitchTransformers take 12
        "dropout_rate": 0.1,
        "decoder_start_token_id": 0,
    }
    sparse = {"num_experts": job["experts"], "expert_capacity": SOURCE, "router_jitter_noise": 0.01}
    sparse |= {f"num_sparse_{stack}_layers": job["layers"] // 2 for stack in ("encoder", "decoder")}
    if job["experts"] == 1:
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**keys))
    else:
        config = transformers.SwitchTransformersConfig(**keys, **sparse)
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    model = model.to(device).train()
    parameters = list(model.parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name:  # saturated by its own initialisation: a router must not make the work uneven
                parameter.mul_(0.01)
    if job["optimizer"] == "adafactor":
        optimizer = transformers.Adafactor(parameters, lr=1e-3, scale_parameter=True, relative_step=False)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    inputs_BS, targets_BT = batch(device)
    routed = {"output_router_logits": True} if job["experts"] > 1 else {}

    def one() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=job["precision"] == "bfloat16"):
            loss = model(input_ids=inputs_BS, labels=targets_BT, **routed).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1e9)
        optimizer.step()
        optimizer.zero_grad()

    return [clock(one) for _ in range(1 + job["rounds"])]
