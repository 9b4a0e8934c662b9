"""The checks that several ranks make, by module: the same on CPUs and on GPUs."""

TRAINING_MODULE = "tests.train.distributed.training_checks"
TRAINING_CHECKS = [
    "each_sample_sees_its_own_frames_and_captions",
    "stdit_at_every_stage",
    "stdit3_at_every_stage",
    "dit_at_every_stage",
    "plain_data_parallelism_at_every_stage",
    "bfloat16_keeps_float32_masters_at_every_stage",
    "steps_in_buckets_are_those_of_deepspeed",
    "gradients_are_freed_as_the_stage_says",
    "gradients_that_some_ranks_do_not_have_count_as_zero",
    "a_step_that_is_not_finite_on_one_rank_is_taken_by_none",
    "the_average_can_take_the_models_place",
    "recomputing_activations_changes_nothing",
    "swapping_places_in_pieces_changes_nothing",
    "recorded_passes_are_those_launched_one_by_one",
    "offloading_changes_nothing",
    "a_run_goes_on_with_other_ranks",
]
ON_GPUS = ["steps_are_launched_without_waiting"]
"""Of the same module, for GPUs alone."""
ON_FOUR = [
    "each_sample_sees_its_own_frames_and_captions",
    "stdit_at_every_stage",
    "stdit3_at_every_stage",
    "dit_at_every_stage",
    "steps_in_buckets_are_those_of_deepspeed",
    "groups_and_parts_of_a_batch",
]

LAYOUT_MODULE = "tests.train.distributed.layout_checks"
LAYOUT_CHECKS = [
    "layouts_change_no_value_and_no_gradient",
    "tokens_that_travel_in_parcels_change_no_bit",
    "what_cannot_be_spread_is_told",
]
