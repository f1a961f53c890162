"""Criteria, one file each: which units of a sublayer go first. `ffgym.plugins.manager.BUILTINS` lists them."""
