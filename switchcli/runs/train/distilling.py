"""Distillation: the training task of `switchcli distill`. The teacher runs in every step."""

import difflib
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from switchcli.checkpoint import tensor_names
from switchcli.checkpoint.model_weights import load_weights, meta_model
from switchcli.checkpoint.run_folder import RunFolder
from switchcli.data.tokenizer.tokenizer import Tokenizer
from switchcli.distributed.context import DistributedContext
from switchcli.distributed.layout import ModelWeights
from switchcli.errors import CheckpointError, RecipeError
from switchcli.metric_names import TOKENS_PER_SECOND
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.model.init import initial_weights
from switchcli.model.moe.layer import evaluate_by
from switchcli.model.surgery.student import ExpertUse, StudentInit, gate_sums, init_weights, plan_init
from switchcli.model.surgery.student_spec import FromTeacherInit
from switchcli.model.transformer import SwitchTransformer
from switchcli.recipe import resolve
from switchcli.recipe.schema import DistillTasksRecipe, DistillTextRecipe
from switchcli.recipe.sizes import SIZES
from switchcli.recipe.yaml_nodes import Node
from switchcli.runs.evaluate.score_tables import shown_metric
from switchcli.runs.inputs.loading import load_model
from switchcli.runs.inputs.train_data import TrainData
from switchcli.runs.job.job import Job
from switchcli.runs.job.pins import BASELINE, START, STUDENT, TEACHER, Pin, PinFinder
from switchcli.runs.job.same_model import check_trained_tokenizer
from switchcli.runs.train.distill_rules import (
    Recipe,
    check_microbatch_rows,
    check_models,
    defaults,
    dense_spec,
    teacher_of,
    tokenizer_path,
)
from switchcli.runs.train.trainer import Trainer
from switchcli.runs.train.training_task import TrainingTask
from switchcli.spec import Spec
from switchcli.terminal.console import Console
from switchcli.terminal.safe_text import shell_words
from switchcli.terminal.table import Table
from switchcli.terminal.units import si
from switchcli.training.config import FromCheckpoint
from switchcli.training.distillation import DistillationLoss, Teacher, compression, gain_kept
from switchcli.training.loss import Objective, packed_cross_entropy
from switchcli.training.measure import Evaluator, Measurement
from switchcli.training.on_policy import OnPolicyLoss
from switchcli.training.optimizers import Optimizer


