"""The guided contrastive loss, and what sentence-transformers' trainer takes for it.

functional        a function of vectors; inputs, what it refuses
gist_loss         `GISTLoss`, with the guide read from a store
cached_gist_loss  `CachedGISTLoss`, for batches larger than memory; replay_columns, a part of them embedded twice
stats, triplet    what the mask did to a batch; a term beside the softmax
matryoshka        the loss at several widths
carriers          which texts carry the gradient
schedules         temperature and margin that change
"""
