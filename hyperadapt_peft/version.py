"""The package's version and where it comes from, alone so that a build can read it without importing torch."""

__version__ = "0.1.0"

# No package index has it: what README files of adapters and errors say is to be typed with the place of the source.
INSTALL = "pip install <path or URL of the hyperadapt_peft repository>"
