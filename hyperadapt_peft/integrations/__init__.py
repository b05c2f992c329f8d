"""All that touches other packages' classes, and all that importing the package changes in the process.

| what | where | why | ends when |
| --- | --- | --- | --- |
| members of `PeftType`, entries of the tables of `peft.mapping` | `peft.py` | it is how a method is registered | PEFT's enum has an extension point |
| the tables of `peft.tuners.mixed`, and a sub-class as `peft.mixed_model.MixedModel` | `peft.py` | `PeftMixedModel` knows the methods by name only | it asks PEFT's tables |
| `PeftAdapterMixin.load_adapter` of transformers | `transformers.py` | it has no hook for the weights, nor for a refusal | it calls the tuner's hook for loading, as PEFT does |
| `CommitOperationAdd.__init__` of huggingface_hub | `hub.py` | who pushes an adapter writes a new README over the one with the import line | PEFT finds methods that are installed |
"""
