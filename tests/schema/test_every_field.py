"""No field of the recipe is without a test that changing it changes behaviour: the table says which test that is."""

from __future__ import annotations

import typing
from pathlib import Path

import pytest

from peftkit.heads.preference_losses import LOSSES
from peftkit.methods.auto_layers import LayerOptions
from peftkit.methods.auto_rank import RankOptions
from peftkit.schema.recipe import Recipe
from peftkit.schema.registries import METHODS, QUANTIZATIONS, TASKS
from peftkit.schema.sections import ConfigSection

FIELDS = "training/test_training_fields.py::"
WEIGHTS = FIELDS + "test_every_field_of_learning_changes_the_trained_weights"
CLEANING, SPLITTING = "data/test_cleaning_steps.py::", "data/test_splitting_properties.py::"
LORA, CLASSIFICATION = "methods/test_lora_method.py::", "tasks/test_classification.py::"
STAGES = "test_run_stages.py::"
SEQ2SEQ = "test_run_seq2seq.py::"
SIMILARITY = "test_run_similarity.py::"
RERANKING = "test_run_reranking.py::test_each_field_takes_effect"
QUESTIONS = "tasks/test_question_answering.py::"
MASKED_LM = "test_run_masked_lm.py::"
TOKENS = "tasks/test_token_classification.py::"
PREFERENCE, PREFERENCE_LOSSES = "tasks/test_preference.py::", "heads/test_preference_losses.py::"
INSTRUCTION, STYLE = "tasks/test_instruction.py::", "tasks/test_style.py::"
BOTTLENECK = "methods/test_bottleneck.py::"
GENERATION, LANGUAGE = "evaluation/test_generation.py::", "test_run_language.py::"

