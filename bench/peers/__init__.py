"""vhostpy beside its peers, interleaved in one run on one machine.

    make bench-peers                                 # all cases; again: those that are missing
    python -m bench.peers --only 64B-split --pairs 7 # one case, more runs
    python -m bench.peers --only 64B-split --save    # the same, into the table of all

The device under test runs on core 0, the generator on core 1. Every device of a group is
started once; all but the one that is measured are stopped by SIGSTOP, so that pairs can
follow each other in seconds. Figures go to bench/results/, by day and commit: JSON with all
runs, a table, a chart. Each case is written when it is done: a run that was broken off goes
on with --resume, and parts that were measured of the same commit on one day are one table.
"""
