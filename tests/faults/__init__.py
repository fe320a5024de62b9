"""Faults while a run is under way: kills at any moment, full disks, damaged files, two runs on one output.

    python -m tests.faults                       so many of each as COUNTS says
    python -m tests.faults --only kill --count 500 --seed 3
    python -m tests.faults --only kill --story delta --number 17    one of them again, with what was said

After every fault the same command is given again. Its result must be the one of a run that nothing disturbed, bit for
bit, or it says one line and nothing that was there before is damaged. ``make test-faults`` runs all of it and prints
what happened; a handful are in the tests.
"""
