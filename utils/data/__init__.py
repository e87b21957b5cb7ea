"""From a file to the model's input; every function takes plain values, `datasets.py` alone reads them off `args`.

The way of an image in training, in order:

1. sampling.py: `StepSampler` tells which images make up a step; in a loader process, `TrainSamples` seeds each of them;
2. files.py (tars.py, shapes.py): the data set reads the file;
3. images.py (formats.py): `decode` makes a tensor (C, H, W) of it, bytes if the file holds bytes;
4. transforms.py: the data set's transform crops and augments it to (C, size, size);
5. sampling.py: `StepLoader` gives the batches of a step; on the device, its `batch_transform` makes the model's input.

Where images are normalised: pre-training only crops and flips, so its images stay bytes, a quarter of the traffic
between processes and to the device, and `batch_transform` normalises there. Fine-tuning erases parts of normalised
images, one by one, so its transform normalises, as that of evaluation does, and `batch_transform` does nothing.
"""
