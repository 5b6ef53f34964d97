"""When a request ends, and what its text is."""

import pytest

from tascade.decode.sampling import SamplingParams
from tascade.decode.stop import StopRule
from tascade.errors import ConfigError
from tascade.testing import byte_tokenizer

END = 256


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def run(rule, ids):
    """How many tokens the rule takes."""
    for n in range(1, len(ids) + 1):
        if rule.is_last(ids[:n]):
            return n
    return None


def test_the_limit():
    rule = StopRule(SamplingParams(max_new_tokens=3))
    assert run(rule, [1, 2, 3, 4]) == 3
    assert (rule.reason, rule.remaining([1]), rule.text([1, 2])) == ("length", 2, "")


def test_end_tokens_and_ignoring_them(tokenizer):
    ids = [*b"ab", END, *b"cd"]
    rule = StopRule(SamplingParams(end_tokens=(END,)), tokenizer)
    assert run(rule, ids) == 3
    assert rule.reason == "stop"
    assert rule.text(ids[:3]) == "ab"
    assert run(StopRule(SamplingParams(end_tokens=(END,), ignore_end=True), tokenizer), ids) is None


def test_the_end_token_at_the_limit_is_a_stop(tokenizer):
    rule = StopRule(SamplingParams(end_tokens=(END,), max_new_tokens=2), tokenizer)
    assert run(rule, [97, END]) == 2
    assert rule.reason == "stop"


@pytest.mark.parametrize("stop", ["}", "é", "\n\n", '"}', "中文"])
def test_a_stop_string_ends_the_text_before_it(tokenizer, stop):
    said = "x" * 50 + "中é{"
    ids = list((said + stop + " and more").encode())
    rule = StopRule(SamplingParams(stop=("zzz", stop)), tokenizer)
    n = run(rule, ids)
    at = (said + stop).index(stop)
    assert ids[:n] == list((said[:at] + stop).encode())
    assert rule.text(ids[:n]) == said[:at]


def test_the_first_of_several_stop_strings_counts(tokenizer):
    rule = StopRule(SamplingParams(stop=("world", "lo")), tokenizer)
    assert run(rule, list(b"hello world")) == 5
    assert run(rule, list(b"none")) is None
    assert rule.text(list(b"hello world")) == "hel"


def test_an_extra_rule_is_asked_for_every_token():
    heard = []
    rule = StopRule(
        SamplingParams(end_tokens=(9,)), extra=lambda ids: heard.append(ids[-1]) or ids[-1] == 7
    )
    assert run(rule, [5, 6, 7, 8]) == 3
    assert (heard, rule.reason) == ([5, 6, 7], "stop")
    assert rule.is_last([9])
    assert heard[-1] == 9


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ConfigError, match="tokenizer"):
        StopRule(SamplingParams(stop=("x",)))