KERNELS = "models/kernels/"
METHOD_FIELDS = "methods/test_methods_in_training.py::"
TESTS = {
    "name": FIELDS + "test_tracking_and_output_dir_and_name",
    "model.adapter": STAGES + "test_an_adapter_of_peft_is_continued_and_exported_on_the_original_base",
    "model.adapter_use": STAGES + "test_two_stages_interrupted_in_each_end_with_the_same_bytes",
    "model.source": "models/test_model_sources.py::test_what_is_neither_folder_nor_hub_id",
    "model.revision": "hub/test_hub.py::test_what_the_hub_lacks_or_withholds_is_one_message_each",
    "model.pooling": "models/test_pooled_logits.py::test_pooled_before_the_head_equals_pooled_token_logits",
    "model.dtype": "models/test_pooled_logits.py::test_bf16_weights_under_autocast",
    "model.attention": "models/test_loading.py::test_attention_implementation",
    "model.dropout": "models/test_loading.py::test_dropout_reaches_every_layer",
    "model.chat_template": "models/test_chat_template.py::test_a_tokenizer_without_template_is_told_how_to_get_one",
    "model.offload.to": "models/test_offload.py::"
    "test_weights_are_read_from_the_models_own_files_or_from_the_cache",
    "model.fold_system": INSTRUCTION + "test_a_system_prompt_is_folded_into_the_first_user_turn",
    "quantization": "models/test_quantization.py::test_heads_embeddings_and_adapters_are_never_quantized",
    "quantization[nf4].double": "models/test_quantization.py::test_double_quantization_and_threshold_arrive",
    "quantization[int8].threshold": "models/test_quantization.py::test_double_quantization_and_threshold_arrive",
    "method": "schema/test_overrides.py::test_a_new_kind_swaps_the_part",
    "method[lora].rank": LORA + "test_rank_alpha_and_scaling",
    "method[lora].alpha": LORA + "test_rank_alpha_and_scaling",
    "method[lora].dropout": LORA + "test_rank_alpha_and_scaling",
    "method[lora].target_modules": LORA + "test_names_patterns_and_whole_names",
    "method[lora].exclude_modules": LORA + "test_exclude_and_layers",
    "method[lora].layers": LORA + "test_exclude_and_layers",
    "method[lora].bias": LORA + "test_bias",
    "method[lora].use_rslora": LORA + "test_rank_alpha_and_scaling",
    "method[lora].use_dora": LORA + "test_rank_alpha_and_scaling",
    "method[lora].init_lora_weights": LORA + "test_starts",
    "method[lora].rank_pattern": LORA + "test_rank_alpha_and_scaling",
    "method[lora].alpha_pattern": LORA + "test_rank_alpha_and_scaling",
    "LayerOptions.tolerance": "methods/test_auto_layers.py::test_tolerance_and_at_least_decide",
    "LayerOptions.at_least": "methods/test_auto_layers.py::test_tolerance_and_at_least_decide",
    "LayerOptions.rows": "training/test_choosing.py::test_options_arrive_and_rows_bound_what_is_read",
    "RankOptions.at_most": "methods/test_auto_rank.py::test_tolerance_and_at_most_bound_it",
    "RankOptions.tolerance": "methods/test_auto_rank.py::test_tolerance_and_at_most_bound_it",
    "RankOptions.rows": "training/test_choosing.py::test_a_run_trains_as_if_its_recipe_named_what_it_chose",
    "method[bottleneck].variant": BOTTLENECK + "test_llama_written_out",
    "method[bottleneck].reduction_factor": BOTTLENECK + "test_size_and_reduction_factor_give_the_width",
    "method[bottleneck].size": BOTTLENECK + "test_size_and_reduction_factor_give_the_width",
    "method[bottleneck].nonlinearity": BOTTLENECK + "test_nonlinearity_scaling_and_dropout_shape_the_output",
    "method[bottleneck].dropout": BOTTLENECK + "test_nonlinearity_scaling_and_dropout_shape_the_output",
    "method[bottleneck].scaling": BOTTLENECK + "test_nonlinearity_scaling_and_dropout_shape_the_output",
    "method[bottleneck].init": BOTTLENECK + "test_init_normal_is_near_the_base_but_not_it",
    "method[bottleneck].layers": BOTTLENECK + "test_layers_choose_blocks",
    "method[top_k].k": "methods/test_frozen_top_k_full.py::test_top_k_trains_the_last_blocks_and_what_is_above",
    "task": INSTRUCTION + "test_every_format_is_read_as_the_same_messages",
    "task[classification].problem_type": CLASSIFICATION + "test_whole_numbers_are_a_regression_when_the_recipe_says_so",
    "task[token_classification].scheme": TOKENS + "test_scheme_labels_and_weights_change_what_is_learned",
    "task[token_classification].class_weights": TOKENS + "test_scheme_labels_and_weights_change_what_is_learned",
    "task[token_classification].stride": TOKENS + "test_stride_is_what_the_windows_of_a_text_share",
    "task[question_answering].stride": QUESTIONS + "test_windows_share_the_stride_and_learn_where_the_answer_is",
    "task[question_answering].unanswered_windows": QUESTIONS
    + "test_windows_without_the_answer_can_be_left_out_of_training",
    "task[question_answering].max_answer_length": "test_run_questions.py::test_the_length_of_an_answer_is_limited",
    "task[question_answering].no_answer_threshold": "test_run_questions.py::"
    "test_the_threshold_is_chosen_on_validation_rows_and_stored",
    "task[masked_lm].mask_probability": MASKED_LM + "test_fields_change_what_is_learned",
    "task[masked_lm].whole_word": MASKED_LM + "test_fields_change_what_is_learned",
    "task[masked_lm].replacement_shares": MASKED_LM + "test_fields_change_what_is_learned",
    "task[masked_lm].candidates": MASKED_LM + "test_candidates_says_how_many_are_given",
    "task[similarity].loss": SIMILARITY + "test_what_is_learned_goes_by_the_loss_and_its_fields",
    "task[similarity].scale": SIMILARITY + "test_what_is_learned_goes_by_the_loss_and_its_fields",
    "task[similarity].symmetric": SIMILARITY + "test_what_is_learned_goes_by_the_loss_and_its_fields",
    "task[similarity].negatives": SIMILARITY + "test_what_is_learned_goes_by_the_loss_and_its_fields",
    "task[similarity].dimensions": SIMILARITY + "test_what_is_learned_goes_by_the_loss_and_its_fields",
    **{f"task[reranking].{name}": RERANKING for name in ("max_relevance", "relevant_from", "negatives")},
    "task[classification].label_smoothing": CLASSIFICATION + "test_cross_entropy_is_torchs_however_the_batch_is_cut",
    "task[classification].class_weights": CLASSIFICATION + "test_balanced_weights_are_those_of_scikit_learn",
    "task[classification].cosine_temperature": "heads/test_cosine.py::test_a_run_starts_where_its_classes_are",
    "task[classification].threshold": CLASSIFICATION + "test_the_threshold_moves_multi_label_decisions",
    "task[instruction].train_on": INSTRUCTION + "test_train_on_chooses_the_scored_turns",
    "task[instruction].packing": INSTRUCTION + "test_packed_windows_hold_every_example_and_score_the_same",
    "task[instruction].too_long": INSTRUCTION + "test_a_prompt_that_fills_the_window_is_an_error_on_demand",
    "task[preference].loss": PREFERENCE + "test_every_format_of_marks_is_read_as_the_same",
    "task[preference].too_long": PREFERENCE + "test_long_answers_are_cut_and_prompts_without_room_left_out_or_refused",
    **{
        f"task.loss[{kind}].{name}": PREFERENCE_LOSSES + "test_a_loss_over_pairs_is_its_formula"
        for kind, names in {
            "cpo": ("beta", "label_smoothing", "nll_weight"),
            "dpo": ("beta", "label_smoothing", "nll_weight"),
            "hinge": ("beta", "nll_weight"),
            "ipo": ("beta", "nll_weight"),
            "orpo": ("beta", "nll_weight"),
            "simpo": ("beta", "gamma", "label_smoothing", "nll_weight"),
        }.items()
        for name in names
    },
    **{
        f"task.loss[kto].{name}": PREFERENCE_LOSSES
        + "test_kto_is_its_formula_with_the_other_rows_answers_as_reference_point"
        for name in ("beta", "desirable_weight", "undesirable_weight")
    },
    **{
        f"task[seq2seq].{name}": SEQ2SEQ + "test_every_field_counts"
        for name in ("prefix", "max_target_length", "too_long")
    },
    "task[style].packing": STYLE + "test_without_packing_a_window_holds_one_document",
    "task[style].prompt_words": STYLE + "test_the_prompt_is_the_documents_first_words_as_they_stand",
    **{
        f"method[{kind}].{name}": METHOD_FIELDS + "test_each_field_changes_what_is_trained"
        for kind, names in {
            "adalora": ("alpha",),
            "boft": ("block_size",),
            "ia3": ("target_modules", "feedforward_modules"),
            "miss": ("rank", "variant", "mini_rank"),
            "oft": ("block_size", "block_share", "constrained", "eps", "neumann_terms"),
            "p_tuning": ("encoder", "encoder_size", "encoder_layers", "virtual_tokens"),
            "prefix_tuning": ("init", "projection", "projection_size"),
            "prompt_tuning": ("init", "init_text"),
            "vera": ("rank", "d_initial", "projection_seed"),
        }.items()
        for name in names
    },
    **{
        f"method[{kind}].{name}": METHOD_FIELDS + "test_each_field_changes_what_is_trained"
        for kind in ("adalora", "boft", "miss", "oft", "vera")
        for name in ("target_modules", "exclude_modules", "layers")
    },
    **{
        f"method[{kind}].dropout": METHOD_FIELDS + "test_dropout_is_on_in_training"
        for kind in ("adalora", "boft", "miss", "vera")
    },
    **{
        f"method[adalora].{name}": METHOD_FIELDS + "test_adalora_ends_at_its_budget"
        for name in ("target_r", "init_r", "prune_every")
    },
    **{
        f"method[adalora].{name}": METHOD_FIELDS + "test_adalora_phases_are_shares_of_the_run"
        for name in ("warmup", "final", "beta1", "beta2")
    },
    "method[adalora].orthogonality": METHOD_FIELDS + "test_adalora_penalty_is_what_peft_adds_to_its_own_loss",
    "method[boft].butterfly_factor": METHOD_FIELDS + "test_butterfly_factors_are_not_dropped_in_silence",
    "method[lora].eva_rho": METHOD_FIELDS + "test_eva_looks_along_the_principal_components_of_the_inputs",
    "method[lora].loraplus_lr_ratio": METHOD_FIELDS + "test_loraplus_gives_b_the_rate_that_peft_gives_it",
    "method[p_tuning].encoder_dropout": METHOD_FIELDS + "test_p_tuning_s_dropout_is_its_lstm_s",
    "method[peft].peft_type": METHOD_FIELDS + "test_any_method_of_peft_by_name_and_override",
    "method[peft].arguments": METHOD_FIELDS + "test_any_method_of_peft_by_name_and_override",
    "method[prefix_tuning].virtual_tokens": METHOD_FIELDS + "test_each_field_changes_what_is_trained",
    "method[prompt_tuning].virtual_tokens": METHOD_FIELDS + "test_each_field_changes_what_is_trained",
    "method[trainable_tokens].tokens": METHOD_FIELDS + "test_trained_tokens_are_named_or_the_special_ones",
    "method[vera].save_projection": METHOD_FIELDS + "test_vera_s_matrices_are_left_out_of_the_file_when_asked",
    "data.source": "data/test_source_kinds.py::test_csv_and_tsv_equal_pandas",
    "data.revision": "hub/test_hub.py::test_what_the_hub_lacks_or_withholds_is_one_message_each",
    "data.delimiter": "data/test_table_formats.py::test_delimiter_settles_what_cannot_be_detected",
    "data.quote": "data/test_table_formats.py::test_quote_settles_quotes_that_are_plain_characters",
    "data.encoding": "data/test_table_formats.py::test_encodings_that_cannot_be_told_are_refused_until_named",
    "data.subset": "data/test_hub_streaming.py::test_subset_and_revision_reach_the_hub",
    "data.splits": "data/test_source_kinds.py::test_a_folder_of_split_files_with_other_names_and_shards",
    "data.text": "data/test_bad_data.py::test_a_bad_header_is_named",
    "data.text_pair": CLASSIFICATION + "test_pairs_count_for_duplicates_and_labels_for_strata",
    "data.label": "data/test_bad_data.py::test_a_bad_csv_row_is_named",
    "data.label_separator": "tasks/test_label_spellings.py::test_a_separator_takes_effect_or_is_refused",
    "data.labels": "data/test_bad_data.py::test_an_unknown_label_and_a_single_class_are_named",
    "data.format": INSTRUCTION + "test_every_format_is_read_as_the_same_messages",
    "data.columns": INSTRUCTION + "test_every_format_is_read_as_the_same_messages",
    "data.ignore": "tasks/test_conversation.py::test_what_is_not_used_is_listed_once_with_its_rows",
    "data.system": INSTRUCTION + "test_a_system_prompt_of_the_recipe_goes_before_conversations_that_have_none",
    "data.weights": SPLITTING + "test_several_sources_are_mixed_by_weight",
    "data.streaming": "data/test_hub_streaming.py::test_streamed_rows_equal_downloaded_ones",
    "data.max_length": "data/test_pipeline_caches.py::test_encoding_is_what_the_tokenizer_gives",
    "data.validation_size": SPLITTING + "test_sizes_as_counts_and_the_source_s_own_splits",
    "data.test_size": SPLITTING + "test_sizes_as_counts_and_the_source_s_own_splits",
    "data.split_seed": "data/test_pipeline_caches.py::test_fingerprints_follow_what_they_depend_on",
    "data.stratify": SPLITTING + "test_without_stratify_shares_may_differ",
    "data.limit": SPLITTING + "test_limits_are_stratified_choices_of_each_split",
    "data.cleaning.empty": "data/test_bad_data.py::test_empty_rows_can_be_dropped",
    "data.cleaning.control_characters": CLEANING + "test_control_characters_are_stripped_and_meaningful_joiners_stay",
    "data.cleaning.duplicates": CLEANING + "test_duplicates_keep_the_first_and_ignore_case_and_spacing",
    "data.cleaning.null_words":
        "data/test_label_reports.py::test_words_for_null_are_counted_as_they_stand_and_dropped_on_demand",
    "data.cleaning.similar_classes":
        "data/test_label_reports.py::test_names_that_look_alike_are_reported_with_their_rows_or_merged",
    "data.cleaning.near_duplicates": CLEANING + "test_near_duplicates_are_told_dropped_or_ignored",
    "data.cleaning.near_threshold": CLEANING + "test_near_duplicates_are_told_dropped_or_ignored",
    "data.cleaning.leakage": CLEANING + "test_leakage_is_dropped_refused_or_told",
    "data.cleaning.conflicts": CLEANING + "test_conflicts_are_told_and_dropped_whole",
    "data.augmentation.copies": "data/test_pipeline_caches.py::test_augmentation_adds_copies_to_training_alone",
    "data.augmentation.swap": "data/test_pipeline_caches.py::test_each_kind_of_change_does_what_it_says",
    "data.augmentation.delete": "data/test_pipeline_caches.py::test_each_kind_of_change_does_what_it_says",
    "data.augmentation.typo": "data/test_pipeline_caches.py::test_each_kind_of_change_does_what_it_says",
    **{
        f"training.{name}": WEIGHTS
        for name in ("epochs", "batch_size", "batch_tokens", "batching", "learning_rate", "optimizer", "betas", "eps",
                     "weight_decay", "max_grad_norm", "scheduler", "warmup", "neftune_alpha", "weight_averaging",
                     "seed")
    },
    "training.max_steps": FIELDS + "test_max_steps_and_fractions_of_epochs_end_where_they_say",
    "training.max_time": FIELDS + "test_max_time_stops_with_a_checkpoint_to_go_on_from",
    "training.micro_batch_tokens": "training/test_batching.py::test_passes_stay_within_their_tokens",
    "training.micro_batch": "training/test_step.py::test_two_by_four_accumulated_equals_eight_by_one",
    "training.compile": KERNELS + "test_compile.py::test_a_compiled_run_learns_the_same",
    "training.gradient_checkpointing": FIELDS + "test_gradient_checkpointing_runs_layers_twice_and_learns_the_same",
    "training.early_stopping.patience": FIELDS + "test_early_stopping_waits_for_patience_and_ignores_small_gains",
    "training.early_stopping.min_delta": FIELDS + "test_early_stopping_waits_for_patience_and_ignores_small_gains",
    "training.best_metric": FIELDS + "test_best_metric_decides_which_checkpoint_is_restored",
    "training.feature_cache_gb": "training/test_features.py::test_the_size_is_told_and_the_limit_kept",
    "training.nonfinite": "test_run.py::test_numbers_that_are_not_finite_stop_the_run_and_name_the_rows",
    "training.threads": FIELDS + "test_threads_are_set",
    **{
        f"training.{name}": FIELDS + "test_log_every_evaluate_every_save_every_and_keep_checkpoints_are_counts"
        for name in ("log_every", "evaluate_every", "save_every", "keep_checkpoints")
    },
    **{
        f"evaluation.{name}": FIELDS + "test_evaluation_fields_shape_the_result"
        for name in ("metrics", "baselines", "batch_size", "confidence", "worst")
    },
    "evaluation.generation.max_new_tokens": GENERATION + "test_batched_equals_each_alone",
    "evaluation.generation.temperature": GENERATION + "test_sampled_tokens_follow_the_softmax",
    "evaluation.generation.top_p": GENERATION + "test_top_k_and_top_p_shut_tokens_out",
    "evaluation.generation.top_k": GENERATION + "test_top_k_and_top_p_shut_tokens_out",
    "evaluation.generation.repetition_penalty": LANGUAGE + "test_a_repetition_penalty_changes_the_text",
    "evaluation.generation.num_beams": GENERATION + "test_beams_are_those_of_transformers",
    "evaluation.generation.length_penalty": GENERATION + "test_beams_are_those_of_transformers",
    "evaluation.generation.test_rows": SEQ2SEQ
    + "test_fewer_test_rows_are_a_part_of_all_and_other_runs_are_compared_on_them",
    "evaluation.generation.seed": GENERATION + "test_sampling_depends_on_the_seed_and_the_row_but_not_on_the_batch",
    "evaluation.generation.samples": LANGUAGE + "test_samples_and_prompts_are_written_before_and_after",
    "evaluation.generation.prompts": LANGUAGE + "test_samples_and_prompts_are_written_before_and_after",
    "export.merge": "export/test_export_and_proof.py::test_merged_model_loads_in_plain_transformers",
    "export.prove": "export/test_export_and_proof.py::test_a_fresh_process_that_cannot_load_is_an_error",
    "export.tolerance": "export/test_export_and_proof.py::test_changed_weights_are_caught",
    "export.backends": "inference/test_backends.py::test_a_run_writes_what_its_recipe_names",
    "tracking": FIELDS + "test_tracking_and_output_dir_and_name",
    "output_dir": FIELDS + "test_tracking_and_output_dir_and_name",
}  # fmt: skip