class Distillation(TrainingTask):
    """Train a student on the probabilities of a teacher, on text or on tasks (section 4.2).

    `start` can only name a distillation to continue.
    """

    verb = "distill"

    @classmethod
    def check_verb(cls, tree: Node) -> None:
        if tree.stated("verb") is not None:  # a recipe without a verb may also be one of pretrain or finetune
            super().check_verb(tree)

    @classmethod
    def pins(cls, tree: Node, finder: PinFinder) -> dict[str, Pin]:
        named = resolve.stated_path(tree, TEACHER)
        if not isinstance(named, str):
            raise RecipeError(f"{TEACHER}: missing: name the model to learn from by --teacher CHECKPOINT")
        pins = super().pins(tree, finder)
        pins[TEACHER] = finder.find(TEACHER, named)
        if (student := resolve.stated_path(tree, STUDENT)) is not None:
            try:
                pins[STUDENT] = finder.find(STUDENT, student)
            except CheckpointError as error:
                if Path(student).exists() or not (close := difflib.get_close_matches(student, SIZES, n=1)):
                    raise
                raise RecipeError(
                    f"{STUDENT} (--student) {student}: no checkpoint there, and no size of that name. Did you mean "
                    f"{close[0]}?"
                ) from error
        if isinstance(baseline := resolve.stated_path(tree, BASELINE), str):
            # It is measured at the end, so the recipe keeps the name, which may be a run that goes on.
            handle = finder.open(BASELINE, baseline)
            pins[BASELINE] = Pin(baseline, handle.spec, handle)
        return pins

    @classmethod
    def fixed(cls, tree: Node, pins: Mapping[str, Pin]) -> Mapping[str, Any]:
        fixed = dict(super().fixed(tree, pins))
        if STUDENT in pins:
            fixed["student.kind"] = "checkpoint"
        if tree.stated("data.tokenizer.kind") == "train":  # a student shares the vocabulary of its teacher
            teacher = teacher_of(pins)
            check_trained_tokenizer(tree, teacher)
            fixed["data.tokenizer"] = {"kind": "file", "path": tokenizer_path(teacher)}
        return fixed

    @classmethod
    def defaults(cls, tree: Node, pins: Mapping[str, Pin]) -> Node:
        teacher = teacher_of(pins)
        student = pins.get(START) or pins.get(STUDENT)
        spec = student.model if student else dense_spec(teacher.spec)
        return resolve.layer(defaults(teacher, spec, tree), f"the teacher {teacher.path}")

    @classmethod
    def schema(cls, tree: Node) -> type[Spec]:
        return DistillTextRecipe if tree.stated("tasks") is None else DistillTasksRecipe

    @classmethod
    def vocab_size(cls, tree: Node, pins: Mapping[str, Pin], finder: PinFinder) -> int:
        return pins[TEACHER].model.vocab_size

    @classmethod
    def check(cls, recipe: Recipe, pins: Mapping[str, Pin]) -> None:
        super().check(recipe, pins)
        check_models(recipe, pins)

    def __init__(self, job: Job, folder: RunFolder, context: DistributedContext, console: Console) -> None:
        super().__init__(job, folder, context, console)
        self._recipe: Recipe = job.recipe
        self._settings = self._recipe.distill
        self._handle = job.handles[TEACHER]
        self._teacher: SwitchTransformer | None = None
        spec = self._handle.spec
        context.main_first(lambda: check_microbatch_rows(self._recipe, spec, context.dp_size))
        if self._settings.soft_fraction:
            self.teacher = spec

    def tokenizer(self) -> Tokenizer:
        return self._handle.tokenizer

    def build_data(self) -> TrainData:
        data = super().build_data()
        if self.teacher is not None:
            self._load_teacher()
        return data

    def _load_teacher(self) -> SwitchTransformer:
        """Return the teacher, which is loaded on the first call."""
        if self._teacher is None:
            self._teacher = load_model(self._handle, self.context.device)
            if self._recipe.train.compile:
                self.context.compile(self._teacher)
        return self._teacher

    def training_loss(self) -> Objective:
        """Return the loss with the teacher's probabilities; with a soft fraction of 0 that of the targets alone."""
        objective, settings = super().training_loss(), self._settings
        if self.teacher is None:
            return objective
        model = self._load_teacher()
        evaluate_by(model, self._recipe.eval.capacity or "dropless")  # without dropout and noise
        teacher = Teacher(model, self._handle.model_file.precision)
        if settings.targets == "student":
            return OnPolicyLoss(settings, teacher, self.context)
        return DistillationLoss(settings, teacher, packed=objective is packed_cross_entropy)

    def init_weights(self, student: ModelWeights, optimizer: Optimizer, evaluator: Evaluator) -> None:
        """Initialize a new student: from a checkpoint, from the teacher's weights, or at random."""
        recipe, teacher = self._recipe, self._handle
        own, others = (f"{spec.dropout}, in experts {spec.experts_dropout}" for spec in (recipe.model, teacher.spec))
        if own != others:
            self.console.message(f"dropout of the student: {own}; of its teacher: {others}")
        if isinstance(recipe.student, FromCheckpoint):
            load_weights(student, self.job.handles[STUDENT].weights())
            return
        student.load_full(initial_weights(recipe.model, recipe.train.seed, student.experts))
        plan = student_init(recipe, teacher.spec)
        if plan is None or not isinstance(recipe.student, FromTeacherInit):
            return
        weights, num_experts = teacher.weights(), teacher.spec.num_experts
        use = ExpertUse({}, {})
        if plan.from_experts and recipe.student.experts in ("most_used", "concat"):
            use = self._expert_use(evaluator, with_gates=recipe.student.experts == "concat")

        def stacked_weight(name: str) -> torch.Tensor:
            return tensor_names.stack_experts(weights, name, num_experts)

        student.load_full(
            init_weights(recipe.model, student.experts, plan, stacked_weight, recipe.student, use, recipe.train.seed)
        )
        self.console.message(
            f"of the student's {len(student.parameters)} weight tensors {len(plan.copied)} are copies of the "
            f"teacher's, {len(plan.from_experts)} are made from its experts (student.experts={recipe.student.experts}) "
            f"and {len(plan.random_init)} start from random values"
        )
        if plan.widened:
            self.console.message(f"{len(plan.widened)} of wider dense feed-forwards begin with the teacher's")

    def _expert_use(self, evaluator: Evaluator, with_gates: bool) -> ExpertUse:
        """Measure how the teacher uses its experts on held-out text. Collective."""
        gate: dict[str, torch.Tensor] = {}
        with gate_sums(self._load_teacher()) if with_gates else nullcontext(dict[str, torch.Tensor]()) as sums:
            measured = _measure(self._load_teacher(), evaluator._replace(tasks=()))
        for layer, local in sums.items():
            total_E, tokens_E = self.context.all_reduce(local).cpu()
            gate[layer] = total_E / tokens_E.clamp(min=1)
        if self.teacher is None:  # training does not need it
            self._teacher = None
        return ExpertUse({layer: torch.tensor(tokens) for layer, tokens in measured.load().items()}, gate)

    def results(self, trainer: Trainer) -> dict[str, Any]:
        """Return the columns of the paper's Tables 6 to 8: teacher, student, dense baseline, and the gain kept."""
        recipe, teacher, baseline = self._recipe, self._handle, self.job.handles.get(BASELINE)
        metric = trainer.evaluator.metric
        teacher_measured = _measure(self._load_teacher(), trainer.evaluator)
        self._teacher = None  # frees the memory of the teacher for the baseline
        # The last evaluation of the training has the student's metrics. Measuring again adds its speed.
        speed = _measure(trainer.model, trainer.evaluator._replace(tasks=()))
        teacher_row = {"checkpoint": str(teacher.path), **_row(teacher.spec, recipe, teacher_measured)}
        student_row = {**_row(recipe.model, recipe, speed), "metrics": dict(trainer.state.eval_metrics)}
        result: dict[str, Any] = {
            "metric": metric,
            "teacher": teacher_row,
            "student": student_row,
            "compression": compression(student_row["parameters"], teacher_row["parameters"]),
        }
        plan = student_init(recipe, teacher.spec)
        if plan is not None:
            result["student_init"] = {
                "copied": plan.copied,
                "from_experts": list(plan.from_experts),
                "widened": plan.widened,
                "random_init": plan.random_init,
            }
        baseline_value = self._settings.baseline
        if baseline is not None:
            baseline_model = load_model(baseline, self.context.device)
            baseline_row = _row(baseline.spec, recipe, _measure(baseline_model, trainer.evaluator))
            baseline_value = baseline_row["metrics"][metric]
            result["baseline"] = {"checkpoint": str(baseline.path), **baseline_row}
        elif isinstance(baseline_value, float):
            result["baseline"] = {"metrics": {metric: baseline_value}}
        if isinstance(baseline_value, float):
            student_value, teacher_value = student_row["metrics"][metric], teacher_row["metrics"][metric]
            result["gain_kept"] = gain_kept(student_value, teacher_value, baseline_value)
        return {"distillation": result}

    def show(self, result: Mapping[str, Any]) -> None:
        """Print the rows of the paper's Table 6 that one run has."""
        distillation = result["distillation"]
        metric = distillation["metric"]
        rows: dict[str, str | float] = {}
        for role in ("teacher", "student", "baseline"):
            if role not in distillation:
                continue
            model = distillation[role]
            properties = []
            if model.get("parameters"):
                properties += [f"{model['parameters']:,} parameters", f"{si(model['flops_per_token'])} FLOPs/token"]
            if model.get(TOKENS_PER_SECOND):
                properties.append(f"{si(model[TOKENS_PER_SECOND])} tokens/s forward")
            label, value = shown_metric(metric, model["metrics"][metric])
            rows[f"{role} ({', '.join(properties)})" if properties else role] = value
        rows["compression"] = f"{distillation['compression']:.1%}"
        if "gain_kept" in distillation:
            fraction = distillation["gain_kept"]
            rows["of the teacher's gain over the baseline kept"] = (
                "the teacher has none" if fraction is None else f"{fraction:.1%}"
            )
        self.console.show(Table(("", ""), [*rows.items()], f"distilled: {label}"))
        student, teacher = (distillation[role]["metrics"][metric] for role in ("student", "teacher"))
        if self.teacher is not None and student > teacher:
            self.console.message(
                "the student is ahead of its teacher: compare it with distill.soft_fraction=0, which trains it as long "
                "without the teacher"
            )

    def next_commands(self, trainer: Trainer, result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        out = trainer.folder.path
        convert = shell_words("convert", out, f"{out}-huggingface", "--to", "huggingface")
        yield "use the student in transformers", convert
        if "baseline" not in result["distillation"]:
            purpose = (
                "see how much of the teacher's gain it keeps; replace RUN by a dense model trained on the same data "
                "without a teacher"
            )
            yield purpose, shell_words("distill", out / "recipe.yaml", "--baseline", "RUN", "--out", out)


def student_init(recipe: Recipe, teacher: ModelSpec) -> StudentInit | None:
    """Return which weights the student gets from its teacher, or None if it starts from something else."""
    if not isinstance(recipe.student, FromTeacherInit):
        return None
    return plan_init(meta_model(recipe.model), meta_model(teacher), recipe.student)


def _measure(model: SwitchTransformer, evaluator: Evaluator) -> Measurement:
    """Measure a model on the data of the run. Collective. Compiled modules run in eager mode."""
    with evaluator.context.eager():
        return evaluator(model)


def _row(spec: ModelSpec, recipe: Recipe, measured: Measurement) -> dict[str, Any]:
    """Return the columns of a model. Its FLOPs are of the forward pass, for an input token of the run's sequences."""
    counts = count(spec, recipe.inputs_length, recipe.targets_length)
    return {
        "parameters": counts.parameters,
        "flops_per_token": round(counts.flops / recipe.inputs_length),
        "metrics": measured.metrics(),
        TOKENS_PER_SECOND: measured.num_rows * recipe.inputs_length / measured.text_seconds,
    }
