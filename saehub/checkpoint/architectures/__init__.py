"""One module per built-in architecture, each a subclass of `saehub.SAE`; `checkpoint/registry.py` names them."""
