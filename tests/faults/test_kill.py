"""A few kills; `python -m tests.faults.kill` does fifty."""

from .kill import kills


def test_runs_that_were_killed_resume_to_the_same_adapter(tmp_path):
    for entry in kills(3, seed=0, directory=tmp_path):
        assert entry["killed"] and entry["resumed"] and entry["identical"], entry
