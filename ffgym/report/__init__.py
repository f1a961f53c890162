"""What a run shows at its end: the table, the pictures and the model card. Nothing here measures anything."""
