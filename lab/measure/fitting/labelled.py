"""Generated prompts with a known right answer: recall of who has what, and choice of the word that is of a kind.

They are scored by the model's preference for the right option, which needs one row of logits and no generation. Both have
three options; they are put so that small models do clearly better than chance (letters A to D would be below it)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import groupby

import torch

from lab.engine.stack import Stack
from lab.measure.fitting.replay import Trials

PEOPLE = ("Anna", "Ben", "Carl", "Diana", "Emma", "Frank", "Grace", "Henry", "Julia", "Kevin", "Laura", "Mark", "Paul", "Sarah")
COLOURS = ("red", "blue", "green", "black", "white", "yellow", "brown", "pink")
THINGS = ("car", "house", "book", "bag", "hat", "bike", "door", "boat")
KINDS = {
    "an animal": ("horse", "dog", "tiger", "rabbit", "whale", "eagle"),
    "a fruit": ("apple", "banana", "cherry", "lemon", "grape", "peach"),
    "a tool": ("hammer", "saw", "drill", "shovel", "axe", "wrench"),
    "a country": ("France", "Japan", "Brazil", "Egypt", "Canada", "Italy"),
    "a piece of clothing": ("shirt", "coat", "sock", "skirt", "scarf", "glove"),
    "a musical instrument": ("piano", "violin", "drum", "flute", "guitar", "trumpet"),
}


@dataclass(frozen=True)
class Labelled:
    """A question. ids int64 [T] end right before the answer; options are token ids, answer the index of the right one;
    kind is "recall" or "choice"."""

    ids: torch.Tensor
    options: tuple[int, ...]
    answer: int
    kind: str


def labelled(model: torch.nn.Module, tokenizer, count: int, seed: int = 0, shots: int = 0) -> list[Labelled]:
    """`count` questions, recall and multiple choice by turns, each after `shots` solved ones of its kind. Without a
    tokenizer: random tokens whose continuation was seen before."""
    rng, out = random.Random(seed), []
    device = model.get_input_embeddings().weight.device
    while len(out) < count:
        if tokenizer is None:
            made = _tokens(rng, model.get_input_embeddings().weight.shape[0], 24 + 24 * shots)
        else:
            ask = (_recall, _choice)[len(out) % 2]
            solved = [f"{text} {words[answer]}\n\n" for text, words, answer, _ in (ask(rng) for _ in range(shots))]
            text, words, answer, kind = ask(rng)
            text = "".join(solved) + text
            options = tuple(tokenizer(" " + w, add_special_tokens=False)["input_ids"][0] for w in words)
            made = tokenizer(text, add_special_tokens=False)["input_ids"], options, answer, kind
        ids, options, answer, kind = made
        if len(set(options)) == len(options):  # options that begin with the same token cannot be told apart
            out.append(Labelled(torch.tensor(ids, device=device), options, answer, kind))
    return out


def batches(tasks: list[Labelled]) -> list[list[Labelled]]:
    """Questions of one length together, so that they can be fed at once."""
    ordered = sorted(tasks, key=lambda t: len(t.ids))
    return [list(group) for _, group in groupby(ordered, key=lambda t: len(t.ids))]


def preference(logits: torch.Tensor, tasks: list[Labelled]) -> tuple[torch.Tensor, torch.Tensor]:
    """(log probability of the right option among the options, whether it is the likeliest) of logits [B, V] of the last
    row, both float32 [B]."""
    scores, right = [], []
    for row, task in zip(logits, tasks):
        among = row[list(task.options)].float().log_softmax(-1)
        scores.append(among[task.answer])
        right.append((among.argmax() == task.answer).float())
    return torch.stack(scores), torch.stack(right)


def score(trials: Trials, groups: list[list[Labelled]], stack: Stack, layer: int = 0) -> tuple[float, float]:
    """(mean log probability of the right option, accuracy) of a stack that changes nothing below `layer`."""
    found = [preference(x[:, -1], group) for x, group in zip(trials.under(stack, layer), groups)]
    return tuple(float(torch.cat(parts).mean()) for parts in zip(*found))


def asked(model: torch.nn.Module, tokenizer, count: int, seed: int = 0, shots: int = 0) -> tuple[Trials, list[list[Labelled]]]:
    """Questions ready to be put under one stack after the other."""
    groups = batches(labelled(model, tokenizer, count, seed, shots))
    return Trials(model, [torch.stack([t.ids for t in group]) for group in groups], keep=1), groups


def _recall(rng: random.Random) -> tuple[str, list[str], int, str]:
    people, colours, thing = rng.sample(PEOPLE, 3), rng.sample(COLOURS, 3), rng.choice(THINGS)
    answer = rng.randrange(3)
    facts = " ".join(f"{p} has a {c} {thing}." for p, c in zip(people, colours))
    return f"{facts}\nQuestion: Who has the {colours[answer]} {thing}?\nAnswer:", people, answer, "recall"


def _choice(rng: random.Random) -> tuple[str, list[str], int, str]:
    kinds = rng.sample(list(KINDS), 3)
    words, answer = [rng.choice(KINDS[kind]) for kind in kinds], rng.randrange(3)
    return f"Of {words[0]}, {words[1]} and {words[2]}, the one that is {kinds[answer]} is the", words, answer, "choice"


def _tokens(rng: random.Random, vocab: int, length: int) -> tuple[list[int], tuple[int, ...], int, str]:
    body = [rng.randrange(vocab) for _ in range(length)]
    at = rng.randrange(4, length - 8)
    options = rng.sample([t for t in range(vocab) if t != body[at + 1]], 3) + [body[at + 1]]
    return body + body[at - 1 : at + 1], tuple(options), 3, "recall"
