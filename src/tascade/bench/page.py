"""`tascade report`: a pack's results as one page. It loads no model, and nothing that could."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tascade.bench.report import write_report
from tascade.bench.tuned import TunedView, tuned_view
from tascade.errors import ConfigError, PackError
from tascade.pack import Pack
from tascade.util.files import without_folders


def report_pack(pack: str | Path, results: Sequence[Path] = (), out: Path | None = None) -> Path:
    """Write a page from bench results, the pack's own last one by default. Returns its path.

    Raises:
        ConfigError: there is no result yet, a file is not one, or ``out`` is a folder.
    """
    opened = Pack.open(pack)
    files = list(results) or [opened.bench]
    loaded = []
    for file in files:
        try:
            loaded.append(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(
                "cannot read a bench result",
                got="no such file" if isinstance(error, FileNotFoundError) else error,
                wanted="JSON written by `tascade bench`",
                where=str(file),
                fix="run `tascade bench PACK --data TEST` first",
            ) from error
    page = out or opened.report
    if page.is_dir():
        raise ConfigError(
            "a page is a file, and this is a folder",
            got=str(page),
            wanted="a file's name",
            where="out",
            fix=f"write it to {page / 'report.html'}",
        )
    facts = {
        "model": without_folders(opened.info.model),
        "created": opened.info.created,
        "tascade": opened.info.tascade,
    }
    own, kept = opened.info.own_answers, opened.info.rows.get("references_kept", 0)
    facts["answers indexed"] = f"{own} of the model's own" if own else "reference answers"
    if own and kept:
        facts["answers indexed"] += f", {kept} references that no time was left to replace"
    title = f"tascade: {Path(pack).name}"
    write_report(page, loaded, title=title, pack=facts, tuned=_tuned_view(opened))
    return page


def _tuned_view(pack: Pack) -> TunedView | None:
    if not pack.tuned.is_dir():
        return None
    from tascade.enrich.tokens.stored import TOKENS_FILE, TUNING_FILE

    files = [pack.tuned / name for name in (TUNING_FILE, TOKENS_FILE)]
    try:
        return tuned_view(*(json.loads(file.read_bytes()) for file in files))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackError(
            "cannot read how the pack's model was tuned",
            got=f"{type(error).__name__}: {error}",
            wanted=f"{TUNING_FILE} and {TOKENS_FILE} as `tascade tune` writes them",
            where=str(pack.tuned),
            fix="tune again",
        ) from error
