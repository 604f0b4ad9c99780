"""Short runs of the generators."""

from vhostpy.load import blk, net


def send(sockets, **plan):
    plan = {"seconds": 0.2, "warmup_s": 0.05, "queue_size": 256} | plan
    return net.run(net.NetPlan(tuple(sockets), **plan))


def request(path, **plan):
    return blk.run(blk.BlkPlan(path, **{"seconds": 0.2, "warmup_s": 0.05, "depth": 8} | plan))
