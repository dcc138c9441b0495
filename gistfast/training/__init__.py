"""From a store and a student to a trained student.

stores      the guide stores of a run; setup, a trainer from settings
feed        prompts, tokens, and the collators over them
collate     row numbers to a batch; passes, how it is cut into forward passes
step        vectors of a batch, and the way of the gradient back
trainer     sentence-transformers' trainer with that step
means       what steps count, between two records of the log
callbacks   what watches a run; best, which evaluation was the best; hub_upload
run_folder  what a run leaves on disk; checkpoint, report, run_picture, modelcard
bench       a step beside sentence-transformers'; bench_contenders, bench_rows
"""
