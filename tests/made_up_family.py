"""The module of a package that brings a family which ffgym lacks; ``{name}`` is the model type."""

FAMILY = """
import ffgym

class Starcoder2(ffgym.Family):
    '''Grouped-query attention and an MLP of two linears.'''

    name = "{name}"
    mlp_producers = ("mlp.c_fc",)
    mlp_consumer = "mlp.c_proj"
    stock = ffgym.Stock()
    gguf = ("starcoder",)

@ffgym.hookimpl
def ffgym_families():
    return [Starcoder2]
"""
