"""From a store and a student to a trained student.

begin       what a run has before its first step; stores, its guide stores; setup, a trainer from settings
feed        prompts, tokens, and the collators over them
attention   padded texts, or texts in one row
compilation of the student; trial, a few texts before the first step
collate     row numbers to a batch; passes, how it is cut into forward passes
loader      of batches, and the processes that prepare them; loader_server, what makes those
step        vectors of a batch, and the way of the gradient back
trainer     sentence-transformers' trainer with that step
means       what steps count, between two records of the log; pace, what the clock says of them
non_finite  steps that leave the numbers; out_of_memory, too little memory in one line
store_watch stores that change beside a run; store_change, in what they differ when it is resumed
callbacks   what watches a run; best, which evaluation was the best; hub_upload
run_folder  what a run leaves on disk; set_aside, what it replaces; checkpoint, report, run_picture, modelcard
bench       a step beside sentence-transformers'; bench_contenders, bench_rows
"""
