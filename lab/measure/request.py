"""What the user asks for: a prompt, up to four variants, decoding settings; checked before anything runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.engine.sampling import Sampling
from lab.engine.stack import Stack
from lab.errors import LabError

LETTERS = "ABCD"
MAX_VARIANTS = len(LETTERS)


@dataclass(frozen=True)
class RunRequest:
    """One run.

    Args:
        prompt: the text. variants: specs, the first being the reference. max_new_tokens: per variant.
        timing: "interleaved" steps the variants in turn; "clean" runs them one after another, each warmed up.
        samples: continuations per variant (sampled decoding). fidelity: also feed the reference's tokens to each
            variant and compare beliefs. chat: wrap the prompt in the model's chat template. truncate: cut a prompt
            that does not fit, from the front. capture: keep queries and keys for the attention map.
    """

    prompt: str
    variants: tuple[str, ...] = ("dense",)
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    timing: str = "interleaved"
    samples: int = 1
    fidelity: bool = True
    chat: bool = False
    truncate: bool = False
    capture: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise LabError("The prompt is empty", "A prompt has at least one character", "Type a prompt, or choose a preset")
        if any("\ud800" <= char <= "\udfff" for char in self.prompt):  # halves of characters: bytes that were no UTF-8
            raise LabError("The prompt holds bytes that are no text", "A prompt is text in UTF-8",
                           "Type it again, or save it as UTF-8")
        if not 1 <= len(self.variants) <= MAX_VARIANTS:
            raise LabError(f"{len(self.variants)} variants were given", f"A run compares 1 to {MAX_VARIANTS} variants")
        if not 1 <= self.max_new_tokens <= 100_000:
            raise LabError(f"max_new_tokens={self.max_new_tokens} is out of range", "It is a whole number of at least 1")
        if not 1 <= self.samples <= 64:
            raise LabError(f"samples={self.samples} is out of range", "It is a whole number from 1 to 64")
        if self.timing not in ("interleaved", "clean"):
            raise LabError(f'timing="{self.timing}" is not offered', "It is interleaved or clean")
        self.stacks()

    def stacks(self) -> list[Stack]:
        """The parsed variants, in order. Raises LabError for a spec that cannot be read."""
        return [Stack.parse(spec) for spec in self.variants]


def prompt_ids(tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, of any length, in the model's chat template where that is asked for.

    Raises LabError when the model has no chat template.
    """
    if not chat:
        return tokenizer(prompt, verbose=False)["input_ids"]  # the lab says itself what is too long
    if not getattr(tokenizer, "chat_template", None):
        raise LabError(
            "This model has no chat template", "Chat mode needs an instruction-tuned model",
            "Give the prompt as text, without the chat template")
    text = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokenise(tokenizer, request: RunRequest, context: int) -> list[int]:
    """Token ids of the request's prompt.

    Raises LabError when the prompt and the new tokens exceed the model's context and truncate is off, or when a chat
    template is asked for and the model has none.
    """
    ids = prompt_ids(tokenizer, request.prompt, request.chat)
    room = context - request.max_new_tokens
    if room < 1:
        raise LabError(
            f"{request.max_new_tokens} new tokens leave no room for a prompt", f"The model's context is {context} tokens",
            f"Ask for fewer than {context} new tokens",
        )
    if len(ids) > room:
        if not request.truncate:
            raise LabError(
                f"The prompt has {len(ids):,} tokens, but only {room:,} fit",
                f"The model's context is {context:,} tokens and {request.max_new_tokens:,} are reserved for new ones",
                f"Shorten the prompt, ask for fewer new tokens, or let the lab cut the first {len(ids) - room:,} tokens "
                "(too long: cut, in the browser; --truncate on the command line)",
            )
        ids = ids[-room:]
    if not ids:
        raise LabError("The prompt has no tokens", "A prompt has at least one token", "Type a prompt, or choose a preset")
    return [int(i) for i in ids]
