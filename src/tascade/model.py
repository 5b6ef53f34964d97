"""TaskModel: a model with what was learned about its task; generates the same words, sooner."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, cast

from tascade.core import Drafter, Generation, IntArray, Shown
from tascade.data.encode import Prompt, encode_prompt, end_tokens, fingerprint
from tascade.decode import products, row_counts
from tascade.decode.batch import BatchDecoder
from tascade.decode.batch_target import BatchTarget
from tascade.decode.generation import sampling_params
from tascade.decode.loop import Decoder, NodeBudget
from tascade.decode.prefixes import Prefixes
from tascade.decode.sampling import Processor, SamplingParams
from tascade.decode.supported import warn_of_tokens
from tascade.decode.target import Target
from tascade.decode.text import TextStream
from tascade.draft.budget import Budget, NoDrafter
from tascade.draft.costs import CostTable
from tascade.draft.measure import measure_cost
from tascade.draft.neural.combined import assisted
from tascade.draft.neural.draft_model import AssistantDrafter, open_assistant
from tascade.draft.neural.merged import MergedDrafter
from tascade.draft.neural.trained import TrainedDrafter, open_trained
from tascade.draft.ngram.drafter import NgramDrafter
from tascade.draft.ngram.mixer_calibration import Calibration
from tascade.draft.ngram.sources import open_task
from tascade.errors import ConfigError
from tascade.index.view import CorpusView
from tascade.load import ModelRef, load_model, machine_key
from tascade.pack import Pack
from tascade.tailor.offload.load import OffloadedModel, load_offloaded
from tascade.tailor.tailored import Tailored, check_assistant, tailor_pack, vocab_config
from tascade.util.cpu import dtype_name
from tascade.util.places import link_or_copy, publish

Prompts = Prompt | Sequence[str]


class TaskModel(Shown):
    """A model and a pack, ready to generate.

    One request is decoded at a time; calls from several threads wait for each other, whichever
    TaskModel of one loaded model they are made on. Streams take turns, step by step: any thread may
    read one, close it or drop it, and one that is left open stops nobody.

    Args:
        model, tokenizer: loaded Transformers objects, or a :class:`OffloadedModel`'s.
        pack: what was learned about the task.
        name: of the model, for messages.
        head: ``full``, ``masked``, ``exact`` or ``draft-only`` (see :class:`VocabConfig`); the
            pack's by default.
        tables: the model's vocabulary tables, where it was loaded without them.
        assistant: drafts too, where the task's outputs do not.
        checked: whether the pack is known to be for this tokenizer, which is compared else.

    Attributes:
        model, tokenizer: the unmodified Transformers objects.
        pack: the pack in use.
        chat: what its prompts take along into the chat template.
        decoder: the speculative loop. ``plain`` is the same loop without drafts, full head.
        tailored: the model's small head; ``None`` where the full one is used.
        assistant: the model that drafts too; ``None`` where there is none.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        pack: Pack,
        name: str = "",
        *,
        head: str = "",
        tables: OffloadedModel | None = None,
        assistant: AssistantDrafter | None = None,
        checked: bool = False,
    ) -> None:
        check_assistant(head, assistant)
        self.model, self.tokenizer, self.pack = model, tokenizer, pack
        if not checked:
            pack.check_tokenizer(fingerprint(tokenizer), name or "the given model")
        self.ends, self.chat = end_tokens(model, tokenizer), pack.chat
        self.target, self.assistant = Target(model), assistant
        warn_of_tokens(tokenizer, self.target.rows)
        self.tailored: Tailored | None = None
        self.reload(head, tables)

    def reload(self, head: str | None = None, tables: OffloadedModel | None = None) -> None:
        """Open the pack's indexes, calibration and costs, after they or its folder have changed.

        Args:
            head: make this head anew, the pack's if empty; ``None`` keeps the one in use.
            tables: see the class.
        """
        pack = self.pack
        task = open_task(pack, pack.info.fingerprint, self.target.vocab_size)
        self.corpus, self.similar, self.calibration = task.corpus, task.similar, task.calibration
        self.outputs: CorpusView = self.corpus
        self.target.prefixes = Prefixes(pack.info.prefixes)
        if head is not None:
            self.tailored = tailor_pack(pack, self.model, head, tables)
        if self.tailored is not None:
            self.tailored.target.prefixes = self.target.prefixes
        saved = pack.info.costs.get(self.cost_key)
        self._cost = None if saved is None else CostTable(saved["sizes"], saved["seconds"])
        if saved is not None and "equal_rows" in saved:
            row_counts.remember(self.model, saved["equal_rows"])
        if saved is not None and "product_rows" in saved:
            products.remember(self.model, saved["product_rows"])
        self._decoder: Decoder | None = None
        self._batches: tuple[int, BatchDecoder] | None = None

    @classmethod
    def from_pretrained(
        cls,
        pack: str | Path,
        model: ModelRef | None = None,
        *,
        dtype: str = "auto",
        device: str = "auto",
        head: str = "",
        assistant: ModelRef | None = None,
    ) -> TaskModel:
        """Open a pack, and the model it was made for (or ``model``, if its tokenizer fits).

        With a tailored head the model's vocabulary tables stay in its checkpoint's file, unless the
        pack wants them on the device (``vocab.tables``). An ``assistant`` is a smaller model that
        drafts too, with the pack's list of tokens as its head where ``head`` is ``draft-only``;
        what is said stays the model's. ``dtype``: the precision the pack was made in by default.

        Raises:
            PackError: no pack there, or a damaged one.
            FingerprintError: the pack was made for another tokenizer.
            ConfigError: a model cannot be loaded, the assistant has another tokenizer, or there is
                none for a head that it alone would have.
        """
        opened = Pack.open(pack)
        dtype = opened.precision(dtype)
        ref, vocab = model if model is not None else opened.model, vocab_config(opened, head)
        used = vocab.head
        check_assistant(used, assistant)
        drafts = None
        if assistant is not None:
            drafts = open_assistant(assistant, opened, used, dtype=dtype, device=device)
        if vocab.loads_whole or isinstance(ref, tuple):
            loaded, tokenizer, name = load_model(ref, dtype=dtype, device=device)
            return cls(loaded, tokenizer, opened, name, head=head, assistant=drafts)
        slim = load_offloaded(ref, dtype=dtype, device=device)
        given: dict[str, Any] = {"head": head, "tables": slim, "assistant": drafts}
        return cls(slim.model, slim.tokenizer, opened, slim.name, **given)

    @property
    def decoder(self) -> Decoder:
        """The speculative decoding loop; the first use measures this machine's step costs."""
        made = self._decoder
        if made is None:
            with self._lock:
                made = self._decoder = self._decoder or self._new_decoder()
        return made

    def _new_decoder(self) -> Decoder:
        drafter, budget = self.new_drafter(self.calibration), self.new_budget()
        if self.assistant is not None:
            return self.new_decoder(*assisted(self.assistant, drafter, budget))
        if self.pack.drafter.is_file():
            return self.new_decoder(MergedDrafter(drafter, self.new_trained(), budget), budget)
        return self.new_decoder(drafter, budget)

    def new_trained(self) -> TrainedDrafter:
        """The pack's trained drafter, over this model.

        Raises:
            PackError: the pack has none, or a damaged one.
            FingerprintError: it was trained for another model.
        """
        target = self.target if self.tailored is None else self.tailored.target
        return open_trained(self.pack, target, self.ends)

    @property
    def _lock(self) -> threading.RLock:
        """Held by whoever decodes a request here, or makes what that takes."""
        return (self.target if self.tailored is None else self.tailored.target).lock

    def new_decoder(self, drafter: Drafter, budget: NodeBudget | None = None) -> Decoder:
        """The decoding loop over this model and its head, with another drafter."""
        if self.tailored is None:
            return Decoder(self.target, drafter, budget, self.tokenizer)
        return self.tailored.decoder(drafter, budget, self.tokenizer)

    @property
    def plain(self) -> Decoder:
        """The same loop with the drafter that proposes nothing."""
        return Decoder(self.target, NoDrafter(), None, self.tokenizer)

    def batches(self, size: int = 8) -> BatchDecoder:
        """A loop that decodes several requests together with this model and its head.

        It drafts nothing: where drafts pay, one request after the other may well be sooner done.
        """
        if self.tailored is not None:
            return self.tailored.batches(size, self.tokenizer)
        return BatchDecoder(BatchTarget(*self.target.parts), tokenizer=self.tokenizer, size=size)

    def new_drafter(self, calibration: Calibration | None = None) -> NgramDrafter:
        """A drafter over this pack, with a calibration of its own unless one is given."""
        spec = self.pack.info.recipe.get("spec", {})
        return NgramDrafter(
            self.outputs,
            similar=self.similar,
            calibration=calibration or self.calibration.copy(),
            end_tokens=self.ends,
            use_context=bool(spec.get("context", True)),
        )

    def draft_from(self, outputs: CorpusView) -> None:
        """Draft from these outputs instead of the pack's own, such as those and learned ones.

        Call ``refresh()`` of the decoder's drafter whenever they have grown.
        """
        self.outputs, self._decoder = outputs, None

    def new_budget(self, cost: CostTable | None = None) -> Budget:
        """A budget over this machine's step costs, or over ``cost``."""
        nodes = int(self.pack.info.recipe.get("spec", {}).get("max_nodes", 63))
        return Budget((cost or self.cost).copy(), max_nodes=nodes)

    @property
    def cost(self) -> CostTable:
        """Seconds of a step by its number of tokens, on this machine."""
        if self._cost is None:
            tailored = self.tailored
            self._cost = measure_cost(self.target if tailored is None else tailored.target)
        return self._cost

    @property
    def knows_cost(self) -> bool:
        """Whether the pack has this machine's step costs, or they were measured since."""
        return self._cost is not None

    @property
    def cost_key(self) -> str:
        """Names the machine, and the head, that step costs hold for."""
        key = machine_key(self.model)
        return key if self.tailored is None else f"{key}/{self.tailored.config.head} head"

    @property
    def measured(self) -> dict[str, dict[str, list[float]]]:
        """Step costs and row counts found on this machine, as ``pack.json`` has them."""
        found = self.cost.to_json() | {"equal_rows": row_counts.remembered(self.model)}
        if (counts := products.remembered(self.model)) is not None:
            found["product_rows"] = counts
        return {self.cost_key: found}

    def params(self, **options: Any) -> SamplingParams:
        """Sampling options: the caller's, the checkpoint's, the pack's token limit, the defaults.

        Raises:
            ConfigError: see :func:`tascade.decode.generation.sampling_params`.
        """
        limit = self.pack.info.max_new_tokens
        ends = options.pop("end_tokens", None)
        if ends is None:
            ends = end_tokens(self.model, self.tokenizer)
        return sampling_params(self.model, ends, limit=limit, **options)

    def facts(self) -> dict[str, object]:
        """Model, pack, outputs indexed, LM head and dtype, as they are shown."""
        name = getattr(self.model, "name_or_path", "") or self.pack.info.model
        head = "full" if self.tailored is None else self.tailored.config.head
        outputs, dtype = self.corpus.n_documents, dtype_name(self.model.dtype)
        said = {"model": repr(str(name)), "pack": repr(str(self.pack.path)), "outputs": outputs}
        return said | {"head": head, "dtype": dtype}

    @property
    def samples(self) -> bool:
        """Whether the checkpoint says that its answers are drawn."""
        return bool(getattr(self.model.generation_config, "do_sample", False))

    def encode(
        self,
        prompt: Prompt,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool | None = None,
    ) -> IntArray:
        """Token ids of a prompt, chat template applied: [T] int32.

        Args:
            prompt: a system message of its own is used instead of the pack's.
            chat_template_kwargs: variables of the template, each instead of the pack's.
            continue_final_message: go on with the last message; by default where that is the
                assistant's.

        Raises:
            ConfigError: see :func:`tascade.data.encode.encode_prompt`.
        """
        chat = self.chat.over(chat_template_kwargs) if chat_template_kwargs else self.chat
        return encode_prompt(self.tokenizer, prompt, chat, continue_final_message)

    def run(
        self, prompt: Prompt, processors: Sequence[Processor] = (), **options: Any
    ) -> Generation:
        """Generate for one prompt; returns tokens, text, who drafted what, and timings."""
        return self.decoder.generate(self.encode(prompt), self.params(**options), processors)

    def generate(
        self,
        prompt: Prompts,
        processors: Sequence[Processor] = (),
        *,
        batch_size: int = 1,
        **options: Any,
    ) -> str | list[str]:
        """Generate text for a prompt, chat messages, or a list of prompts.

        Args:
            prompt: a string; a list of ``{"role", "content"}`` messages; or a list of strings.
            processors: extra Transformers logits processors.
            batch_size: how many of a list's prompts to decode together, without drafts then; each
                answer is what it is alone.
            options: fields of :class:`tascade.decode.sampling.SamplingParams`, such as
                ``max_new_tokens``, ``temperature``, ``seed``, ``stop``.

        Returns:
            One text, or a list of texts for a list of strings.

        Raises:
            ConfigError: a prompt, or an option, that is none; a prompt that leaves no room for an
                answer; see :meth:`params`.
        """
        if isinstance(prompt, str | Mapping) or not isinstance(prompt, list | tuple):
            return self.run(cast(Prompt, prompt), processors, **options).text
        if prompt and isinstance(prompt[0], Mapping):
            return self.run(cast(Prompt, prompt), processors, **options).text
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(
                "batch_size is out of range",
                got=repr(batch_size),
                wanted="a whole number, 1 or more",
            )
        if batch_size == 1:
            return [self.run(cast(str, p), processors, **options).text for p in prompt]
        ids = [self.encode(cast(str, p)) for p in prompt]
        with self._lock:
            if self._batches is None or self._batches[0] != batch_size:
                self._batches = batch_size, self.batches(batch_size)
            decoder = self._batches[1]
        made = decoder.generate(ids, self.params(**options), processors)
        return [answer.text for answer in made]

    def stream(
        self, prompt: Prompt, processors: Sequence[Processor] = (), **options: Any
    ) -> Iterator[str]:
        """Generate for one prompt, yielding text as soon as it is sure not to change."""
        params = self.params(**options)
        text = TextStream(self.tokenizer, params)
        with closing(self.steps(self.encode(prompt), params, processors)) as steps:
            for _, result in steps:
                if new := text.take(result):
                    yield new

    def steps(
        self, prompt: IntArray, params: SamplingParams, processors: Sequence[Processor] = ()
    ) -> Generator[tuple[list[int], Generation]]:
        """Generate for one prompt of token ids [T]: yields each step's new ids and the result so
        far. Other requests may come between two steps; what is needed to go on is kept meanwhile.
        """
        yield from self.decoder.stream(prompt, params, processors, returns=True)

    def save_pretrained(self, path: str | Path) -> None:
        """Save the pack to a new folder; weights are in it only if it holds a tuned model.

        Nothing in the copy tells of this machine (see :func:`tascade.util.places.publish`).
        A model in a folder is known by the folder's name there: have it beside the pack or in the
        working directory to open the copy, or pass it as ``model``.

        Raises:
            PackError: the folder exists.
        """
        self.pack.copy_to(Path(path))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Upload the pack to the hub, as :meth:`save_pretrained` writes it; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="tascade-") as folder:
            publish(self.pack.path, Path(folder), link_or_copy)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))
