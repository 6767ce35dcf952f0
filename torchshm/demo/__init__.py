"""The demo: real climate and flight data through DataLoader workers, stock PyTorch against torchshm.

One process conducts, and every *arm* -- one case, handed over in one way -- is a fresh process of its own, so
that neither a registration nor memory leaks from one to the other. The rounds of a case's arms are
interleaved, so that what disturbs the machine disturbs all of them.

=============  ==========================================================================================
libraries      what the demo needs beyond numpy
settings       sizes, durations, workers
climate        the xarray Dataset
flights        the pandas frame
datasets       what the DataLoader indexes
collate        how samples become a batch
model          the small forecast model that trains on the batches
case           one kind of batch: its loader, the check of what arrives, what the program does with it
usage          CPU seconds and memory of a tree of processes
arm            the process that runs one case in one way
conductor      starts the arms, interleaves their rounds, collects the results
result         what was measured
report         the table and the JSON
picture        the picture
progress       bars on a terminal, lines elsewhere
=============  ==========================================================================================

Nothing here is imported by ``import torchshm``.
"""
