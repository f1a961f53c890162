"""What a Hugging Face causal LM is made of: loading, families, capture, surgery, export.

Importing this package registers ffgym's own model classes, so that a saved model loads through
``AutoModelForCausalLM.from_pretrained`` without ``trust_remote_code``.
"""

from ffgym.models.modeling_ffgym import register

register()
