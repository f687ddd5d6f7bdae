"""Extractive question answering: SQuAD and whatever looks like it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_accel.errors import DataError
from sparse_accel.tasks.base import DataOptions, LazyFiles, Scored, Split, TaskData
from sparse_accel.tasks.collating import Collator
from sparse_accel.tasks.features import Features, load_features, save_features
from sparse_accel.tasks.files import cache_folder
from sparse_accel.tasks.qa_postprocess import postprocess
from sparse_accel.tasks.qa_windows import Question, WindowSpec, cut_windows, window_spec
from sparse_accel.tasks.rows import BadRows, KnownColumns
from sparse_accel.tasks.splits import SplitName, SplitReader, check_data_options, longest_feature
from sparse_accel.tasks.squad_metrics import Reference, squad_v1, squad_v2
from sparse_accel.tasks.squad_rows import Example, check_rows, known_columns, under_known_names, under_usual_names

# Tokens of a window where nobody says how many.
_DEFAULT_LENGTH: Final = 384


class QuestionAnswering:
    """The task: a model gives each token a score as the start and as the end of the answer."""

    name = "question_answering"
    output_keys: tuple[str, ...] = ("start_logits", "end_logits")
    label_keys: tuple[str, ...] = ("start_positions", "end_positions")
    features_are_fixed = True

    @property
    def model_class(self) -> Any:
        """transformers' AutoModelForQuestionAnswering."""
        from transformers import AutoModelForQuestionAnswering

        return AutoModelForQuestionAnswering

    def load(
        self,
        options: DataOptions,
        tokenizer: Any,
        *,
        max_positions: int | None = None,
        model_labels: Sequence[str] | None = None,
        model_problem_type: str | None = None,
    ) -> TaskData:
        """See `Task.load`."""
        check_data_options(options, {"doc_stride": 0, "n_best_size": 1, "max_answer_length": 1})
        notes: list[str] = []
        max_length = longest_feature(options, tokenizer, max_positions, notes, default=_DEFAULT_LENGTH)
        spec = window_spec(tokenizer, max_length=max_length, stride=options.doc_stride, labels=False)
        loader = _Loader(options, spec, notes)
        train = loader.split("train", options.max_train_samples) if options.do_train else None
        validation = loader.split("validation", options.max_eval_samples) if options.do_eval else None
        test = loader.split("test", options.max_predict_samples) if options.do_predict else None
        pad_values = {"input_ids": tokenizer.pad_token_id}
        if spec.token_types:
            pad_values["token_type_ids"] = tokenizer.pad_token_type_id
        return TaskData(
            collate=Collator(
                pad_values, max_length, bool(options.pad_to_max_length), tokenizer.padding_side, self.label_keys
            ),
            train=train.features if train is not None else None,
            validation=validation,
            test=test,
            notes=notes,
            num_dropped=loader.num_dropped,
        )

    def num_units(self, batch: Mapping[str, Tensor]) -> int:
        """Features: a question-answering loss is a mean over them."""
        return len(batch["attention_mask"])

    def loss(
        self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor], *, include_padding: bool = False
    ) -> Tensor:
        """The mean of the cross entropies of start and end, each over the tokens of the feature: padding, which
        transformers' own loss lets compete with them, is left out unless `include_padding`."""
        is_token = batch["attention_mask"].bool()
        losses = []
        for output, label in zip(self.output_keys, self.label_keys, strict=True):
            logits = outputs[output].float()
            if not include_padding:
                # Finite, yet exp of it is exactly 0 beside any token's logit, and so is its gradient.
                logits = logits.masked_fill(~is_token, torch.finfo(torch.float32).min)
            losses.append(F.cross_entropy(logits, batch[label]))
        return torch.stack(losses).mean()

    def distillation_keep(self, key: str, logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
        """bool [B, S], True on tokens: start and end logits are [B, S], and padding says nothing."""
        return batch["attention_mask"].bool()

    def for_scoring(self, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
        """The logits of each feature's tokens, float32 [T]; `outputs` has [B, S] logits."""
        keep = batch["attention_mask"].bool().cpu().numpy()
        logits = {key: outputs[key].detach().float().cpu().numpy() for key in self.output_keys}
        return {key: [row[kept] for row, kept in zip(rows, keep, strict=True)] for key, rows in logits.items()}

    def score(self, split: Split, outputs: Mapping[str, Sequence[np.ndarray]], options: DataOptions) -> Scored:
        """Answers, and exact match and F1 where every question (version 2: the data) has answers to compare with."""
        answers = postprocess(
            split.examples,
            split.features,
            outputs["start_logits"],
            outputs["end_logits"],
            version_2_with_negative=options.version_2_with_negative,
            n_best_size=options.n_best_size,
            max_answer_length=options.max_answer_length,
            null_score_diff_threshold=options.null_score_diff_threshold,
        )
        files: dict[str, Callable[[], Any]] = {
            "predictions": lambda: answers.predictions,
            # Half a million small objects: made for the evaluation whose files are written, the last of a run.
            "nbest_predictions": lambda: answers.nbest,
        }
        if answers.null_odds is not None:
            files["null_odds"] = lambda: answers.null_odds
        references = [Reference(example.id, example.answer_texts) for example in split.examples]
        metrics: dict[str, float] = {}
        if options.version_2_with_negative:
            if any(reference.answers for reference in references):
                metrics = squad_v2(answers.predictions, references)
        elif all(reference.answers for reference in references):
            metrics = squad_v1(answers.predictions, references)
        return Scored(metrics, LazyFiles(files))


class _Loader:
    """Reads, checks and tokenizes the splits of one run."""

    def __init__(self, options: DataOptions, spec: WindowSpec, notes: list[str]) -> None:
        self.options = options
        self.spec = spec
        self.notes = notes
        self.num_dropped = 0
        self._known: KnownColumns | None = None
        self._reader = SplitReader(options, notes)

    def split(self, name: SplitName, max_samples: int | None) -> Split:
        """One split; `max_samples` limits the examples, and then the features that they gave."""
        rows, source = self._reader.rows(name)
        bad = BadRows(self.options.on_bad_rows)
        options = self.options
        named = {"question": options.question_column, "context": options.context_column}
        # Test data may well lack the answers that training data have.
        named |= {"answers": options.answer_column} if name != "test" else {}
        rows = under_usual_names(rows, named)
        answers = self._answers_wanted(name)
        if self._known is None:
            self._known = known_columns(rows, answers, source)
        else:
            rows = under_known_names(rows, self._known, answers)
        examples, notes = check_rows(rows, bad, answers=answers)
        self.notes.extend(notes)
        examples = examples[:max_samples]
        unanswered = sum(not example.answer_texts for example in examples)
        if name == "train" and unanswered and not self.options.version_2_with_negative:
            self.notes.append(
                f"{source}: {unanswered} of {len(examples)} questions have no answer; the model learns to point at the "
                "first token for them, but it may only answer nothing with --version_2_with_negative"
            )
        examples, features = self._features(examples, bad, labels=name == "train")
        if bad.messages:
            self.notes.append(bad.note(source))
            self.num_dropped += len(bad.messages)
        return Split(features.take(max_samples), examples)

    def _answers_wanted(self, name: SplitName) -> str:
        if name == "test":
            return "ignored"
        # Training on an unanswerable question works (its label is the CLS token), scoring it needs version 2.
        return "optional" if name == "train" or self.options.version_2_with_negative else "required"

    def _features(self, examples: list[Example], bad: BadRows, labels: bool) -> tuple[list[Example], Features]:
        spec = WindowSpec(**{**vars(self.spec), "labels": labels})
        path = cache_folder(self.options.cache_dir) / f"{_digest(examples)}-{spec.digest()[:32]}.npz"
        cached = None if self.options.overwrite_cache else load_features(path)
        if cached is not None:
            return examples, cached
        questions = [_question(example) for example in examples]
        windows = cut_windows(questions, spec, self.options.preprocessing_num_workers)
        if windows.refused:
            for index, why in sorted(windows.refused.items()):
                bad.add(examples[index].where, why)
            kept = [example for index, example in enumerate(examples) if index not in windows.refused]
            if not kept:
                raise DataError(f"no usable row is left: {bad.messages[0]}")
            return self._features(kept, bad, labels)
        try:
            save_features(path, windows.features)
        except OSError as error:
            self.notes.append(f"the features are not cached: {path.parent}: {error.strerror or error}")
        return examples, windows.features


def _question(example: Example) -> Question:
    """The first answer is the one to learn, as in Hugging Face's example."""
    if not example.answer_texts:
        return Question(example.question, example.context, None, None)
    start = example.answer_starts[0]
    return Question(example.question, example.context, start, start + len(example.answer_texts[0]))


def _digest(examples: Sequence[Example]) -> str:
    """A name for what the features depend on: questions, contexts and answers in order."""
    digest = hashlib.sha256()
    add: Callable[[bytes], None] = digest.update
    for example in examples:
        for text in (example.question, example.context, *example.answer_texts[:1]):
            data = text.encode()
            add(len(data).to_bytes(8, "little"))
            add(data)
        add(repr(example.answer_starts[:1]).encode())
    return digest.hexdigest()[:32]
