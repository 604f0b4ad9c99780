"""vhostpy beside its peers, interleaved in one run on one machine.

    make bench-peers                                 # all cases, half an hour
    python -m bench.peers --only 64B-split --pairs 7 # one case, more runs

The device under test runs on core 0, the generator on core 1. Every device of a group is
started once; all but the one that is measured are stopped by SIGSTOP, so that pairs can
follow each other in seconds. Figures go to bench/results/, dated: JSON, a table, a chart.
"""