def fields(part: type[ConfigSection], prefix: str = ""):
    """Dotted names of the leaves of a part."""
    for name, field in part.model_fields.items():
        held = (field.annotation, *typing.get_args(field.annotation))
        inner = [kind for kind in held if isinstance(kind, type) and issubclass(kind, ConfigSection)]
        if inner:
            yield from fields(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def all_fields() -> list[str]:
    names = list(fields(Recipe))
    for part, registry in (("method", METHODS), ("task", TASKS), ("quantization", QUANTIZATIONS)):
        for kind in registry.names():
            names += [f"{part}[{kind}].{name}" for name in registry.get(kind).model_fields if name != "kind"]
    for options in (LayerOptions, RankOptions):
        names += [f"{options.__name__}.{name}" for name in options.model_fields]
    for kind in LOSSES.names():
        names += [f"task.loss[{kind}].{name}" for name in LOSSES.get(kind).model_fields if name != "kind"]
    return names


def test_every_field_has_its_test_and_no_entry_is_stale():
    assert set(all_fields()) == set(TESTS)


@pytest.mark.parametrize("test", sorted(set(TESTS.values())))
def test_the_test_exists(test):
    file, _, name = test.partition("::")
    assert f"def {name}(" in (Path(__file__).parents[1] / file).read_text(encoding="utf-8")
