import pytest

from objdrive.base.prompts import TOKEN_MARK, fill_prompt, marked_phrase, phrase_places, place_objects
from objdrive.errors import ObjdriveError


class TestFillPrompt:
    @pytest.mark.parametrize(
        ("prompt", "phrases", "filled"),
        [
            ("a photo of {} on grass", ["<x>"], "a photo of <x> on grass"),
            ("{}", ["<x> mug"], "<x> mug"),
            ("{} next to {}", ["<x>"], "<x> next to <x>"),
            ("{} next to {}", ["<x>", "<y>"], "<x> next to <y>"),
            ("{}", ["{}"], "{}"),
            ("{} and {}", ["{}", "<y>"], "{} and <y>"),
            ("a {curly} photo of {}", ["<x>"], "a {curly} photo of <x>"),
            ("a photo of grass", [], "a photo of grass"),
            ("", [], ""),
        ],
    )
    def test_puts_phrases_into_their_places(self, prompt, phrases, filled):
        assert fill_prompt(prompt, phrases) == filled

    @pytest.mark.parametrize(
        ("prompt", "phrases", "message"),
        [
            ("a photo of grass", ["<x>"], r"'a photo of grass' has 0 places {} for 1 object"),
            ("a photo of grass", ["<x>", "<y>"], r"0 places {} for 2 object"),
            ("a photo of {}", ["<x>", "<y>"], r"1 places {} for 2 object"),
            ("{} {} {}", ["<x>", "<y>"], r"3 places {} for 2 object"),
            ("a photo of {}", [], r"1 places {} for 0 object"),
            ("a \0 of {}", ["<x>"], r"'a \\x00 of {}' holds a NUL character: remove it"),
            ("\0", [], "holds a NUL character"),
        ],
    )
    def test_refuses_what_does_not_fit(self, prompt, phrases, message):
        with pytest.raises(ObjdriveError, match=message):
            fill_prompt(prompt, phrases)


class TestPlaceObjects:
    @pytest.mark.parametrize(
        ("prompt", "classes", "placed"),
        [
            ("a photo of {} on grass", ["mug"], "a photo of {} on grass"),
            ("a photo of a mug", [], "a photo of a mug"),
            ("a Mug next to a mug", ["mug"], "a {} next to a mug"),
            ("a straw hat, red", ["straw hat"], "a {}, red"),
            ("mugs on grass", ["mug"], "{}, mugs on grass"),
            ("a c++ mug", ["c++"], "a {} mug"),
            ("on grass", ["mug"], "{}, on grass"),
            ("  ", ["mug"], "{}"),
            ("a mug and a plate", ["mug", "plate"], "{} and {}, a mug and a plate"),
            ("", ["mug", "plate", "cup"], "{} and {} and {}"),
        ],
    )
    def test_gives_every_object_a_place(self, prompt, classes, placed):
        assert place_objects(prompt, classes) == placed


@pytest.mark.parametrize(
    ("phrase", "token", "marked"),
    [
        ("{token}", "{token}", TOKEN_MARK),
        ("{token} {class}", "{token}", f"{TOKEN_MARK} mug"),
        ("<mug-1> mug", "<mug-1>", f"{TOKEN_MARK} mug"),
    ],
)
def test_a_phrase_is_marked_where_its_token_stands(phrase, token, marked):
    assert marked_phrase(phrase, "mug", token=token) == marked


class TestPhrasePlaces:
    def test_are_those_of_the_filled_prompts_tokens(self, tiny64):
        names = ["coffee cup", "rose"]
        places = phrase_places(tiny64.tokenizer, "a photo of a {} next to {} on grass", names)
        tokens = tiny64.tokenizer.convert_ids_to_tokens(
            list(tiny64.tokenize("a photo of a coffee cup next to rose on grass").ids)
        )
        assert [[tokens[place].removesuffix("</w>") for place in one] for one in places] == [
            ["coffee", "cup"],
            ["rose"],
        ]

    def test_of_one_phrase_in_several_places_are_all_of_them(self, tiny64):
        (places,) = phrase_places(tiny64.tokenizer, "{} and {}", ["rose"])
        assert places == (1, 3)
