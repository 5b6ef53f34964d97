"""Metrics: known values, bounds, and refusals."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tascade.bench import metrics
from tascade.errors import TascadeError

unhurried = settings(deadline=None)  # a busy machine is no failure

positive = st.floats(1e-6, 1e6)
shares = st.floats(0, 1)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    # No lone surrogates: they are no text, and json.dumps escapes them anyway.
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["a", "b", "[]", ".a"]), inner, max_size=3)
    ),
    max_leaves=12,
)
documents = json_values.filter(lambda value: isinstance(value, dict | list))


# --- quality ------------------------------------------------------------------------------------


def test_exact_match_ignores_runs_of_whitespace():
    assert metrics.exact_match(["a  b\n", "c"], ["a b", "d"]) == 0.5
    assert metrics.exact_match(["ab"], ["a b"]) == 0.0


@unhurried
@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=8))
def test_exact_match_is_a_share(rows):
    texts, references = zip(*rows, strict=True)
    assert 0 <= metrics.exact_match(texts, references) <= 1
    assert metrics.exact_match(texts, texts) == 1


@pytest.mark.parametrize(
    ("text", "reference", "score"),
    [
        ('{"a": 1, "b": 2}', '{"a": 1, "b": 3}', 0.5),
        ('{"a": 1}', '{"a": 1, "b": 3}', 2 / 3),
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ("[1, 2, 2]", "[2, 1, 2]", 1.0),
        ("[1, 2, 2]", "[1, 2]", 4 / 5),
        ('{"a": 1.0}', '{"a": 1}', 1.0),
        ('{"a": true}', '{"a": 1}', 0.0),
        ('{"a": "1"}', '{"a": 1}', 0.0),
        ('{"a": null}', '{"a": "None"}', 0.0),
        ('{"a": []}', '{"a": {}}', 0.0),
        ('{"a": []}', '{"a": []}', 1.0),
        ("{}", "{}", 1.0),
        ('{"a": [1]}', '{"a": {"[]": 1}}', 0.0),
        ('{"items": [{"k": 1}, {"k": 2}]}', '{"items": [{"k": 2}, {"k": 1}]}', 1.0),
        ("not json", '{"a": 1}', 0.0),
        ('{"a": NaN}', '{"a": 1}', 0.0),
        ("1", '{"a": 1}', 0.0),
        ("", "[1]", 0.0),
    ],
)
def test_json_field_f1_of_one_row(text, reference, score):
    assert metrics.json_field_f1([text], [reference]) == pytest.approx(score)


def test_json_field_f1_is_micro_averaged_and_invalid_output_scores_its_row_zero():
    texts = ['{"a": 1, "b": 2, "c": 3}', "oops"]
    references = ['{"a": 1, "b": 2, "c": 3}', '{"a": 1}']
    assert metrics.json_field_f1(texts, references) == pytest.approx(2 * 3 / (3 + 4))


def test_json_field_f1_is_none_where_the_task_is_not_json():
    assert metrics.json_field_f1(["{}", "x", "x"], ["{}", "plain", "text"]) is None
    assert metrics.json_field_f1(["3"], ["3"]) is None
    # Exactly half is enough, and the other rows are left out.
    assert metrics.json_field_f1(["{}", "x"], ["{}", "plain"]) == 1.0


@pytest.mark.parametrize("depth", [metrics.MAX_JSON_DEPTH + 1, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_json_field_f1_survives_deep_nesting(depth, opening, closing):
    deep = opening * depth + "1" + closing * depth
    assert metrics.json_field_f1([deep], ['{"a": 1}']) == 0.0
    assert metrics.json_field_f1(["{}"], [deep]) is None


def test_json_field_f1_survives_huge_numbers():
    assert metrics.json_field_f1(["[" + "9" * 10_000 + "]"], ["[1e999]"]) == 0.0


@unhurried
@given(st.lists(st.tuples(documents, documents), min_size=1, max_size=4))
def test_json_field_f1_is_a_share_and_symmetric(rows):
    texts = [json.dumps(a) for a, _ in rows]
    references = [json.dumps(b) for _, b in rows]
    score = metrics.json_field_f1(texts, references)
    assert score is not None
    assert 0 <= score <= 1
    assert score == metrics.json_field_f1(references, texts)
    assert metrics.json_field_f1(texts, texts) == 1


def test_quality_holds_what_applies():
    assert metrics.quality(["a"], ["a"]) == {"exact_match": 1.0}
    assert metrics.quality(['{"a":1}'], ['{"a": 1}']) == {"exact_match": 0.0, "json_field_f1": 1.0}


# --- speed --------------------------------------------------------------------------------------


def test_speedup_pairs_the_repeats():
    # The machine slowed to a third in repeat 2: the ratios do not see it.
    assert metrics.speedup([1, 3, 2], [2, 6, 5]) == {"median": 2.0, "low": 2.0, "high": 2.5}


def test_speedup_spread_turns_to_quartiles_at_eight_repeats():
    plain = [float(n) for n in range(1, 9)]
    assert metrics.speedup([1.0] * 7, plain[:7]) == {"median": 4.0, "low": 1.0, "high": 7.0}
    assert metrics.speedup([1.0] * 8, plain) == {"median": 4.5, "low": 2.75, "high": 6.25}


@unhurried
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=12))
def test_speedup_is_ordered_and_within_the_ratios(rows):
    ours, plain = zip(*rows, strict=True)
    result = metrics.speedup(ours, plain)
    ratios = [p / o for o, p in rows]
    slack = 1e-9 * max(ratios)
    assert min(ratios) - slack <= result["low"] <= result["median"] + slack
    assert result["median"] <= result["high"] + slack <= max(ratios) + 2 * slack


@unhurried
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50))
def test_percentiles_are_ordered_and_bounded(values):
    result = metrics.percentiles(values, (0, 50, 99, 100))
    assert list(result) == ["p0", "p50", "p99", "p100"]
    assert result["p0"] == min(values)
    assert result["p100"] == max(values)
    assert result["p0"] <= result["p50"] <= result["p100"]


def test_percentiles_by_default():
    result = metrics.percentiles(range(101))
    assert result == {"p50": 50.0, "p99": 99.0}


# --- drafts -------------------------------------------------------------------------------------


def test_acceptance_by_position_counts_nodes_of_a_depth():
    depths = [1, 2, 3, 1, 2, 1, 1]
    taken = [True, True, False, True, False, False, True]
    assert metrics.acceptance_by_position(depths, taken) == [0.75, 0.5, 0.0]
    assert metrics.acceptance_by_position([], []) == []


def test_acceptance_by_position_stops_at_a_gap():
    assert metrics.acceptance_by_position([1, 3], [True, True]) == [1.0]
    assert metrics.acceptance_by_position([2], [True]) == []


@unhurried
@given(st.lists(st.tuples(st.integers(1, 20), st.booleans()), max_size=60))
def test_acceptance_by_position_gives_shares(nodes):
    result = metrics.acceptance_by_position([d for d, _ in nodes], [a for _, a in nodes])
    assert all(0 <= share <= 1 for share in result)
    assert len(result) <= max((d for d, _ in nodes), default=0)


def test_calibration_error_of_known_cases():
    def ece(predicted, realised, bins=10):
        return metrics.calibration(predicted, realised, bins)["ece"]

    assert ece([0.25] * 4, [True, False, False, False]) == pytest.approx(0.0)
    assert ece([1.0, 1.0], [False, False]) == 1.0
    # Two bins: 3 nodes off by 0.1 each, 1 node off by 0.3.
    assert ece([0.9, 0.9, 0.9, 0.3], [True, True, True, False]) == pytest.approx(0.15)
    # One bin for all hides what two would show.
    assert ece([0.0, 1.0], [True, False], bins=1) == pytest.approx(0.0)


@unhurried
@given(st.lists(st.tuples(shares, st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_is_bounded_and_loses_no_node(nodes, bins):
    predicted, realised = zip(*nodes, strict=True)
    result = metrics.calibration(predicted, realised, bins)
    assert 0 <= result["ece"] <= 1
    assert sum(b["count"] for b in result["bins"]) == len(nodes)
    assert all(0 <= b["predicted"] <= 1 and 0 <= b["realised"] <= 1 for b in result["bins"])


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.exact_match(["a"], []),
        lambda: metrics.exact_match([], []),
        lambda: metrics.json_field_f1(["{}"], []),
        lambda: metrics.quality([], []),
        lambda: metrics.speedup([1.0], [1.0, 2.0]),
        lambda: metrics.speedup([], []),
        lambda: metrics.speedup([0.0], [1.0]),
        lambda: metrics.speedup([math.nan], [1.0]),
        lambda: metrics.percentiles([]),
        lambda: metrics.percentiles([math.inf]),
        lambda: metrics.acceptance_by_position([0], [True]),
        lambda: metrics.acceptance_by_position([1], []),
        lambda: metrics.calibration([], []),
        lambda: metrics.calibration([1.5], [True]),
        lambda: metrics.calibration([math.nan], [True]),
        lambda: metrics.calibration([0.5], [True], bins=0),
    ],
)
def test_nothing_is_measured_of_nonsense(call):
    with pytest.raises(TascadeError, match="got:"):
        call()
