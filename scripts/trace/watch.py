"""What a traced step does wrong on a GPU although FakeTensorMode is silent: each operation is compared with rules.

The rules are those of docs/concepts/precision.md, whose table is read, and the lists below of what the design allows.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PAGE = Path(__file__).resolve().parents[2] / "docs/concepts/precision.md"
PACKAGE = "/switchcli/"
PRODUCTS = {"mm": 2, "bmm": 2, "addmm": 3, "baddbmm": 3, "mv": 2, "dot": 2, "_grouped_mm": 2}
for _kind in ("flash", "efficient", "cudnn", "fused"):
    PRODUCTS[f"_scaled_dot_product_{_kind}_attention"] = 3
    PRODUCTS[f"_scaled_dot_product_{_kind}_attention_backward"] = 4
"""Products, and how many of their first tensors are multiplied or added. Others are indices or statistics."""

ALLOWED: Mapping[tuple[str, str], str] = {
    ("to host", "HostCopy.__init__"): "the gradient norm, once a step: it is read while the next step is queued",
    ("to device", "DistributedContext.to_device"): "a batch, once a forward pass: a run has it in pinned memory",
    ("float64", "gradient_norm"): "squares of norms, a few numbers",
    ("float64", "exact"): "sums of metrics, a few numbers",
    ("float64", "ExpertChoiceRouter.assign"): "slots of each group: a number each",
    ("float64", "flatten"): "the same, for one sum over ranks",
    ("float64", "unflatten"): "the same",
}
"""What the design allows, by kind and by the function of the package that does it, with the reason."""
HIDDEN_WAITS: Mapping[str, str] = {
    "_grouped_mm": "torch reads the ends of the rows, and multiplies one expert after the other",
}
"""Operations that wait for the device inside of torch in float32, with the reason: no trace sees the wait itself."""


class Finding(NamedTuple):
    """One kind of event at one place."""

    kind: str
    operation: str
    place: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.operation} in {self.place or 'the backward pass'}"


class Rules(NamedTuple):
    """The dtypes that a precision allows, read from the page's table."""

    products: torch.dtype
    router: torch.dtype
    state: torch.dtype

    @classmethod
    def of(cls, precision: str) -> "Rules":
        """Return the column of `precision`. Raises ValueError if the page has no such table."""
        lines = PAGE.read_text(encoding="utf-8").splitlines()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        header = next((row for row in rows if any(f"`{precision}`" in cell for cell in row)), None)
        if header is None:
            raise ValueError(f"{PAGE}: no table with a column {precision}")
        column = next(index for index, cell in enumerate(header) if f"`{precision}`" in cell)

        def dtype(start: str) -> torch.dtype:
            (row,) = (row for row in rows if row[0].startswith(start))
            found: torch.dtype = getattr(torch, re.sub(r"\W", "", row[column]))
            return found

        return cls(dtype("matrix products"), dtype("router"), dtype("weights"))


class Watch(TorchDispatchMode):
    """Records what crosses between host and device, float64, and the dtypes of products."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.operations = 0
        self.faults: Counter[Finding] = Counter()
        self.allowed: Counter[Finding] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.operations += 1
        name = func._schema.name.partition("::")[2]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if name == "_local_scalar_dense":
            (tensor,) = inputs
            if _is_on(tensor, "cuda"):
                self._note("wait", name)
            return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        for kind in _events(inputs, outputs):
            self._note(kind, name)
        if name in PRODUCTS:
            self._check_product(name, [tensor.dtype for tensor in inputs[: PRODUCTS[name]]])
        return result

    def _note(self, kind: str, operation: str) -> None:
        place = next(_functions(), "")
        is_allowed = (kind, place.partition(":")[2]) in ALLOWED
        (self.allowed if is_allowed else self.faults)[Finding(kind, operation, place)] += 1

    def count(self, kind: str) -> int:
        """Return how often something of a kind happened that is allowed."""
        return sum(number for finding, number in self.allowed.items() if finding.kind == kind)

    def _check_product(self, name: str, dtypes: Sequence[torch.dtype]) -> None:
        """Compare the dtypes of a product's factors with the rules."""
        names = [*_functions()]
        places = {one.partition(":")[2] for one in names}
        if any(one.startswith("training/optimizers.py") for one in names):
            expected = {self.rules.state}
        elif "RouterWeights.forward" in places:
            expected = {torch.float32 if "Teacher.predict" in places else self.rules.router}
        elif "_dot" in places:  # a teacher's probabilities: losses are float32
            expected = {torch.float32}
        elif not names:  # torch's own derivatives, of the router's product and of all others
            expected = {self.rules.products, self.rules.router}
        else:
            expected = {self.rules.products}
        found = {*dtypes}
        kind = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in found))
        if len(found) > 1 or not found <= expected:
            self.faults[Finding(f"product of {kind}", name, names[0] if names else "")] += 1
        elif name in HIDDEN_WAITS and torch.float32 in found:
            self.allowed[Finding("hidden wait", name, names[0] if names else "")] += 1


def _events(inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> Iterator[str]:
    """Yield what an operation does that a GPU pays for."""
    on_device = any(_is_on(tensor, "cuda") for tensor in inputs)
    if on_device and any(_is_on(tensor, "cpu") for tensor in outputs):
        yield "to host"
    # A number of the host becomes an argument of the kernel; anything larger is copied.
    if any(_is_on(tensor, "cpu") and tensor.ndim for tensor in inputs):
        if any(_is_on(tensor, "cuda") for tensor in outputs) and not on_device:
            yield "to device"
        elif on_device:
            yield "host and device in one operation"
    if any(_is_on(tensor, "cuda") and tensor.dtype == torch.float64 for tensor in outputs):
        yield "float64"


def _is_on(tensor: torch.Tensor, device: str) -> bool:
    return tensor.device.type == device  # not `is_cpu`, which older versions of torch do not answer for fake tensors


def _functions() -> Iterator[str]:
    """Yield the functions of the package that are running, as file:name, the innermost first."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        _, package, path = frame.f_code.co_filename.rpartition(PACKAGE)
        if package:
            yield f"{path}:{frame.f_code.co_qualname}"
        frame = frame.f_back
