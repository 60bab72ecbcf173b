"""switchcli: Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch, from the command line."""

__version__ = "0.1.0"
