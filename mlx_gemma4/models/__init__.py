"""The model graph. Read `text.py` from top to bottom; `moe.py`, `rope.py` and `fused.py` are its parts."""
