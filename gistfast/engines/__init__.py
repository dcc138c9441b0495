"""Who embeds: this process, several on this machine, or a Ray cluster; all run the same worker.

    shards      one worker: shards that nobody is at, embedded and committed until none is left
    claims      how workers keep out of each other's way
    job         what a worker is told, wherever it runs
    processes   several on this machine, each of which runs worker
    ray_actors  one for each GPU or CPU slot of a cluster
    choice      which of them the settings ask for

Nothing here decides what exists: commits in the store do.
"""
