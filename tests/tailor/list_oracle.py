"""The oracle of lists: what is wrong with one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tascade.tailor.profile import Profile
from tascade.tailor.required import lacking_bytes, pinned_tokens


def lint(profile: Profile, tokenizer: Any, ends: Sequence[int]) -> list[str]:
    """What is wrong with a list: tokens that it must have and has not. Empty when it is sound.

    That a tokenizer itself has no tokens for some bytes is a problem too, which no list can mend:
    it can say what it can read, and no other text.
    """
    rows = profile.vocab_size
    lacking = np.setdiff1d(pinned_tokens(tokenizer, ends), profile.ids)
    names = tokenizer.convert_ids_to_tokens([i for i in lacking.tolist() if 0 <= i < rows])
    found = [f"{name!r} is not in the list, and some texts cannot be said" for name in names]
    found += [f"end token {end} is not a row of the model" for end in ends if not 0 <= end < rows]
    unsaid = lacking_bytes(tokenizer)
    if unsaid:
        found.append(
            f"the tokenizer has no token for {len(unsaid)} of 256 bytes, and cannot say texts with "
            "characters that it does not know"
        )
    return found
