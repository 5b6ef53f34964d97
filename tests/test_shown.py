"""What a model and a result look like at a Python prompt and in a notebook."""

from __future__ import annotations

from pathlib import Path

from tascade.core import Generation, Source
from tascade.model import TaskModel

RESULT = Generation(
    [5, 6, 7, 8],
    "<b>SELECT</b> 1",
    "stop",
    sources=[Source.TARGET, Source.CORPUS, Source.CORPUS, Source.BOTH],
    forwards=2,
    stepped_tokens=4,
)


def test_a_result_says_who_drafted_how_many_tokens_by_name() -> None:
    assert RESULT.drafted_by == {"target": 1, "corpus": 2, "both": 1}
    assert Generation([]).drafted_by == {}
    shown = repr(RESULT)
    for part in (
        "text='<b>SELECT</b> 1'",
        "tokens=4",
        "forwards=2",
        "tokens_per_step=2.00",
        "'corpus': 2",
        "finish_reason='stop'",
    ):
        assert part in shown


def test_a_long_text_is_shortened() -> None:
    shown = repr(Generation([1], "word\n" * 1000))
    assert len(shown) < 300
    assert "\n" not in shown
    assert "..." in shown


def test_a_notebook_gets_an_escaped_table() -> None:
    page = RESULT._repr_html_()
    assert page.startswith("<table>")
    assert "&lt;b&gt;SELECT&lt;/b&gt;" in page
    assert "<b>" not in page


def test_a_model_says_what_it_is_made_of(ticket_pack: Path) -> None:
    made = TaskModel.from_pretrained(ticket_pack, dtype="float32")
    shown = repr(made)
    assert shown.startswith("TaskModel(model=")
    for part in (
        str(ticket_pack),
        f"outputs={made.corpus.n_documents}",
        "head=full",
        "dtype=float32",
    ):
        assert part in shown
    assert str(made.corpus.n_documents) in made._repr_html_()
