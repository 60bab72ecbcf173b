"""A Hugging Face folder as the subject of probes, in transformers' own code, as users of the folder run it.

Legend: B batch, S positions, T target, V vocabulary, G groups, N tokens per group, E experts.

This is the only file that imports transformers, and only when it is needed.
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
from switchcli.convert import weight_files
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

CHOICES_INDEX: Final = 0
"""Index of the choices in the output of transformers' router: one-hot, all zero for a dropped token."""
LOGITS_INDEX: Final = 2
"""Index of the logits in the output of transformers' router."""


class TransformersSubject(Subject):
    """A `SwitchTransformersForConditionalGeneration`. Its capacity is equal in training and evaluation."""

    code = "transformers"

    def __init__(self, model: Any, initialized: bool) -> None:
        config = model.config
        self.model: Any = model
        self.initialized = initialized
        modules = dict(model.named_modules())
        self.layers = tuple(name.removesuffix(".router") for name in modules if name.endswith(".mlp.router"))
        self.routers = tuple(modules[f"{layer}.router"] for layer in self.layers)
        self.num_experts = config.num_experts
        self.vocab_size = config.vocab_size
        self.batch_multiple = 1
        self.capacity = config.expert_capacity
        self.experts_choose = False
        self.balance_coef = config.router_aux_loss_coef

    def forward(self, text: ProbeText, mode: Mode = "paper", autocast: bool = False) -> ForwardTrace:
        with self._in(mode), torch.no_grad(), precision(autocast), record_router_calls(self, LOGITS_INDEX) as calls:
            logits_BTV = self._forward(text).logits
        real_BS = text.inputs_BS != PAD
        all_real_BT = torch.ones_like(text.targets_BT, dtype=torch.bool)
        stats = []
        for layer, call in zip(self.layers, calls, strict=True):
            # transformers tells neither router of padding. In the decoder there is none to tell of; in the encoder the
            # statistics leave it out, as a correct router would.
            real_GN = real_BS if layer.startswith("encoder") else all_real_BT
            stats.append(_router_stats(call.logits_GNE.float(), real_GN, call.output[CHOICES_INDEX].any(-1)))
        return ForwardTrace(logits_BTV.float(), tuple(calls), tuple(stats))

    def decode(self, text: ProbeText, mode: Mode) -> torch.Tensor:
        # `generate` with only the next target allowed at each step, so that transformers itself handles its cache.
        from transformers import GenerationConfig

        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=text.targets_BT.shape[1],
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            decoder_start_token_id=self._start_token,
            pad_token_id=PAD,
        )

        def next_target(row: int, prefix: torch.Tensor) -> list[int]:
            # The prefix is the start token and len(prefix) - 1 targets.
            return [int(text.targets_BT[row, len(prefix) - 1])]

        with self._in(mode), torch.no_grad():
            output = self.model.generate(
                input_ids=text.inputs_BS,
                attention_mask=(text.inputs_BS != PAD).long(),
                generation_config=settings,
                prefix_allowed_tokens_fn=next_target,
            )
        return torch.stack(output.logits, dim=1)

    def loss(self, text: ProbeText) -> TrainingLoss:
        with training_mode(self.model):
            state = torch.random.get_rng_state()
            cross_entropy, auxiliary = self._loss(text, {})
            torch.random.set_rng_state(state)  # the same dropout
            _, auxiliary_requested = self._loss(text, {"output_router_logits": True})
        return TrainingLoss(cross_entropy, auxiliary, auxiliary_requested)

    def in_bfloat16(self) -> Self:
        return type(self)(copy.deepcopy(self.model).to(torch.bfloat16), self.initialized)

    @property
    def _start_token(self) -> int:
        token = getattr(self.model.config, "decoder_start_token_id", None)
        return PAD if token is None else token

    def _loss(self, text: ProbeText, options: dict[str, Any]) -> tuple[torch.Tensor, float]:
        """Return the cross-entropy, and what transformers adds to it in its loss."""
        output = self._forward(text, {"labels": text.targets_BT, **options})
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), text.targets_BT.flatten())
        return cross_entropy, float((output.loss - cross_entropy).detach())

    def _forward(self, text: ProbeText, options: dict[str, Any] | None = None) -> Any:
        return self.model(
            input_ids=text.inputs_BS,
            attention_mask=(text.inputs_BS != PAD).long(),
            decoder_input_ids=F.pad(text.targets_BT, (1, -1), value=self._start_token),  # shifted right
            **(options or {}),
        )

    def _in(self, mode: Mode) -> AbstractContextManager[None]:
        return training_mode(self.model) if mode == "training" else nullcontext()


