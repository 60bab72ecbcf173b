"""Settings of a student's initial weights, which student.py takes from a teacher."""

from typing import Literal

from switchcli.spec import Spec


class FromTeacherInit(Spec):
    """Initialize the student from the teacher's weights."""

    kind: Literal["teacher"] = "teacher"
    """`teacher` copies the teacher's weights, whose dimensions must be the student's."""
    experts: Literal["random_init", "mean", "most_used", "concat"] = "random_init"
    """Initial weights of a student's feed-forward where the teacher has experts: `random_init` (the paper's), the
    `mean` of the experts, or the `most_used` expert, which most tokens of held-out text choose. `concat` puts the most
    used ones side by side, as many as `model.d_ff` has room for, each times the mean gate of its tokens; such a
    feed-forward has as many times the FLOPs of an expert."""
