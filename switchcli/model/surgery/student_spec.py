"""Settings of a student's initial weights, which student.py takes from a teacher."""

from typing import Literal

from switchcli.spec import Spec


class FromTeacherInit(Spec):
    """Initialize the student from the teacher's weights."""

    kind: Literal["teacher"] = "teacher"
    """`teacher` copies the teacher's weights where the shapes agree."""
    experts: Literal["random_init", "mean", "most_used", "concat"] = "random_init"
    """Initial weights of a student's feed-forward where the teacher has experts: `random_init` (the paper's), the
    `mean` of the experts, or the `most_used` expert, which most tokens of held-out text choose. `concat` puts the most
    used ones side by side, as many as `model.d_ff` has room for, each times the mean gate of its tokens; such a
    feed-forward has as many times the FLOPs of an expert."""
    on_shape_mismatch: Literal["error", "random_init"] = "error"
    """Handling of a student with other dimensions than its teacher's: an `error`, or `random_init` of the tensors that
    do not fit while the others are copied."""
