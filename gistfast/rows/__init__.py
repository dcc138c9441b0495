"""From a file, a folder or a hub data set to rows of texts.

sources     what a name stands for: files, a data set on disk, one from the hub
formats     what a file holds
json_array  a JSON array read piece by piece
dataset     rows as columns of texts, whatever they came from
"""
