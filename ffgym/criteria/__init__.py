"""Criteria, one file each: which units of a sublayer go first. `ffgym.plugins.built_ins.BUILTINS` lists them."""
