"""The bench result's format, and the page made of it."""

import copy
import json
import math
import re
from html.parser import HTMLParser

import jsonschema
import pytest

from tascade.bench.charts import Bar, bar_chart
from tascade.bench.report import SOURCES, render, write_report
from tascade.bench.schema import SCHEMA_VERSION, load_schema, promise, validate
from tascade.core import Source
from tascade.errors import TascadeError

_NONE = "–"  # what the page shows where there is no number
VOID = {"meta", "br", "hr", "img", "input", "link", "col"}

MACHINE = {
    "cpu": "fixture",
    "cores": 2,
    "threads": 2,
    "memory_gb": 8.0,
    "os": "Linux",
    "python": "3.11",
    "torch": "2.6",
    "transformers": "5.10",
    "tascade": "0.1.0",
    "load_average": [0.1, 0.2, 0.3],
}


def minimal() -> dict:
    """The least that is a result. The numbers are a fixture, not a measurement."""
    return {
        "schema": 1,
        "created": "2026-01-01T00:00:00+00:00",
        "command": "tascade bench PACK --data test.jsonl --json",
        "machine": dict(MACHINE),
        "model": "tiny",
        "dtype": "float32",
        "pack": None,
        "data": {"path": "data/test.jsonl", "sha256": "0" * 64, "examples": 4},
        "settings": {"max_new_tokens": 8, "temperature": 0.0, "batch": 1, "repeats": 2},
        "methods": {
            "plain": {
                "tokens": 20,
                "steps": 16,
                "seconds": [4.0, 5.0],
                "tokens_per_second": 4.4,
                "quality": {"exact_match": 0.5},
            },
            "tasc-spec": {
                "tokens": 20,
                "seconds": [2.0, 2.0],
                "tokens_per_second": 10.0,
                "speedup": {"median": 2.25, "low": 2.0, "high": 2.5},
                "guarantee": "lossless",
            },
        },
    }


def full() -> dict:
    result = minimal()
    result["pack"] = "packs/fixture"
    result["methods"]["tasc-spec"].update(
        steps=6,
        tokens_per_step=2.67,
        prefill_seconds=[0.1, 0.1],
        decode_tokens_per_second=11.0,
        drafted_per_step=3.5,
        draft_us={"p50": 41.0, "p99": 97.0},
        by_source={"target": 6, "corpus": 8, "context": 4, "both": 2, "other": 0},
        accepted_in_steps=[2, 0, 3, 1],
        acceptance_by_depth=[0.8, 0.5, 0.25],
        calibration={"ece": 0.05, "bins": [{"predicted": 0.5, "realised": 0.55, "count": 12}]},
        identical=3,
        differing=1,
        near_ties=1,
        quality={"exact_match": 0.5, "json_field_f1": 0.75},
        versus={"hf-prompt-lookup": {"median": 1.5, "low": 1.4, "high": 1.6}},
        settings={"max_nodes": 16},
    )
    result["methods"]["hf-prompt-lookup"] = {
        "tokens": 20,
        "seconds": [3.0, 3.0],
        "tokens_per_second": 6.7,
        "speedup": {"median": 1.5, "low": 1.3, "high": 1.7},
        "guarantee": "lossless",
    }
    result["methods"]["arctic-suffix"] = {"skipped": "arctic_inference is not installed"}
    return result


