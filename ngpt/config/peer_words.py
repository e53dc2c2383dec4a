"""Words of other programs and of the source reports for our settings, so that an error can name the one that is meant.

They are those of the `transformers` library, nanoGPT, nanochat, the official nGPT, Lightning and Ray Tune.
"""

# By dotted name, and `resources`, `budget`, `metric` and `early_stop` as in a campaign file.
_WORDS = {
    "steps": "max_steps num_steps total_steps train_steps num_train_steps max_iters num_iterations iterations "
    "num_train_epochs num_epochs epochs max_epochs",
    "batch_size": "total_batch_size train_batch_size global_batch_size",
    "micro_batch_size": "per_device_train_batch_size device_batch_size gradient_accumulation_steps grad_accum_steps "
    "accumulate_grad_batches",
    "project_every": "lazy_proj_freq projection_interval normalize_every",
    "eval_every": "eval_steps eval_interval val_loss_every val_check_interval evaluation_interval",
    "eval_tokens": "eval_iters eval_batches val_tokens limit_val_batches",
    "init_from": "model_name_or_path pretrained pretrained_model_name_or_path resume_from_checkpoint load_from",
    "dtype": "precision torch_dtype mixed_precision bf16 fp16",
    "activation_checkpointing": "gradient_checkpointing activation_checkpoint recompute",
    "compile": "torch_compile use_compile",
    "seed": "random_seed manual_seed data_seed",
    "model.n_layer": "num_layers num_hidden_layers n_layers depth num_blocks",
    "model.n_head": "num_attention_heads num_heads n_heads",
    "model.n_kv_head": "num_key_value_heads n_kv_heads num_kv_heads num_query_groups",
    "model.n_embd": "hidden_size d_model model_dim embed_dim embedding_dim n_embed emb_dim hidden_dim",
    "model.block_size": "max_seq_len seq_len seq_length sequence_len sequence_length max_seq_length n_positions "
    "max_position_embeddings n_ctx context_length context_size max_length",
    "model.tied": "tie_word_embeddings tie_embeddings weight_tying",
    "model.mlp": "hidden_act activation activation_function",
    "model.mlp_ratio": "intermediate_size ffn_dim d_ff n_inner mlp_hidden",
    "model.softcap": "final_logit_softcapping logit_softcap",
    "model.rope_base": "rope_theta",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "model.qkv_bias": "attention_bias",
    "model.residual": "use_ngpt",
    "model.alpha": "alpha_init alpha_attn alpha_mlp",
    "model.alpha_kind": "scalar_alpha",
    "model.logit_scale": "sz_init_value",
    "model.norm_mode": "dotprod_norm",
    "optim.name": "optimizer optimizer_name optimizer_type",
    "optim.lr": "learning_rate max_lr peak_lr base_lr lr_weights matrix_lr muon_lr",
    "optim.lr_embedding": "embedding_lr embed_lr",
    "optim.lr_head": "unembedding_lr head_lr",
    "optim.lr_scales": "scalar_lr scalar_lrs",
    "optim.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optim.eps": "adam_epsilon adam_eps epsilon",
    "optim.weight_decay": "wd",
    "optim.grad_clip": "max_grad_norm clip_grad clip_grad_norm gradient_clip_val grad_norm_clip",
    "optim.momentum": "muon_momentum",
    "optim.ns_steps": "newton_schulz_steps",
    "schedule.name": "lr_scheduler_type lr_scheduler lr_schedule scheduler decay_lr",
    "schedule.warmup_steps": "warmup_ratio warmup_iters num_warmup_steps lr_warmup_iters",
    "schedule.final_ratio": "min_lr min_lr_ratio min_learning_rate final_lr_frac",
    "schedule.decay_fraction": "warmdown_ratio warmdown_iters cooldown_frac cooldown_iters",
    "data.corpus": "dataset dataset_name train_data train_file data_path data_dir",
    "data.tokenizer": "tokenizer_name tokenizer_path",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_interval",
    "checkpoint.keep_last": "save_total_limit num_to_keep",
    "tracker.wandb": "wandb_mode wandb_log report_to use_wandb",
    "tracker.project": "wandb_project",
    "tracker.run_name": "wandb_run_name",
    "tracker.log_every": "logging_steps log_interval",
    "metric.goal": "mode",
    "resources.workers": "num_workers max_concurrent_trials n_jobs",
    "resources.gpus_per_trial": "num_gpus gpus",
    "resources.ranks_per_trial": "nproc_per_node world_size ranks",
    "resources.cpus_per_trial": "num_cpus cpus",
    "budget.hours": "time_budget_s time_limit max_hours",
    "budget.trials": "max_trials",
    "early_stop.reduction": "reduction_factor eta",
    "early_stop.first": "grace_period min_resource",
}
PEER_WORDS = {word: name for name, words in _WORDS.items() for word in words.split()}

# What is counted otherwise here, or how the value is written.
NOTES = {
    **dict.fromkeys(("num_train_epochs", "num_epochs", "epochs", "max_epochs"), "optimizer updates, not epochs"),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"), "sequences"),
    **dict.fromkeys(("per_device_train_batch_size", "device_batch_size"), "`batch_size` is that of a whole step"),
    **dict.fromkeys(("eval_iters", "eval_batches", "limit_val_batches"), "tokens, not batches"),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "mlp_hidden"), "divided by n_embd"),
    **dict.fromkeys(("min_lr", "min_learning_rate"), "divided by the peak"),
    **dict.fromkeys(("warmdown_iters", "cooldown_iters"), "a share of the steps"),
    "total_batch_size": "sequences, not tokens",
    "warmup_ratio": "steps, not a share",
    "scalar_alpha": "`scalar`, `vector` or `head`",
    "dotprod_norm": "`dotprod`",
    "use_ngpt": "`lerp` for nGPT, `add` for GPT",
    "bf16": "`bfloat16`",
    "fp16": "`bfloat16` or `float32`",
    "time_budget_s": "hours",
    "time_limit": "hours",
    "resume_from_checkpoint": "weights to start from; the same command resumes a run",
}


def peer_word(name: str) -> str:
    """Returns a setting as `PEER_WORDS` has it: without sections, in lower case, with underscores."""
    return name.rpartition(".")[2].lower().replace("-", "_")


def our_word(name: str) -> str | None:
    """Returns our name for another program's setting, perhaps with a note in parentheses: `steps (not epochs)`.

    Sections before it, upper case and hyphens do not matter: `model.Hidden-Size`. None for a word that is not known.
    """
    word = peer_word(name)
    if word not in PEER_WORDS:
        return None
    return f"{PEER_WORDS[word]} ({NOTES[word]})" if word in NOTES else PEER_WORDS[word]
