"""A Hugging Face folder as a subject, in transformers' own code: that is what whoever loads the folder runs.

Legend: B batch, S positions, T target, V vocabulary, G groups, N tokens a group, E experts, K choices of a token.

The only file that imports transformers, and late: nothing else needs it.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final, Self

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from switchcli.convert import config as configs
from switchcli.doctor.subject import (
    ForwardTrace,
    ProbeText,
    Subject,
    TrainingLoss,
    check_memory,
    precision,
    record_router_calls,
    training_mode,
)
from switchcli.errors import CheckpointError, RecipeError
from switchcli.model.moe.router import Mode
from switchcli.model.moe.stats import RouterStats, choice_fraction, count_per_group, router_stats
from switchcli.spec import PAD

LOGITS: Final = 2
"""Where transformers' router has the logits in its answer; first come the choices, one-hot, none where dropped."""


class TransformersSubject(Subject):
    """A `SwitchTransformersForConditionalGeneration`. Its capacity is the same in training and evaluation."""

    code = "transformers"

    def __init__(self, model: Any, initialised: bool) -> None:
        config = model.config
        self.model: Any = model
        self.initialised = initialised
        named = dict(model.named_modules())
        self.layers = tuple(name.removesuffix(".router") for name in named if name.endswith(".mlp.router"))
        self.routers = tuple(named[f"{layer}.router"] for layer in self.layers)
        self.num_experts = config.num_experts
        self.vocab_size = config.vocab_size
        self.rows = 1
        self.slots = config.expert_capacity
        self.balance_coef = config.router_aux_loss_coef

    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        choices: list[torch.Tensor] = []
        hooks = [router.register_forward_hook(lambda *call: choices.append(call[-1][0])) for router in self.routers]
        try:
            with self._in(mode), torch.no_grad(), precision(autocast), record_router_calls(self, LOGITS) as calls:
                logits_BTV = self._forward(text).logits
        finally:
            for hook in hooks:
                hook.remove()
        real_BS = text.inputs_BS != PAD
        reports = []
        for layer, call, choice_GNE in zip(self.layers, calls, choices, strict=True):
            # The decoder is told nothing of padding; neither is the encoder's router, but it should have been.
            real_GN = real_BS if layer.startswith("encoder") else torch.ones_like(text.targets_BT, dtype=torch.bool)
            reports.append(_report(call.logits_GNE.float(), real_GN, choice_GNE.any(-1)))
        return ForwardTrace(logits_BTV.float(), tuple(calls), tuple(reports))

    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
        """By `generate`, made to say the targets: how the cache is handed on is then transformers' own affair."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=text.targets_BT.shape[1],
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            decoder_start_token_id=self._start,
            pad_token_id=PAD,
        )
        with self._in(mode), torch.no_grad():
            answer = self.model.generate(
                input_ids=text.inputs_BS,
                attention_mask=(text.inputs_BS != PAD).long(),
                generation_config=settings,
                prefix_allowed_tokens_fn=lambda row, said: [int(text.targets_BT[row, len(said) - 1])],
            )
        return torch.stack(answer.logits, dim=1)

    def loss(self, text: ProbeText) -> TrainingLoss:
        with training_mode(self.model):
            state = torch.random.get_rng_state()
            found = [self._loss(text, {})]
            torch.random.set_rng_state(state)  # the same dropout
            found += [self._loss(text, {"output_router_logits": True})]
        (cross_entropy, auxiliary), (_, asked) = found
        return TrainingLoss(cross_entropy, auxiliary, asked)

    def in_bfloat16(self) -> Self:
        return type(self)(copy.deepcopy(self.model).to(torch.bfloat16), self.initialised)

    @property
    def _start(self) -> int:
        start = getattr(self.model.config, "decoder_start_token_id", None)
        return PAD if start is None else start

    def _loss(self, text: ProbeText, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
        output = self._forward(text, {"labels": text.targets_BT, **options})
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), text.targets_BT.flatten())
        return cross_entropy, float((output.loss - cross_entropy).detach())

    def _forward(self, text: ProbeText, options: dict[str, Any] | None = None) -> Any:
        return self.model(
            input_ids=text.inputs_BS,
            attention_mask=(text.inputs_BS != PAD).long(),
            decoder_input_ids=F.pad(text.targets_BT, (1, -1), value=self._start),
            **(options or {}),
        )

    def _in(self, mode: Mode) -> AbstractContextManager[None]:
        return training_mode(self.model) if mode == "training" else nullcontext()


def _report(logits_GNE: torch.Tensor, real_GN: torch.Tensor, placed_GN: torch.Tensor) -> RouterStats:
    E = logits_GNE.shape[-1]
    expert_GN = logits_GNE.argmax(-1)
    return router_stats(
        logits_GNE,
        real_GN,
        fraction_GE=choice_fraction(expert_GN.unsqueeze(-1), real_GN, E),
        load_GE=count_per_group(expert_GN.masked_fill(~real_GN, E), E + 1)[:, :-1],
        placed_GN=placed_GN,
    )


def load(folder: Path) -> TransformersSubject:
    """The model in `folder`; without weights there, one that transformers initialises.

    Raises:
        CheckpointError: another model, weights that are missing, damaged, quantized or pickled.
        OutOfMemory: this machine is too small for it.
        RecipeError: transformers is not installed.
    """
    path = folder / configs.NAME
    found = configs.read_json(path)
    if (kind := found.get("model_type")) != "switch_transformers":
        raise CheckpointError(f"{path}: model_type must be switch_transformers, and is {kind!r}: name another folder")
    if found.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config: weights are probed in float32: save the model without it")
    weights = any(folder.glob("*.safetensors"))
    if not weights and (pickled := sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])):
        raise CheckpointError(
            f"{pickled[0]}: a pickle, which can run code when it is read: save the model as safetensors, or take the "
            "weights away to probe the configuration alone"
        )
    config = _config(found, path)
    return TransformersSubject(
        _read(folder, config) if weights else _initialised(folder, config), initialised=not weights
    )


def _config(found: Mapping[str, Any], path: Path) -> Any:
    """As transformers reads it, except that the file does not choose its attention's code, which may be the hub's."""
    transformers = _transformers()
    settings = {key: value for key, value in found.items() if not key.endswith("_implementation")}
    with _refusals(path.parent):
        config = transformers.SwitchTransformersConfig.from_dict(settings, attn_implementation="eager")
        configs.check_sizes(config.to_dict(), path)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = transformers.SwitchTransformersForConditionalGeneration(config)
    check_memory(sum(weight.numel() for weight in model.parameters()), "probe it on a larger one")
    return config


def _read(folder: Path, config: Any) -> nn.Module:
    transformers = _transformers()
    with _refusals(folder):
        model, told = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weights lack {missing[0]}{more}: fetch the folder again")
    return model.eval()


def _initialised(folder: Path, config: Any) -> nn.Module:
    transformers = _transformers()
    with _refusals(folder), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.SwitchTransformersForConditionalGeneration(config).float().eval()


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RecipeError(
            "a Hugging Face folder is probed in transformers' own code, and transformers is not installed: "
            "pip install 'transformers>=5.18,<6', or `switchcli convert` the folder to probe its weights in this code"
        ) from error
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """Within, what transformers or safetensors refuse is raised as a CheckpointError in one line."""
    from huggingface_hub.errors import StrictDataclassError

    known = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ImportError, RuntimeError)
    try:
        yield
    except (*known, SafetensorError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot open it ({type(error).__name__}: {said}): fetch the folder again"
        ) from error
