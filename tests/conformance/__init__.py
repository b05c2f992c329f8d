"""PEFT's own test-suite, from the source distribution of the installed version, run against our methods."""
