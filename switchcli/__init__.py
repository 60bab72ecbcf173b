"""switchcli: Switch Transformers (Fedus, Zoph, Shazeer 2021) in PyTorch, from the command line."""

from importlib.metadata import version

__version__ = version("switchcli")
