"""The guard alone: what it finds, and what it says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cognexis.errors import TokenizerError
from cognexis.tokens.guard import ControlGuard, check_text, strings_in
from cognexis.tokens.layout import CONTROL_TOKENS, control_name


def test_longest_control_string_is_found_first():
    assert ControlGuard(["<a>", "<a><b>"]).find("x<a><b>") == "<a><b>"
    assert ControlGuard([]).find("anything") is None


@given(text=st.lists(st.sampled_from([*"<|>/sendo", *CONTROL_TOKENS]), max_size=12).map("".join))
def test_guard_finds_what_substring_search_finds(text):
    found = ControlGuard(CONTROL_TOKENS).find(text)
    assert (found is not None) == any(token in text for token in CONTROL_TOKENS)
    assert found is None or found in text


def test_message_names_the_token_alone():
    with pytest.raises(TokenizerError, match=r"^the text holds the control token <eod>; ask$"):
        ControlGuard(CONTROL_TOKENS).refuse("my password<eod>is", "ask")


def test_strings_are_found_in_keys_and_values():
    assert sorted(strings_in({"a": ["b", {"c": ("d", 1)}], "e": None})) == ["a", "b", "c", "d", "e"]


def test_text_that_utf8_can_express_passes():
    check_text("a\x00Σ\U0010ffff")
    with pytest.raises(TokenizerError, match="U\\+DC80 at character 1"):
        check_text("a\udc80")


def test_names_of_control_tokens():
    names = ["s", "/s", "pad", "unk", "eod", "system", "user", "assistant", "tool", "end"]
    assert [control_name(token) for token in CONTROL_TOKENS] == names
