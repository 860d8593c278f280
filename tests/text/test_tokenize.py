import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from qwen_scope.errors import InputError
from qwen_scope.text import tokenize


def strings(tokenizer, text, **options):
    return tokenize(tokenizer, [text], max_length=None, **options).strings[0]


def test_ids_and_mask_are_the_tokenizers_own(tokenizer):
    texts = ["the path", "a", "thé 中文"]
    tokens = tokenize(tokenizer, texts, max_length=50)
    assert len(tokens) == 3
    assert tokens.texts == texts
    for row, text in enumerate(texts):
        expected = tokenizer(text).input_ids
        kept = tokens.attention_mask[row].bool()
        assert tokens.input_ids[row, kept].tolist() == expected
        assert tokens.attention_mask[row].tolist() == [1] * len(expected) + [0] * (kept.numel() - len(expected))
        assert tokens.lengths[row] == len(expected) == len(tokens.offsets[row])
    left = tokenize(tokenizer, texts, max_length=50, padding_side="left")
    assert left.input_ids[1].tolist()[-1:] == tokenizer("a").input_ids
    assert left.attention_mask[1].tolist()[-2:] == [0, 1]


def test_a_character_split_over_tokens_shows_once(tokenizer):
    assert strings(tokenizer, "the 中!") == ["the", " ", "中", "", "", "!"]
    assert tokenize(tokenizer, ["é中"], max_length=None).offsets[0] == [(0, 1), (0, 1), (1, 2), (1, 2), (1, 2)]


def test_a_composed_accent_stays_with_its_letter(tokenizer):
    assert strings(tokenizer, "e\u0301x") == ["e", "\u0301", "x"]  # two letters typed, one after normalising


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_the_strings_join_to_the_text(tokenizer, text):
    tokens = tokenize(tokenizer, [text], max_length=None)
    assert "".join(tokens.strings[0]) == text
    assert len(tokens.strings[0]) == tokens.input_ids.shape[1]


def test_characters_the_tokenizer_drops_still_show(tokenizer):
    other = tiny.with_bos(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Strip()
    assert strings(other, "  a b \n") == ["<bos>", "  a", " ", "b \n"]


def test_bos_comes_from_the_tokenizer_alone(tokenizer):
    assert strings(tokenizer, "a") == ["a"]
    other = tiny.with_bos(tokenizer)
    assert strings(other, "a") == ["<bos>", "a"]
    assert tokenize(other, ["a"], max_length=None).offsets[0][0] == (0, 0)
    # a chat template writes it, so it must not come twice
    assert strings(other, "a", chat="default") == ["<bos>", "a"]


def test_chat_modes(tokenizer):
    def text(chat):
        return tokenize(tokenizer, ["hi"], max_length=None, chat=chat).texts[0]

    turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert text("default") == turn
    assert text("thinking") == turn
    assert text("non_thinking") == turn + "<think>\n\n</think>\n\n"
    assert "".join(strings(tokenizer, "hi", chat="non_thinking")) == text("non_thinking")
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    tokens = tokenize(tokenizer, [messages], max_length=None, chat="default")
    assert tokens.texts[0] == "<|im_start|>system\nbe kind<|im_end|>\n" + turn
    assert tokens.strings[0][0] == "<|im_start|>"


def test_truncation_is_asked_for(tokenizer):
    with pytest.raises(InputError, match="text 1 has 6 tokens and the context holds 4; shorten it or pass truncate"):
        tokenize(tokenizer, ["abcd", "abcdef"], max_length=4)
    tokens = tokenize(tokenizer, ["abcd", "abcdef", "abc中"], max_length=4, truncate=True)
    assert tokens.lengths == [4, 4, 4]
    assert tokens.strings[1] == ["a", "b", "c", "d"]
    assert tokens.strings[2] == ["a", "b", "c", "中"]
    assert tokens.attention_mask.all()


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        ([], {}, "no text"),
        ("abc", {}, "put the one text into a list"),
        (["a", ""], {}, "text 1 is empty"),
        (["\ud800"], {}, "text 0 is not valid Unicode"),
        ([[{"role": "user", "content": "a"}]], {}, "pass chat='default'"),
        ([[{"role": "user", "content": ""}]], {"chat": "default"}, "text 0 is empty"),
        (["a"], {"chat": "think"}, "chat is one of default, thinking, non_thinking"),
        (["a"], {"padding_side": "up"}, "'left' or 'right'"),
    ],
)
def test_bad_texts_are_refused(tokenizer, texts, options, says):
    with pytest.raises(InputError, match=says):
        tokenize(tokenizer, texts, max_length=None, **options)


def test_templates_that_cannot_are_refused(tokenizer):
    other = tiny.with_bos(tokenizer)
    with pytest.raises(InputError, match="no thinking switch; pass chat='default'"):
        tokenize(other, ["a"], max_length=None, chat="thinking")
    other.chat_template = None
    with pytest.raises(InputError, match="has no chat template"):
        tokenize(other, ["a"], max_length=None, chat="default")


def test_the_tokenizer_is_left_as_it_was(tokenizer):
    before = tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side
    tokenize(tokenizer, ["a", "the"], max_length=1, truncate=True, padding_side="left")
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer.padding_side) == before
