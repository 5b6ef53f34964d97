"""Train the bundled demo model from nothing, on two CPU cores, in about half an hour.

    python examples/bundled/make_tasks.py
    python examples/bundled/train_model.py --minutes 32

It learns a byte-level BPE tokenizer and a 5M-parameter Llama on the train splits and on more rows
of the same generator (never a prompt of validation or test), then prints the exact match on the
held-out rows. A checkpoint replaces the model folder every few minutes, in one rename.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent))
from make_tasks import DATA, TASKS, Row, extra_train

SPECIALS = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MAX_LENGTH = 320
MAX_ROWS = 10
KEPT = ("README.md",)  # the model card is written by hand and outlives a new training
Encoded = tuple[list[int], int]  # all token ids of a row, and how many of them are the prompt


def read(task: str, split: str) -> list[Row]:
    text = (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def train_tokenizer(rows: list[Row], size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    # Numbers fall into pairs of digits, so that a reference is copied in few, frequent pieces.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIALS),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (row[key] for row in rows for key in ("prompt", "completion"))
    tokenizer.train_from_iterator(texts, trainer)
    pad, end, *others = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        chat_template=TEMPLATE,
        additional_special_tokens=others,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Encoded]:
    prompts = [f"<|user|>{row['prompt']}<|assistant|>" for row in rows]
    answers = [f"{row['completion']}<|end|>" for row in rows]
    pairs = zip(tokenizer(prompts)["input_ids"], tokenizer(answers)["input_ids"], strict=True)
    return [(p + a, len(p)) for p, a in pairs if len(p) + len(a) <= MAX_LENGTH]


def batches(data: list[Encoded], tokens: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Endless batches of rows of like length, each of at most ``tokens`` with the padding.

    A batch has ``MAX_ROWS`` at most: filled to the brim with short rows, the task of the short
    rows would get few steps.
    """
    while True:
        order = rng.sample(data, len(data))
        for at in range(0, len(order), 1024):
            pool = sorted(order[at : at + 1024], key=lambda row: len(row[0]))
            cut: list[list[Encoded]] = [[]]
            for row in pool:
                rows = len(cut[-1]) + 1
                if rows > MAX_ROWS or rows * len(row[0]) > tokens:
                    cut.append([])
                cut[-1].append(row)
            rng.shuffle(cut)
            yield from cut


