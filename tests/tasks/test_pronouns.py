"""The pronoun of WSC, DPR and WNLI: which word is marked, and which phrase WNLI puts in its place."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from switchcli.tasks.pronouns import PRONOUNS, mark_first, mark_word, resolve

PONY = '... the pony threw him over. John laughed out quite loud. "Good for him," he said. '
PEBBLE = "Some day they might want to use it , but really for now, what more could they wish for?"


@pytest.mark.parametrize(
    ("text", "index", "pronoun", "marked"),
    [
        ("Bob asked Tom if he can lend him some.", 4, "he", "Bob asked Tom if *he* can lend him some."),
        ("He saw that he was late", 3, "he", "He saw that *he* was late"),
        ("He saw that he was late", 0, "He", "*He* saw that he was late"),
        ("Ann saw her .", 2, "her", "Ann saw *her* ."),
        ("Singer 's  dog bit him", 5, "him", "Singer 's  dog bit *him*"),
        ("she .", 0, "she", "*she* ."),
        # Rows of WSC that need care: punctuation stuck to the pronoun, with spaces at the end; an index one too low.
        (PONY, 13, "him", '... the pony threw him over. John laughed out quite loud. "Good for *him* ," he said.'),
        (PEBBLE, 6, "it", PEBBLE.replace("it ,", "*it* ,")),
        ('Al said "(he\'s late)"', 2, "he", 'Al said "(*he* \'s late)"'),
        ("he x he", 1, "he", "*he* x he"),
    ],
)
def test_wsc_marks_the_word_at_the_index(text: str, index: int, pronoun: str, marked: str) -> None:
    assert mark_word(text, index, pronoun) == f"wsc: {marked}"


@pytest.mark.parametrize("text", ["", "the theme there", "He"])
def test_wsc_tells_of_a_pronoun_that_is_not_there(text: str) -> None:
    with pytest.raises(ValueError, match=r"^span2_text: .*'he'"):
        mark_word(text, 1, "he")


ANY_WORDS = st.lists(st.text(st.characters(exclude_characters=" "), min_size=1).filter(str.strip), max_size=6)


@given(ANY_WORDS, ANY_WORDS, st.text(st.characters(categories=["L"]), min_size=1))
def test_wsc_marks_among_any_words(before: list[str], after: list[str], pronoun: str) -> None:
    text = " ".join(["a", *before, pronoun, *after, "b"])
    marked = " ".join(["wsc: a", *before, f"*{pronoun}*", *after, "b"])
    assert mark_word(text, len(before) + 1, pronoun) == marked


@pytest.mark.parametrize(
    ("sentence", "pronoun", "marked"),
    [
        ("The bee landed on it, for it had pollen.", "it", "The bee landed on *it*, for it had pollen."),
        ("The item hit it.", "it", "The item hit *it*."),
        ("Ann met Eve (she sang) and she left.", "she", "Ann met Eve (she sang) and *she* left."),
        ("He left; so did she!", "she", "He left; so did she!"),
        ("She left.", "She", "She left."),
        ("A (b) c", "(b)", "A *(b)* c"),
    ],
)
def test_dpr_marks_the_first_between_spaces(sentence: str, pronoun: str, marked: str) -> None:
    assert mark_first(sentence, pronoun) == f"wsc: {marked}"


@pytest.mark.parametrize(
    ("premise", "hypothesis", "marked", "referent"),
    [
        ("I put the pot by the shelf as it was tall.", "The pot was tall.", "as *it* was", "The pot"),
        # The phrase may stand right before the pronoun as well.
        ("I like my old red car. It runs.", "My old red car runs.", "car. *It* runs", "My old red car"),
        ("As I like the old car, it runs well.", "The old car runs well.", "car, *it* runs", "The old car"),
        ("Jane saw Sue, but she did not answer.", "Sue did not answer.", "but *she* did", "Sue"),
        (
            "It rained, so I hid the book to keep it dry.",
            "I hid the book to keep the book dry.",
            "*it* dry",
            "the book",
        ),
        ("He put the boy on his bunk.", "He put the boy on the boy's bunk.", "on *his* bunk", "the boy"),
        ("The girls gave their best.", "The girls gave the girls' best.", "gave *their* best", "the girls"),
        ("Ann fears dogs. Eve saw them.", "Eve saw dogs.", "saw *them* .", "dogs"),
        ('Al ran. "Catch him," cried Eve.', '"Catch Mr. Al," cried Eve.', '"Catch *him* ," cried', "Mr. Al"),
        ("They like Al. They left.", "The parents left.", "Al. *They* left", "The parents"),
        ("In May, he left.", "In May, Bob left.", "In May, *he* left", "Bob"),
        ("She left, and slept.", "Ann left.", "*She* left", "Ann"),
        # Two phrases that fit equally: the one with more equal words after it.
        ("Al saw her run.", "Bob run. Ann saw Eve.", "saw *her* run", "Bob"),
        # Two pronouns that fit equally: the earlier one. Nothing fits: the first pronoun, the whole sentence.
        ("Al hit it. Bo hit it.", "Al hit dust. Bo hit dust.", "Al hit *it* . Bo", "dust"),
        ("She sang.", "Nobody came!", "*She* sang", "Nobody came"),
    ],
)
def test_wnli_finds_the_pronoun_and_its_phrase(premise: str, hypothesis: str, marked: str, referent: str) -> None:
    text, found = resolve(premise, hypothesis)
    assert marked in text
    assert text.count("*") == 2
    assert found == referent


def test_wnli_keeps_the_spaces() -> None:
    assert resolve("  Ann  sang .  She left ! ", "Ann left.").text == "wsc:   Ann  sang .  *She* left ! "


@pytest.mark.parametrize(("premise", "hypothesis"), [("Ann left.", "Ann left."), ("She left.", " "), ("", "")])
def test_wnli_tells_of_a_row_without_a_pronoun(premise: str, hypothesis: str) -> None:
    with pytest.raises(ValueError, match=r"^sentence1: "):
        resolve(premise, hypothesis)


WORDS = st.lists(st.sampled_from([*sorted(PRONOUNS), "Ann", "ran,", "the", "dog.", "'s", "—"]), max_size=8).map(
    " ".join
)


@given(WORDS, WORDS, WORDS, st.sampled_from(sorted(PRONOUNS)))
def test_wnli_reads_any_words(before: str, after: str, hypothesis: str, pronoun: str) -> None:
    text, referent = resolve(f"{before} {pronoun} {after}", f"{hypothesis} x")
    assert text.replace("*", "").replace(" ", "") == f"wsc:{before}{pronoun}{after}".replace(" ", "")
    assert referent in f"{hypothesis} x"
