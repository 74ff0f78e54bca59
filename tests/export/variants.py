"""Every variant of the model, and every way of exporting it."""

# Weights of length 1 are large enough.
NGPT = ["model.ngpt=true", "optimizer.weight_decay=0"]
NGPT += ["model.embedding_init_range=0.02", "model.decoder_init_range=0.02"]

MODERNBERT = ["model.rms_norm=false", "model.hidden_act=geglu", "model.embedding_norm=true", "model.decoder_bias=true"]
MODERNBERT += ["model.first_attention_norm=false", "model.prediction_head=true", "model.num_hidden_layers=3"]
MODERNBERT += ["model.local_attention=8", "model.global_attention_every=2", "model.local_rope_theta=500"]

RUNS: dict[str, list[str]] = {
    "tied": [],
    "untied": ["model.tie_word_embeddings=false"],
    "learned": ["model.rope=false"],
    "gelu_layernorm": ["model.rms_norm=false", "model.hidden_act=gelu"],
    "norms": ["model.qk_norm=true", "model.embedding_norm=true"],
    "biased": ["model.decoder_bias=true"],
    "biased_untied": ["model.decoder_bias=true", "model.tie_word_embeddings=false", "model.qk_norm=true"],
    "ngpt": NGPT,
    "modernbert": MODERNBERT,
    "wordpiece": ["tokenizer.path=TOKENIZERS/wordpiece"],
    "unigram": ["tokenizer.path=TOKENIZERS/unigram"],
    "ngpt_untied": [*NGPT, "model.tie_word_embeddings=false", "model.base_scale=0.1"],
}
EXPORTS = {
    "native": ("tied", "auto", "fp32"),
    "native_untied": ("untied", "native", "fp32"),
    "native_bf16": ("tied", "auto", "bf16"),
    "native_wordpiece": ("wordpiece", "auto", "fp32"),
    "native_unigram": ("unigram", "auto", "fp32"),
    "native_modernbert": ("modernbert", "auto", "fp32"),
    "remote_modernbert": ("modernbert", "remote_code", "fp32"),
    "learned": ("learned", "auto", "fp32"),
    "gelu_layernorm": ("gelu_layernorm", "auto", "fp32"),
    "norms": ("norms", "auto", "fp32"),
    "biased": ("biased", "auto", "fp32"),
    "biased_untied": ("biased_untied", "auto", "bf16"),
    "ngpt": ("ngpt", "auto", "fp32"),
    "ngpt_untied": ("ngpt_untied", "auto", "bf16"),
    "remote": ("tied", "remote_code", "fp32"),
    "remote_untied": ("untied", "remote_code", "bf16"),
}
"""Name of the folder: run, --format, --dtype."""