def change(result: dict, path: str, value: object) -> dict:
    """A copy with one value replaced; ``...`` removes it."""
    result = copy.deepcopy(result)
    *parents, last = path.split("/")
    node = result
    for key in parents:
        node = node[key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return result


class Page(HTMLParser):
    """Collects text, tags and attributes; fails on unbalanced tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


# --- the format ---------------------------------------------------------------------------------


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(load_schema())
    assert load_schema()["properties"]["schema"]["const"] == SCHEMA_VERSION
    sources = load_schema()["$defs"]["measured"]["properties"]["by_source"]["properties"]
    assert tuple(sources) == SOURCES == tuple(s.name.lower() for s in Source)


@pytest.mark.parametrize("result", [minimal(), full()])
def test_results_pass_and_survive_json(result):
    validate(result)
    validate(json.loads(json.dumps(result)))
    validate(change(result, "machine/accelerator", "some GPU"))
    validate(change(result, "machine/load_average", None))
    validate(change(result, "settings/seed", 0))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((key, ...) for key in minimal()),
        *((f"machine/{key}", ...) for key in MACHINE),
        ("schema", 2),
        ("schema", "1"),
        ("created", "yesterday"),
        ("model", 7),
        ("data/sha256", ...),
        ("data/examples", "4"),
        ("settings/repeats", ...),
        ("methods", []),
        ("methods/plain", ...),
        ("methods/plain", {"skipped": "no time"}),
        ("methods/plain/quality", ...),
        ("methods/plain/steps", ...),
        ("methods/plain/seconds", 4.0),
        ("methods/plain/tokens_per_second", math.nan),
        ("methods/plain/tokens_per_second", math.inf),
        ("methods/tasc-spec", 3),
        ("methods/tasc-spec", {}),
        ("methods/tasc-spec/guarantee", ...),
        ("methods/tasc-spec/speedup", ...),
        ("methods/tasc-spec/speedup/low", ...),
        ("methods/tasc-spec/speedup/low", 2.4),
        ("methods/tasc-spec/speedup", 2.25),
        ("methods/tasc-spec/seconds", [2.0]),
        ("methods/tasc-spec/prefill_seconds", [0.1]),
        ("methods/tasc-spec/near_ties", 2),
        ("methods/tasc-spec/by_source/both", ...),
        ("methods/tasc-spec/draft_us/p99", ...),
        ("methods/tasc-spec/calibration/bins", [{"predicted": 0.5}]),
        ("methods/tasc-spec/acceptance_by_depth", ["all"]),
        ("methods/tasc-spec/accepted_in_steps", [2, -1]),
        ("methods/tasc-spec/versus/hf-prompt-lookup/high", 1.0),
    ],
)
def test_broken_results_are_refused(path, value):
    with pytest.raises(TascadeError, match="fix:"):
        validate(change(full(), path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("extra", 1),
        ("data/sha256", "abc"),
        ("data/examples", 0),
        ("machine/accelerator", {}),
        ("methods/tasc-spec/guarantee", "probably"),
        ("methods/tasc-spec/tokens", -1),
        ("methods/tasc-spec/seconds", [0.0, 1.0]),
        ("methods/tasc-spec/acceptance_by_depth", [1.5]),
        ("methods/tasc-spec/tokens_per_sec", 1.0),
        ("methods/arctic-suffix/skipped", ""),
        ("methods/arctic-suffix/tokens", 3),
    ],
)
def test_the_whole_schema_is_held(path, value):
    where = re.escape(path.rsplit("/", 1)[0].replace("/", ".")) if "/" in path else "bench result"
    with pytest.raises(TascadeError, match=where):
        validate(change(full(), path, value))


@pytest.mark.parametrize("result", [None, [], "text", {}])
def test_what_is_no_result_at_all_is_refused(result):
    with pytest.raises(TascadeError):
        validate(result)


# --- the page -----------------------------------------------------------------------------------


def test_a_full_page_shows_every_number_with_its_guarantee():
    page = Page(render([full()], title="Fixture", pack={"documents": 12, "stages": ["spec"]}))
    for wanted in (
        "2.25×",
        "2.00–2.50×",
        "minimum and maximum of 2 repeats",
        "3 of 4 outputs identical to plain decoding; 1 differ, 1 of them at a tie up to rounding",
        "1.50× (1.40–1.60×) the speed of hf-prompt-lookup, the fastest peer (lossless)",
        "not run: arctic_inference is not installed",
        "ECE 0.050",
        "40.0%",  # of the tokens came from the corpus
        "0" * 64,
        "tascade bench PACK --data test.jsonl --json",
        "packs/fixture",
        "max nodes",
        "documents",
    ):
        assert wanted in page.text, wanted
    assert page.count("svg") == 5
    assert page.text.count("lossless") >= 6


def test_a_minimal_page_leaves_out_what_it_has_no_data_for():
    page = Page(render([minimal()], title="Fixture"))
    assert page.count("svg") == 1
    for absent in ("None", "Undefined", "nan", "Calibration of drafts", "Pack", "Summary"):
        assert absent not in page.text


def test_plain_alone_makes_a_page():
    page = Page(render([change(minimal(), "methods/tasc-spec", ...)] * 2, title="Fixture"))
    assert "plain only" in page.text


@pytest.mark.parametrize("results", [[], [minimal()], [full()], [minimal(), full()]])
def test_the_page_stands_alone(results):
    html = render(results, title="Fixture")
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import|//", html)
    assert page.count("script") == page.count("link") == page.count("img") == 0
    loaders = {"src", "href", "srcset", "data", "action"}
    links = [value for _, attrs in page.tags for key, value in attrs.items() if key in loaders]
    assert all(link.startswith("#") for link in links)


@pytest.mark.parametrize("results", [[minimal()], [full()], [minimal(), full()]])
def test_the_page_is_accessible(results):
    page = Page(render(results, title="Fixture"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")
    assert page.count("table") == page.count("caption")
    assert page.count("svg") == page.count("desc")
    named = {i for _, attrs in page.tags if (i := attrs.get("aria-labelledby"))}
    assert named <= set(ids)
    assert {"lang": "en"} in [attrs for tag, attrs in page.tags if tag == "html"]


def test_what_users_wrote_is_text():
    evil = '"><script>alert(1)</script>&'
    result = full()
    for path in ("model", "command", "data/path", "machine/cpu", "pack", "dtype"):
        result = change(result, path, evil)
    result["methods"][f"tasc-{evil}"] = result["methods"].pop("tasc-spec")
    result["methods"]["arctic-suffix"]["skipped"] = evil
    result["settings"][evil] = evil
    page = Page(render([result, result], title=evil, pack={evil: {evil: evil}}))
    assert page.count("script") == 0
    assert "<script>alert(1)</script>" in page.text


def test_several_results_become_sections_below_a_summary():
    other = change(minimal(), "data/path", "data/sql/heldout.jsonl")
    page = Page(render([full(), other], title="Two tasks"))
    anchors = [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "run"]
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert anchors == ["run-1", "run-2"]
    assert links == ["#run-1", "#run-2"]
    assert page.text.count("sql/heldout.jsonl") >= 3
    assert "Summary" in page.text


def test_runs_of_one_pack_are_told_apart():
    other = change(minimal(), "data/path", "data/sql/heldout.jsonl")
    page = Page(render([minimal(), other, minimal()], title="Three runs"))
    name = "/".join((minimal()["pack"] or minimal()["data"]["path"]).split("/")[-2:])
    assert page.text.count(f"{name}, run 1") == page.text.count(f"{name}, run 2") == 2
    assert f"{name}, run 3" not in page.text
    assert "sql/heldout.jsonl, run" not in page.text


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.8, 0.9, "slower"), (0.8, 1.1, "no clear difference"), (1.1, 1.2, None)],
)
def test_the_headline_claims_no_more_than_the_spread_allows(low, high, verdict):
    ratio = {"median": (low + high) / 2, "low": low, "high": high}
    text = Page(render([change(minimal(), "methods/tasc-spec/speedup", ratio)], title="F")).text
    assert ("as fast as plain decoding" in text) == (verdict is None)
    for word in ("slower", "no clear difference"):
        assert (word in text) == (word == verdict)


def test_the_headline_prefers_lossless():
    result = minimal()
    fast = {"speedup": {"median": 9.0, "low": 9.0, "high": 9.0}, "guarantee": "approximate"}
    result["methods"]["tasc-faster"] = {**result["methods"]["tasc-spec"], **fast}
    assert "with tasc-spec" in Page(render([result], title="Fixture")).text


def test_a_lossless_method_that_differs_is_pointed_out():
    warning = "A lossless method must not do that"
    assert warning not in render([full()], title="Fixture")
    assert warning in render([change(full(), "methods/tasc-spec/near_ties", 0)], title="Fixture")


def test_unequal_token_counts_are_pointed_out():
    assert "wrote" not in Page(render([full()], title="Fixture")).text
    page = Page(render([change(full(), "methods/tasc-spec/tokens", 12)], title="Fixture"))
    assert "tasc-spec wrote 12" in page.text


def test_a_broken_result_makes_no_page():
    with pytest.raises(TascadeError):
        render([minimal(), change(minimal(), "methods", ...)], title="Fixture")


def test_bars_keep_to_their_drawing():
    bars = [Bar("a name that is much too long for its place", 0.0, 0.0, 0.0, "0", "x", "ours")]
    page = Page(bar_chart(bars, "Nothing", "tokens/s"))
    assert "…" in page.text
    for bars in ([], [Bar("a", 3.0, 2.0, 1e6, "3", "x", "ours")]):
        svg = bar_chart(bars, "Speed", "tokens/s")
        assert all(float(x) <= 720 for x in re.findall(r'\b(?:x|x1|x2|width)="([^"]+)"', svg))


# --- the file -----------------------------------------------------------------------------------


def test_write_report_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "new" / "report.html"
    write_report(path, [minimal()], title="First \udcff")
    write_report(str(path), [full()], title="Second")
    assert path.read_text("utf-8") == render([full()], title="Second")
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_a_failed_write_leaves_the_old_report(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_report(path, [minimal()], title="Old")
    before = path.read_bytes()

    def full_disk(_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="disk full"):
        write_report(path, [full()], title="New")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def tailored() -> dict:
    """A result with a tailored head, as one without an account of memory gives it."""
    result = minimal()
    method = copy.deepcopy(result["methods"]["tasc-spec"]) | {"guarantee": "approximate"}
    method["settings"] = {
        "head": {"rows": 710, "of_rows": 8192, "bytes": 1_849_344, "of_bytes": 8_388_608},
        "counts": {"tokens": 2053, "misses": 6},
    }
    result["methods"]["tailored-masked"] = method
    return result


def memory(vocabulary: int, peak: int, **more: int) -> dict:
    """What a process needed. The numbers are a fixture, not a measurement."""
    start = {"start_bytes": 411_000_000, "start_anonymous_bytes": 222_000_000}
    ends = {"peak_bytes": peak, "anonymous_bytes": peak // 2}
    return {
        "vocabulary_bytes": vocabulary,
        "model_bytes": vocabulary + 7_000_000,
        **start,
        **ends,
        **more,
    }


def memory_rows(result: dict) -> dict[str, list[str]]:
    """The cells of the table of memory, by method."""
    html = render([result], title="a title")
    table = html[html.index("<caption>Memory") :].split("</table>")[0]
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>(.*?)</tr>', table, re.DOTALL)
    return {name: re.findall(r"<td[^>]*>(.*?)</td>", cells, re.DOTALL) for name, cells in rows}


def test_a_tailored_head_is_ours_and_its_misses_are_told():
    validate(tailored())
    rows = memory_rows(tailored())
    assert rows == {
        "tailored-masked": ["710 of 8,192", "6 of 2,053", "1.85", _NONE, _NONE, _NONE],
    }
    page = Page(render([tailored()], title="a title"))
    assert "the fastest peer" not in page.text
    assert "Most resident" not in page.text  # nothing was measured


def test_memory_is_shown_beside_what_the_head_lacks():
    result = tailored()
    result["methods"]["plain"]["memory"] = memory(8_388_608, 640_000_000)
    result["methods"]["tailored-masked"]["memory"] = memory(2_000_000, 600_000_000)
    result["methods"]["tasc-spec"]["memory"] = {"skipped": "no room <here>"}
    validate(result)
    rows = memory_rows(result)
    assert rows == {
        "plain": ["all", _NONE, "8.39", "15.4", "640.0", "320.0"],
        "tasc-spec": ["all", _NONE, "not measured: no room &lt;here&gt;"],
        "tailored-masked": ["710 of 8,192", "6 of 2,053", "2.00", "9.00", "600.0", "300.0"],
    }
    text = " ".join(Page(render([result], title="a title")).text.split())
    assert "Libraries alone take 411.0 MB, 222.0 of them anonymous" in text
    assert "they belong to the system" in text
    on_device = memory(2_000_000, 600_000_000, device_peak_bytes=44_000_000)
    rows = memory_rows(change(result, "methods/tailored-masked/memory", on_device))
    assert rows["tailored-masked"][-1] == "44.0"
    assert rows["plain"][-1] == _NONE
    for broken in (
        change(result, "methods/plain/memory/peak_bytes", ...),
        change(result, "methods/plain/memory/model_bytes", "9 MB"),
        change(result, "methods/tasc-spec/memory/skipped", 3),
    ):
        with pytest.raises(TascadeError, match="fix:"):
            validate(broken)


def test_memory_of_plain_alone_says_nothing_of_heads():
    result = change(minimal(), "methods/plain/memory", memory(8_388_608, 640_000_000))
    assert list(memory_rows(result)) == ["plain"]
    assert "tailored" not in Page(render([result], title="a title")).text
    assert "<caption>Memory" not in render([minimal()], title="a title")


@pytest.mark.parametrize(
    ("dtype", "identical", "differing", "said"),
    [
        ("float32", 5, 0, "lossless"),
        ("bfloat16", 5, 0, "identical, 5 of 5"),
        ("bfloat16", 4, 1, "same up to rounding, 4 of 5"),
        ("float16", None, None, "same up to rounding"),
    ],
)
def test_what_is_promised_is_what_was_counted(dtype, identical, differing, said):
    method = {"guarantee": "lossless"}
    if identical is not None:
        method |= {"identical": identical, "differing": differing}
    assert promise(method, dtype) == said
    assert promise({"guarantee": "approximate", "identical": 5}, dtype) == "approximate"


def test_a_badge_in_half_precision_says_the_count():
    result = full()
    result["dtype"] = "bfloat16"
    page = render([result], title="t")
    assert ">lossless</span></td>" not in page
    assert "identical, " in page or "same up to rounding, " in page


def test_a_machine_that_was_not_quiet_is_told_of():
    calm = change(full(), "methods/tasc-spec/speedup", {"median": 2.25, "low": 2.0, "high": 2.5})
    assert "not quiet" not in render([calm], title="t")
    wild = change(full(), "methods/tasc-spec/speedup", {"median": 14.8, "low": 5.65, "high": 23.9})
    assert "tasc-spec 5.65x to 23.90x" in render([wild], title="t")
    one = change(wild, "data/examples", 1)  # of so little nobody knows what made it scatter
    assert "not quiet" not in render([one], title="t")


def test_answers_that_end_at_the_limit_are_told_of():
    assert "end at the limit" not in render([full()], title="t")
    cut = change(full(), "methods/plain/cut", 2)
    limit, rows = cut["settings"]["max_new_tokens"], cut["data"]["examples"]
    assert f"2 of {rows} answers end at the limit of {limit} tokens" in render([cut], title="t")


def test_what_reading_prompts_takes_is_told_where_it_is_much():
    result = change(full(), "methods/plain/seconds", [9.0, 11.0])
    result = change(result, "methods/tasc-spec/seconds", [2.0, 2.0])
    result = change(result, "methods/plain/prefill_seconds", [0.4, 0.4])
    assert "Reading the prompts" not in render([result], title="t")
    result = change(result, "methods/plain/prefill_seconds", [0.9, 1.1])
    said = render([result], title="t")
    # Whatever tasc-spec's own prefill takes, which verifies drafts too: 10 s are 2 s, 5x; so behind
    # the second that both read, it must be more.
    assert "takes 1 s of plain decoding&#39;s 10 s and of tasc-spec&#39;s 2 s" in said
    assert "the rest is 9.00x as fast." in said


def test_where_transformers_is_sooner_than_plain_ours_is_held_against_it():
    result = full()
    theirs = dict(result["methods"]["hf-prompt-lookup"])
    result["methods"]["hf-generate"] = theirs
    ours = result["methods"]["tasc-spec"]
    ours["versus"]["hf-generate"] = {"median": 1.1, "low": 1.05, "high": 1.2}
    plain = result["methods"]["plain"]["tokens_per_second"]
    said = "against it tasc-spec is 1.10x [1.05-1.20]"
    for factor, told in ((0.5, False), (1.05, False), (1.5, True)):
        theirs["tokens_per_second"] = factor * plain
        assert (said in render([result], title="t")) == told, factor


def test_more_speed_than_tokens_a_step_is_called_what_it_is():
    told = "tasc-spec 4.00x with 2.67"
    for median, said in ((2.6, False), (4.0, True)):
        ratio = {"median": median, "low": median, "high": median}
        result = change(full(), "methods/tasc-spec/speedup", ratio)
        assert (told in render([result], title="t")) == said
    theirs = change(full(), "methods/hf-prompt-lookup/tokens_per_step", 1.0)
    assert "cannot be right" not in render([theirs], title="t")  # 1.5x, by other code than plain's


def test_methods_without_others_to_be_held_against_have_no_table():
    alone = change(full(), "methods/tasc-spec/versus", {})
    assert "Methods against each other" not in render([alone], title="t")
    assert "Methods against each other" in render([full()], title="t")
