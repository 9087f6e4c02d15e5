"""Generated text is the difference of two decodings, whatever a tokenizer does at the start of a text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from fedllm.data.encoding import decode_answer, tokens
from fedllm.models import language
from fedllm.models.inference import Answer, continue_batch
from fedllm.models.language import LanguageModel

INDENTED = "def add(x, y):\n", "    return x + y\n"


def llama_2():
    """Spaces are the sign U+2581, and the decoder strips one from the start, as Llama-2's."""
    signs = ["<unk>", "<s>", "</s>", "▁", *sorted(set("".join(INDENTED)) - {" "}), "é"]
    made = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, merges=[], unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("make", [llama_2, language._bytes_tokenizer])
def test_no_space_of_an_answer_is_lost(make):
    tokenizer = make()
    (prompt,), (whole,) = tokens(tokenizer, [INDENTED[0]]), tokens(tokenizer, ["".join(INDENTED)])
    answer = whole[len(prompt) :]
    assert decode_answer(tokenizer, prompt, answer) == INDENTED[1]
    assert decode_answer(tokenizer, prompt, [*answer, tokenizer.eos_token_id]) == INDENTED[1]


def test_the_answer_alone_would_lose_one():
    tokenizer = llama_2()
    (prompt,), (whole,) = tokens(tokenizer, [INDENTED[0]]), tokens(tokenizer, ["".join(INDENTED)])
    assert tokenizer.decode(whole[len(prompt) :]) == INDENTED[1][1:]


def test_a_character_that_the_prompt_began_belongs_to_the_answer():
    tokenizer = language._bytes_tokenizer()
    ids = tokens(tokenizer, ["a é"])[0]
    assert decode_answer(tokenizer, ids[:-1], ids[-1:]) == "é"
    assert decode_answer(tokenizer, [], ids) == "a é"


def test_an_answer_that_the_limit_cut_off_says_so():
    model = language.load(LanguageModel(), torch.device("cpu"), 0)
    tokenizer = language.tokenizer(LanguageModel())
    (prompt,) = tokens(tokenizer, ["a"])
    (answer,) = continue_batch(model, tokenizer, [prompt], 4)
    assert isinstance(answer, Answer) and answer.cut
    (long,) = continue_batch(model, tokenizer, [prompt], 30)
    (ended,) = continue_batch(model, tokenizer, [prompt], 30, (long.text[:3],))
    assert not ended.cut and long.text[:3] in ended.text
