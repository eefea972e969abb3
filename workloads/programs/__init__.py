"""The programs that are put on a volume. All answer to the same words, so that a story is told once:

    start(data)     the program runs on a directory of the volume and serves
    hasten()        from its start on, what it does seldom it does often: a new segment, a checkpoint, a snapshot
    load()          its load begins; each acknowledgement goes into `acks`, off the device
    stopped()       whether it has ended or its load met an error
    stops_within    how many seconds after its key was denied all of its load has ended
    patience        how many seconds it may be without an acknowledgement, on a busy machine as well
    halt()          the load ends in peace; an error in it is a Failure
    load_ended()    whether nobody waits for an answer any more
    stop(), kill()  the program ends in peace, or as in a crash
    verify(data)    what it has kept: (whether all that was acknowledged is there, what it says)
    complaints()    the lines of its own log that tell of trouble, without what it said until it was last killed
"""
