"""What a Hugging Face causal LM is made of: loading, families, cutting.

Importing this package registers ffgym's own model classes, so that a saved model loads through
``AutoModelForCausalLM.from_pretrained`` without ``trust_remote_code``.
"""

from ffgym.models.families import register
from ffgym.plugins.built_ins import BUILTINS
from ffgym.plugins.kinds import imported

register(imported(family.target)() for family in BUILTINS["family"].values())
