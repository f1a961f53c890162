"""What ``ffgym run`` does, stage by stage."""