def loss_of(model: LlamaForCausalLM, batch: list[Encoded]) -> torch.Tensor:
    """Cross-entropy of the completions. Right padding under a causal mask needs no mask."""
    width = max(len(ids) for ids, _ in batch)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    wanted = torch.zeros_like(inputs, dtype=torch.bool)
    for row, (ids, prompt) in enumerate(batch):
        wanted[row, prompt - 1 : len(ids) - 1] = True
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[wanted])  # the head runs where a loss is taken, only
    return torch.nn.functional.cross_entropy(logits.float(), inputs.roll(-1, 1)[wanted])


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write a whole folder beside ``out`` and swap it in."""
    fresh, old = out.with_name(f"{out.name}.new"), out.with_name(f"{out.name}.old")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    clone = LlamaForCausalLM(model.config)
    clone.load_state_dict(model.state_dict())
    clone.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    clone.to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors files come out readable by their owner alone
    for kept in KEPT:
        if (out / kept).exists():
            shutil.copy2(out / kept, fresh / kept)
    if out.exists():
        os.replace(out, old)
    os.replace(fresh, out)
    shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row], show: int = 0
) -> float:
    """Share of rows whose greedy output is the completion, to the last character."""
    model.eval()
    data = sorted(encode(tokenizer, rows), key=lambda row: row[1])
    hits = 0
    for at in range(0, len(data), 50):
        part = data[at : at + 50]
        width = max(prompt for _, prompt in part)
        ids = torch.tensor([[0] * (width - n) + x[:n] for x, n in part])
        mask = torch.tensor([[0] * (width - n) + [1] * n for _, n in part])
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=200,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for text, (x, n) in zip(texts, part, strict=True):
            right = tokenizer.decode(x[n:], skip_special_tokens=True)
            hits += text == right
            if text != right and show > 0:
                show -= 1
                print(f"  got    {text}\n  wanted {right}", flush=True)
    model.train()
    return hits / len(data)


class Threads:
    """Use as many threads as pay at the moment.

    On a busy machine the threads of a step wait for the one that lost its core, and fewer are
    faster. Every 100 steps the first three try one thread and the next three all of them.
    """

    def __init__(self, most: int) -> None:
        self.most, self.speeds = most, {1: 0.0, most: 0.0}

    def before(self, step: int) -> None:
        turn = step % 100
        if turn == 0:
            self.speeds = dict.fromkeys(self.speeds, 0.0)
        best = max(self.speeds, key=lambda n: self.speeds[n])
        torch.set_num_threads(1 if turn < 3 else self.most if turn < 6 else best)
        self.start = time.monotonic()

    def after(self, step: int, tokens: int) -> None:
        if step % 100 < 6:
            self.speeds[torch.get_num_threads()] += tokens / (time.monotonic() - self.start)


def schedule(done: float) -> float:
    """Warm-up over the first 3% of the time, then a cosine down to 2% of the peak."""
    return min(1.0, done / 0.03) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    data: list[Encoded],
    options: argparse.Namespace,
) -> None:
    """Train for ``minutes``: the schedule follows the clock, so a busy machine ends on time too."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=True)
    start = saved = time.monotonic()
    limit, tokens, mean, threads = options.minutes * 60, 0, 0.0, Threads(options.threads)
    for step, batch in enumerate(batches(data, options.tokens, random.Random(options.seed))):
        spent = time.monotonic() - start
        if spent >= limit:
            break
        for group in optimizer.param_groups:
            group["lr"] = options.lr * max(0.01, schedule(spent / limit))
        threads.before(step)
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        threads.after(step, count := sum(len(ids) for ids, _ in batch))
        tokens += count
        mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0:
            print(
                f"step {step} loss {mean:.4f} tokens {tokens} at {spent:.0f}s "
                f"on {torch.get_num_threads()} threads",
                flush=True,
            )
        if time.monotonic() - saved > options.save_every * 60:
            save(model, tokenizer, options.out)
            held = {task: read(task, "validation")[:30] for task in TASKS}
            scores = {task: exact_match(model, tokenizer, rows, 1) for task, rows in held.items()}
            saved = time.monotonic()
            print(f"validation at {spent:.0f}s: {scores}", flush=True)
    print(f"trained {step} steps, {tokens} tokens, {time.monotonic() - start:.0f}s", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=DATA.parent / "model")
    parser.add_argument("--minutes", type=float, default=32)
    parser.add_argument("--save-every", type=float, default=4, help="minutes between checkpoints")
    parser.add_argument("--rows", type=int, default=30000, help="extra training rows of each task")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=1200, help="tokens in a batch")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the model in --out")
    parser.add_argument("--favour", default="", help="a task whose rows count four times")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=704,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rows = [row for t in TASKS for row in read(t, "train") + extra_train(t, options.rows)]
    if options.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out)
        model = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer(rows, options.vocab)
        model = new_model(tokenizer)
    rows += 3 * [row for row in rows if row["id"].startswith(f"{options.favour}-")]
    data = encode(tokenizer, rows)
    size = sum(p.numel() for p in model.parameters())
    mean = sum(len(ids) for ids, _ in data) / len(data)
    print(f"{len(data)} rows of {mean:.0f} tokens, {len(tokenizer)} entries, {size} parameters")
    fit(model, tokenizer, data, options)
    save(model, tokenizer, options.out)
    kept = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    for task in TASKS:
        print(f"{task}: exact match {exact_match(kept, tokenizer, read(task, 'test')):.3f}")


if __name__ == "__main__":
    main()
