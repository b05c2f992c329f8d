"""Some of the sequences of `python -m tests.properties.operations`."""

from .operations import run


def test_sequences_agree_with_the_dense_model():
    result = run(60, seed=1)
    assert len(result["operations"]) == 12  # each of them was drawn
