"""Every variant of the model, and every way of exporting it."""

RUNS: dict[str, list[str]] = {
    "tied": [],
    "untied": ["model.tie_word_embeddings=false"],
    "learned": ["model.rope=false"],
    "gelu_layernorm": ["model.rms_norm=false", "model.hidden_act=gelu"],
}
EXPORTS = {
    "native": ("tied", "auto", "fp32"),
    "native_untied": ("untied", "native", "fp32"),
    "native_bf16": ("tied", "auto", "bf16"),
    "learned": ("learned", "auto", "fp32"),
    "gelu_layernorm": ("gelu_layernorm", "auto", "fp32"),
    "remote": ("tied", "remote_code", "fp32"),
    "remote_untied": ("untied", "remote_code", "bf16"),
}
"""Name of the folder: run, --format, --dtype."""