def _router_stats(logits_GNE: torch.Tensor, real_GN: torch.Tensor, assigned_GN: torch.Tensor) -> RouterStats:
    E = logits_GNE.shape[-1]
    expert_GN = logits_GNE.argmax(-1)
    return router_stats(
        logits_GNE,
        real_GN,
        fraction_GE=choice_fraction(expert_GN.unsqueeze(-1), real_GN, E),
        load_GE=count_per_group(expert_GN.masked_fill(~real_GN, E), E + 1)[:, :-1],  # padding is in column E
        assigned_GN=assigned_GN,
    )


def load(folder: Path) -> TransformersSubject:
    """Load the model in `folder`; without weights in it, one that transformers initializes.

    Raises:
        CheckpointError: it is another model, or weights are missing, damaged, quantized or pickled.
        OutOfMemory: the machine is too small for the model.
        RecipeError: transformers is not installed.
    """
    path = folder / configs.NAME
    settings = configs.read_json(path)
    if (kind := settings.get("model_type")) != "switch_transformers":
        raise CheckpointError(
            f"{path}: model_type is {kind!r}, and must be switch_transformers: probe what `switchcli convert` makes of "
            "the folder"
        )
    if settings.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: quantization_config: weights are probed in float32: save the model without it")
    has_weights = any(folder.glob("*.safetensors"))
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles and not has_weights:
        raise CheckpointError(
            f"{pickles[0]}: a pickle, which can run code when it is read: save the model as safetensors, or remove the "
            "weights to probe only the configuration"
        )
    weight_files.check_files(folder)
    config = _config(settings, path)
    model = _read_model(folder, config) if has_weights else _initial_model(folder, config)
    return TransformersSubject(model, initialized=not has_weights)


def _config(settings: Mapping[str, Any], path: Path) -> Any:
    """Return transformers' configuration. The file does not choose the attention's code, which may be on the hub."""
    transformers = _transformers()
    settings = {key: value for key, value in settings.items() if not key.endswith("_implementation")}
    with _errors_as_checkpoint_error(path.parent):
        config = transformers.SwitchTransformersConfig.from_dict(settings, attn_implementation="eager")
        configs.check_sizes(config.to_dict(), path)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = transformers.SwitchTransformersForConditionalGeneration(config)
    check_memory(sum(weight.numel() for weight in model.parameters()), "probe it on a larger one")
    return config


def _read_model(folder: Path, config: Any) -> nn.Module:
    transformers = _transformers()
    with _errors_as_checkpoint_error(folder):
        model, loading_info = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    if missing := sorted(loading_info["missing_keys"]):
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: the weights lack {missing[0]}{others}: fetch the folder again")
    return model.eval()


def _initial_model(folder: Path, config: Any) -> nn.Module:
    transformers = _transformers()
    with _errors_as_checkpoint_error(folder), torch.random.fork_rng(devices=[]):
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
def _errors_as_checkpoint_error(folder: Path) -> Iterator[None]:
    """Raise errors of transformers and safetensors within the context as a CheckpointError of one line."""
    from huggingface_hub.errors import StrictDataclassError

    # transformers raises any of these for a configuration that it cannot use.
    errors = (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ImportError, RuntimeError)
    try:
        yield
    except (*errors, SafetensorError, StrictDataclassError) as error:
        message = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers cannot open it ({type(error).__name__}: {message}): fetch the folder again"
        ) from error
