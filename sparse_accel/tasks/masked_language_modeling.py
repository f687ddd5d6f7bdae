"""Masked language modelling: guess the tokens that were hidden in running text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_accel.errors import DataError, OptionError
from sparse_accel.packing import is_packed
from sparse_accel.tasks.base import DataOptions, Scored, Split, TaskData
from sparse_accel.tasks.collating import Collate, Collator
from sparse_accel.tasks.feature_cache import cached_features, digest_of
from sparse_accel.tasks.features import Features
from sparse_accel.tasks.mlm_features import TextSpec, encode_all, in_chunks, num_maskable, text_spec, vocabulary_size
from sparse_accel.tasks.mlm_masking import EVALUATION, NOT_MASKED, Masking
from sparse_accel.tasks.mlm_rows import TEXT_COLUMN, columns_of, read_lines, text_column, texts_of
from sparse_accel.tasks.mlm_streaming import open_stream
from sparse_accel.tasks.reading import Row, data_set_splits, read_data_set
from sparse_accel.tasks.rows import BadRows, KnownColumns
from sparse_accel.tasks.splits import SplitName, SplitReader, check_data_options, longest_feature

# Where neither tokenizer nor model sets a lower limit and nobody says how long, as in Hugging Face's script.
LONGEST_BY_DEFAULT: Final = 1024
# A split with fewer tokens than this may be without a masked one.
_FEW_TOKENS: Final = 1000
# The column of a batch with the tokens that were masked, where the head computes nothing else.
_TARGETS: Final = "masked_tokens"
# What a feature's array of scores holds.
_LOSS, _COUNT, _RIGHT = range(3)


class MaskedLanguageModeling:
    """The task: a model gives each token of the vocabulary a score at each masked place."""

    name = "masked_language_modeling"
    output_keys: tuple[str, ...] = ("logits",)
    label_keys: tuple[str, ...] = ("labels",)
    features_are_fixed = False

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForMaskedLM."""
        from transformers import AutoModelForMaskedLM

        return AutoModelForMaskedLM

    def load(
        self,
        options: DataOptions,
        tokenizer: Any,
        *,
        max_positions: int | None = None,
        model_labels: Sequence[str] | None = None,
        model_problem_type: str | None = None,
    ) -> TaskData:
        """See `Task.load`. With `--streaming` the training text is not read: `stream` says where it is."""
        check_data_options(options)
        if not 0 < options.mlm_probability < 1:
            raise OptionError(f"--mlm_probability should lie between 0 and 1, it is {options.mlm_probability:g}")
        notes: list[str] = []
        length = _length(options, tokenizer, max_positions, notes)
        spec = text_spec(
            tokenizer, max_length=length, line_by_line=options.line_by_line, whole_words=options.whole_word_mask
        )
        masking = Masking(
            mask_id=tokenizer.mask_token_id,
            vocab_size=vocabulary_size(tokenizer),
            probability=options.mlm_probability,
            whole_words=options.whole_word_mask,
            seed=options.seed,
        )
        loader = _Loader(options, spec, notes)
        is_streamed = options.streaming and options.do_train
        train = loader.split("train", options.max_train_samples) if options.do_train and not is_streamed else None
        validation = loader.split("validation", options.max_eval_samples) if options.do_eval else None
        test = loader.split("test", options.max_predict_samples) if options.do_predict else None
        for name, split in (("validation", validation), ("test", test)):
            if split is not None:
                _check_masks(split.features, masking, name)
        pad_values = {"input_ids": tokenizer.pad_token_id}
        if spec.token_types:
            pad_values["token_type_ids"] = tokenizer.pad_token_type_id
        return TaskData(
            collate=Collator(
                pad_values,
                length,
                bool(options.pad_to_max_length),
                tokenizer.padding_side,
                token_labels={"labels": NOT_MASKED},
                prepare=masking.prepare,
            ),
            train=train.features if train is not None else None,
            stream=open_stream(options, spec, notes) if is_streamed else None,
            validation=validation,
            test=test,
            notes=notes,
            num_dropped=loader.num_dropped,
        )

    def masked_only(self, collate: Collate, rows: str) -> Collate:
        """The same batches with the places of the masked tokens in the column `rows`: for a model whose head computes those
        alone. Logits are then [1, masked tokens, vocabulary]."""
        return _MaskedRows(collate, rows)

    def num_units(self, batch: Mapping[str, Tensor]) -> int:
        """Masked tokens: the loss is a mean over them."""
        return int((batch["labels"] != NOT_MASKED).sum())

    def loss(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, include_padding: bool = False
    ) -> Tensor:
        """Cross entropy of the masked tokens, 0 where there is none. Padding is never masked."""
        logits, targets = outputs["logits"].flatten(0, -2).float(), batch.get(_TARGETS, batch["labels"]).flatten()
        total = F.cross_entropy(logits, targets, ignore_index=NOT_MASKED, reduction="sum")
        return total / (targets != NOT_MASKED).sum().clamp(min=1)

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, S], True on tokens, masked or not: as SparseML, but without padding."""
        return batch["attention_mask"].bool()

    def for_scoring(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """For each feature float64 [3]: the sum of its masked tokens' losses, how many they are and how many of them got the
        highest score. The logits, [N, S, vocabulary], would not fit into memory for a whole split."""
        labels = batch["labels"]
        features = (labels != NOT_MASKED).nonzero()[:, 0]
        targets = batch.get(_TARGETS, labels)
        is_masked = targets.flatten() != NOT_MASKED
        logits, targets = outputs["logits"].flatten(0, -2)[is_masked].float(), targets.flatten()[is_masked]
        losses = F.cross_entropy(logits, targets, reduction="none").double()
        right = (logits.argmax(-1) == targets).double()
        scores = torch.zeros(len(labels), 3, dtype=torch.float64, device=labels.device)
        scores.index_add_(0, features, torch.stack([losses, torch.ones_like(losses), right], dim=1))
        return {"logits": list(scores.cpu().numpy())}

    def score(self, split: Split, outputs: Mapping[str, Sequence[np.ndarray]], options: DataOptions) -> Scored:
        """The mean loss of the masked tokens, perplexity (its exponential) and the share that is guessed right."""
        total = np.sum(np.stack(outputs["logits"]), axis=0)
        loss = float(total[_LOSS] / total[_COUNT])
        metrics = {
            "loss": loss,
            "perplexity": math.exp(min(loss, _LARGEST_EXPONENT)),
            "accuracy": float(total[_RIGHT] / total[_COUNT]),
        }
        return Scored(metrics, {})


# exp of more is no number.
_LARGEST_EXPONENT: Final = 700.0


@dataclass(frozen=True)
class _MaskedRows:
    """Batches of `collate` with two more columns: `rows` int64 [M], the places of masked tokens among all that the model is
    given, and _TARGETS int64 [M], what they were."""

    collate: Collate
    rows: str

    def __call__(self, features: Features, indices: np.ndarray, epoch: int = -1) -> dict[str, Tensor]:
        """See `Collate`."""
        batch = self.collate(features, indices, epoch)
        is_masked = batch["labels"] != NOT_MASKED
        targets = batch["labels"][is_masked]
        rows = batch["rows"][is_masked] if is_packed(batch) else is_masked.flatten().nonzero()[:, 0]
        if len(rows) in (0, batch["input_ids"].numel()):
            # A row that counts for nothing: the head is never without one, and never has as many as there are tokens, so that
            # its logits are not taken for those of all.
            rows, targets = F.pad(rows, (0, 1)), F.pad(targets, (0, 1), value=NOT_MASKED)
        return {**batch, self.rows: rows, _TARGETS: targets}


def _length(options: DataOptions, tokenizer: Any, max_positions: int | None, notes: list[str]) -> int:
    length = longest_feature(options, tokenizer, max_positions, notes)
    if options.max_seq_length is None and length > LONGEST_BY_DEFAULT:
        notes.append(
            f"features have {LONGEST_BY_DEFAULT} tokens, though the model takes {length}; --max_seq_length asks for more"
        )
        return LONGEST_BY_DEFAULT
    return length


def _check_masks(features: Features, masking: Masking, name: str) -> None:
    """Raise DataError for a split so small that it has no masked token."""
    if features.bounds[-1] < _FEW_TOKENS:
        labels = masking.prepare(features, np.arange(len(features)), EVALUATION).extra["labels"]
        if (labels == NOT_MASKED).all():
            raise DataError(
                f"the {name} data has so little text ({num_maskable(features)} tokens) that none of it is masked: there is "
                "nothing to score"
            )


class _Loader:
    """Reads, checks and tokenizes the splits of one run."""

    def __init__(self, options: DataOptions, spec: TextSpec, notes: list[str]) -> None:
        self.options = options
        self.spec = spec
        self.notes = notes
        self.num_dropped = 0
        self._known: KnownColumns | None = None
        self._reader = SplitReader(options, notes, read_lines)

    def split(self, name: SplitName, max_samples: int | None) -> Split:
        """One split; `max_samples` limits the features."""
        rows, source = self._reader.rows(name)
        bad = BadRows(self.options.on_bad_rows)
        texts = texts_of(rows, self._column(rows, source), source, bad, self.notes)
        texts += self._more_texts(name, bad)
        if bad.messages:
            self.notes.append(bad.note(source))
            self.num_dropped += len(bad.messages)
        features = self._features(texts, source).take(max_samples)
        if num_maskable(features) == 0:
            raise DataError(f"{source}: its text has no tokens")
        return Split(features, texts)

    def _column(self, rows: Sequence[Row], source: str) -> str | None:
        """The column with the text: the one that was asked for, else that of other data; None for the usual one. Lines of a text
        file have no other."""
        wanted, names = self.options.text_column_name, columns_of(rows)
        if wanted is not None or names == [TEXT_COLUMN]:
            return wanted
        if self._known is None:
            name = text_column(names, None, source, self.notes)
            self._known = KnownColumns({"text": name}, source)
        return self._known.require("text", source, names, "--text_column_name")

    def _more_texts(self, name: SplitName, bad: BadRows) -> list[str]:
        """The texts of `--dataset_name_2`, if there is one."""
        options = self.options
        if options.dataset_name_2 is None:
            return []
        second = (options.dataset_name_2, options.dataset_config_name_2)
        if name == "validation" and name not in data_set_splits(*second, options.cache_dir):
            self.notes.append(f"{second[0]}: has no validation split, so that scores are about the other text alone")
            return []
        rows = read_data_set(*second, name, options.cache_dir)
        return texts_of(rows, options.text_column_name, f"{second[0]} ({name})", bad, self.notes)

    def _features(self, texts: list[str], source: str) -> Features:
        features = cached_features(
            self.options,
            digest_of(texts, self.spec.digest()),
            lambda: encode_all(texts, self.spec, self.options.preprocessing_num_workers),
            self.notes,
        )
        if not self.spec.line_by_line:
            return in_chunks(features, self.spec.max_length)
        num_cut = int(features.facts["cut"].sum())
        if num_cut:
            self.notes.append(
                f"{source}: {num_cut} of {len(features)} lines are longer than {self.spec.max_length} tokens and are cut there"
            )
        return features
