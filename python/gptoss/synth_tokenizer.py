"""A small byte-level BPE tokenizer with harmony's special tokens, for synthetic checkpoints."""

from __future__ import annotations

SPECIAL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
"""They take the last ids of the vocabulary, in this order."""

SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

_CORPUS = """\
A language model reads a text as a row of tokens and says how likely each token is to come next.
It takes one token, adds it to the row, and begins again. The weights of this one are random, so
what it writes means nothing; but every step of the work is the same as in a trained model: the
tokens are looked up in a table, the layers attend to what came before, a router sends each token
to a few of the experts, and the last layer gives a number to every token of the vocabulary.
What is the capital of France? The capital of France is Paris. What is the weather like today?
You are a helpful assistant. The user asks a question, and the assistant thinks about the answer
before it gives the answer to the user. Knowledge cutoff: 2024. Reasoning: low, medium, high.
# Valid channels: analysis, commentary, final. Channel must be included for every message.
def main(values: list[int]) -> int: return sum(value for value in values if value > 0)
{"name": "get_weather", "arguments": {"location": "San Francisco", "format": "celsius"}}
"""


def build_tokenizer(vocab_size: int) -> str:
    """The text of a tokenizer.json with exactly this many tokens, the same every time.

    Bytes come first, then merges learned from a few lines of text, then reserved tokens if those
    lines have no more merges, then `SPECIAL_TOKENS`.

    Raises:
        ValueError: `vocab_size` has no room for bytes and special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {SMALLEST_VOCABULARY}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS.splitlines(), trainer)
    n_reserved = vocab_size - len(SPECIAL_TOKENS) - tokenizer.get_vocab_size()
    names = [f"<|reserved_{index}|>" for index in range(n_reserved)] + list(SPECIAL_TOKENS)
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    return tokenizer.to_str(pretty=True)
