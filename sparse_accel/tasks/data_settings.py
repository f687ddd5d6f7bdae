"""The options that tasks read, with their defaults, for whoever has no command line: evaluation, checks, tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """All of `tasks.base.DataOptions`; names, meanings and defaults are those of training's options."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    train_file: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    overwrite_cache: bool = False
    preprocessing_num_workers: int | None = None
    validation_split_percentage: int | None = None
    validation_ratio: float | None = None
    streaming: bool = False
    max_seq_length: int | None = None
    pad_to_max_length: bool | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_predict_samples: int | None = None
    seed: int = 42
    task_name: str | None = None
    input_column_names: str | None = None
    text_column_name: str | None = None
    label_column_name: str | None = None
    eval_on_test: bool = False
    label_all_tokens: bool = False
    return_entity_level_metrics: bool = False
    dataset_name_2: str | None = None
    dataset_config_name_2: str | None = None
    line_by_line: bool = False
    mlm_probability: float = 0.15
    whole_word_mask: bool = False
    question_column: str | None = None
    context_column: str | None = None
    answer_column: str | None = None
    version_2_with_negative: bool = False
    null_score_diff_threshold: float = 0.0
    doc_stride: int = 128
    n_best_size: int = 20
    max_answer_length: int = 30
    cache_dir: str | None = None
    on_bad_rows: str = "error"
    do_train: bool = False
    do_eval: bool = False
    do_predict: bool = False
