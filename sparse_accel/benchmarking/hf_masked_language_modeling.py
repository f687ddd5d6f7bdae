"""What Hugging Face's masked language modelling example gives its model: chunks of text, masked anew in every batch.

The rows are those that the `group_texts` of transformers' examples/pytorch/language-modeling/run_mlm_no_trainer.py makes, and
the collator is the one that it uses, DataCollatorForLanguageModeling of transformers, at the script's 15%.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np

from sparse_accel.benchmarking.lengths import MASK_ID
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_masking import KINDS, SPECIAL

_PROBABILITY: Final = 0.15


def chunk_dataset(features: Features) -> Any:
    """The features, all of one length, as a datasets.Dataset of lists, as the example script's preprocessing makes it."""
    from datasets import Dataset, Sequence, Value
    from datasets import Features as Columns

    shape = (len(features), int(features.lengths[0]))
    columns = {name: column.reshape(shape) for name, column in features.tokens.items()}
    columns["attention_mask"] = np.ones(shape, np.int8)
    columns["special_tokens_mask"] = (features.extra[KINDS] == SPECIAL).astype(np.int8).reshape(shape)
    kinds = {"input_ids": "int32", "token_type_ids": "int8", "attention_mask": "int8", "special_tokens_mask": "int8"}
    return Dataset.from_dict(
        {name: list(columns[name]) for name in kinds},
        features=Columns({name: Sequence(Value(kind)) for name, kind in kinds.items()}),
    )


def masking_collator(vocabulary: int) -> Callable[[list[dict[str, Any]]], Any]:
    """transformers' collator, with a tokenizer of so many made-up words: it asks one for the mask token and the number of words
    alone."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {0: "[PAD]", MASK_ID: "[MASK]"}
    words = {names.get(number, f"word{number}"): number for number in range(vocabulary)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word1")), pad_token="[PAD]", mask_token="[MASK]"
    )
    found: Callable[[list[dict[str, Any]]], Any] = DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=_PROBABILITY
    )
    return found
