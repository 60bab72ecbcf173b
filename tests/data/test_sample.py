"""The sample that a vocabulary is trained on: bounded, independent of order, in shares of the components."""

from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchcli.data.sources.document import Document
from switchcli.data.tokenizer.sample import sample_texts

SIZES = st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(0, 60), min_size=1, max_size=5)


def named(name: str, text: str) -> Document:
    """Whose hash is of its name, as that of the standard library's."""
    return Document(name, text, name, 0)


def corpus(name: str, num_documents: int, length: int = 10) -> list[Document]:
    """Each of its characters is the first letter of its name."""
    return [named(f"{name}:{index}", name[0] * length) for index in range(num_documents)]


def characters(texts: list[str]) -> Counter[str]:
    return Counter("".join(texts))


def test_it_is_bounded_and_independent_of_order() -> None:
    assert len(sample_texts({"": corpus("x", 50, 100)}, 1000)) == 10
    numbered = [named(f"{index}", f"{index:03d}") for index in range(50)]
    assert (
        sample_texts({"": numbered}, 30)
        == sample_texts({"": numbered[::-1]}, 30)
        == sample_texts({"a": numbered[:9], "b": numbered[9:]}, 30)
    )
    assert sample_texts({"": [named("long", "y" * 5000)]}, 1000) == ["y" * 1000]


@pytest.mark.parametrize(("alpha", "shares"), [(1.0, (0.9, 0.1)), (0.5, (0.75, 0.25)), (0.0, (0.5, 0.5))])
def test_shares_are_a_power_of_the_sizes(alpha: float, shares: tuple[float, float]) -> None:
    texts = sample_texts({"a": corpus("a", 900), "b": corpus("b", 100)}, 2000, alpha)
    counts = characters(texts)
    assert sum(counts.values()) <= 2000
    assert (counts["a"] / 2000, counts["b"] / 2000) == pytest.approx(shares, abs=0.01)


@given(sizes=SIZES, max_characters=st.integers(1, 500), alpha=st.none() | st.floats(0, 1))
def test_it_is_never_more_than_asked_for_or_than_there_is(
    sizes: dict[str, int], max_characters: int, alpha: float | None
) -> None:
    texts = sample_texts({name: corpus(name, size) for name, size in sizes.items()}, max_characters, alpha)
    total = sum(map(len, texts))
    assert total <= min(max_characters, 10 * sum(sizes.values()))
    assert bool(texts) == (total > 0)


def test_so_much_of_each_component_is_read_and_no_more() -> None:
    def endless(name: str) -> Iterator[Document]:
        index = 0
        while True:
            yield named(f"{name}:{index}", name * 10)
            index += 1

    for alpha in (None, 0.5):
        counts = characters(sample_texts({"a": endless("a"), "b": endless("b")}, 10_000, alpha, max_read=300))
        assert counts == {"a": 300, "b": 300}
