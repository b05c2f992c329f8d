"""The tuners, each as PEFT's own are built, and what they share."""
