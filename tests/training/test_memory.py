"""What training takes of memory, and running out of it."""

import pytest
import torch
from doubles import FactoringAdafactor
from messages import naming

from switchcli.errors import OutOfMemory
from switchcli.model.config import ModelSpec
from switchcli.model.flops import count
from switchcli.training.memory import explain_out_of_memory, training_bytes
from switchcli.training.optimizer_specs import Adafactor, AdamW

CPU = torch.device("cpu")


def test_weights_gradients_and_two_moments() -> None:
    model = ModelSpec(vocab_size=128, d_model=16, d_ff=32, num_heads=2, num_layers=1)
    adam, small = training_bytes(model, AdamW()), training_bytes(model, FactoringAdafactor(least=1))
    assert adam % 16 in (0, 8)  # with or without a count of the steps
    assert adam / 2 < small < adam * 0.6


def test_what_does_not_learn_has_neither_gradient_nor_moments() -> None:
    model = ModelSpec(vocab_size=128, d_model=16, d_ff=32, num_heads=2, num_layers=2, num_experts=4)
    groups = ("all", "non_expert", "expert", "dense_feed_forward")
    all_of_it, non_expert, expert, dense = (training_bytes(model, AdamW(), group) for group in groups)
    whole, feed_forwards = 4 * count(model).parameters, 4 * 2 * 2 * 16 * 32
    assert non_expert + expert == all_of_it + whole
    assert 3 * feed_forwards <= dense - whole <= 3 * feed_forwards + 32  # with counts of the steps


def test_a_machine_without_room_says_what_is_needed() -> None:
    with (
        pytest.raises(OutOfMemory, match=r"\bcpu\b.* [\d.]+ GiB.* [\d.]+ MiB.*train\.microbatch_tokens"),
        explain_out_of_memory(ModelSpec(), Adafactor(), CPU),
    ):
        torch.empty(1 << 60, dtype=torch.uint8)


@pytest.mark.parametrize("room", [-1, 0])
def test_a_smaller_microbatch_is_not_advised_where_the_weights_do_not_fit(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, teacher = ModelSpec(), ModelSpec(num_experts=2)
    needed = training_bytes(model, Adafactor()) + 4 * count(teacher).parameters
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (0, needed + room))
    with (
        pytest.raises(OutOfMemory, match=naming("cuda:0", "MiB", "parallel")) as error,
        explain_out_of_memory(model, Adafactor(), torch.device("cuda:0"), teacher=teacher),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert ("train.microbatch_tokens" in str(error.value)) == (room == 0)
